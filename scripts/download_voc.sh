#!/usr/bin/env bash
# Get PASCAL VOC 2012 and, for trainaug, the masks of the Semantic Boundaries Dataset:
#   bash scripts/download_voc.sh /data
#   bash scripts/download_voc.sh /data --trainaug
set -euo pipefail
python=${PYTHON:-python}

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    cat <<'TEXT'
usage: bash scripts/download_voc.sh FOLDER [--trainaug]

Makes FOLDER/VOCdevkit/VOC2012 (2 GB, from host.robots.ox.ac.uk). With --trainaug it also fetches the Semantic Boundaries
Dataset (1.4 GB, from www2.eecs.berkeley.edu), writes its masks to SegmentationClassAug and the list trainaug.txt: the
training images of VOC and all images of SBD, without those of VOC's validation set (10 582 names).
TEXT
    exit 2
fi
folder=$1
voc=$folder/VOCdevkit/VOC2012
mkdir -p "$folder"
archive=$folder/VOCtrainval_11-May-2012.tar # it stays until it is unpacked, so a stopped run is not taken for a finished one
if [ ! -d "$voc/JPEGImages" ] || [ -e "$archive" ]; then
    curl --fail --location --continue-at - --output "$archive" \
        http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar
    echo "6cd6e144f989b92b3379bac3b3de84fd  $archive" | md5sum --check --quiet ||
        { echo "error: $archive is damaged; delete it and repeat the command" >&2; exit 1; }
    tar --extract --file "$archive" --directory "$folder"
    rm "$archive"
fi
if [ "${2:-}" = "--trainaug" ]; then
    archive=$folder/benchmark.tgz
    [ -d "$folder/benchmark_RELEASE" ] || {
        curl --fail --location --continue-at - --output "$archive" \
            https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz
        tar --extract --file "$archive" --directory "$folder"
    }
    "$python" "$(dirname "$0")/merge_sbd.py" "$folder/benchmark_RELEASE/dataset" "$voc"
fi
for part in "train 1464" "val 1449"; do
    read -r name whole <<<"$part"
    found=$(wc -l <"$voc/ImageSets/Segmentation/$name.txt")
    [ "$((found))" -eq "$whole" ] || echo "note: $name.txt has $((found)) of $whole names" >&2
done
echo "next: python main.py mode=check_data dataset=voc12 dataset.root=$voc"
