#!/usr/bin/env bash
# Get COCO 2017: images (19 GB), annotations of objects (241 MB), pixel maps of stuff (1.1 GB):
#   bash scripts/download_coco.sh /data/coco
set -euo pipefail
python=${PYTHON:-python}
source "$(dirname "$0")/count_files.sh"
if [ $# -ne 1 ]; then
    cat <<'TEXT'
usage: bash scripts/download_coco.sh FOLDER

Makes FOLDER/images/{train,val}2017, FOLDER/annotations/instances_{train,val}2017.json and
FOLDER/annotations/stuff_{train,val}2017_pixelmaps, from images.cocodataset.org.
TEXT
    exit 2
fi
folder=$1
mkdir -p "$folder/images"
fetch() { # archive on the server, folder it is unpacked to, what it makes there
    archive=$folder/$(basename "$1") # it stays until it is unpacked, so a stopped run is not taken for a finished one
    [ -e "$2/$3" ] && [ ! -e "$archive" ] && return
    curl --fail --location --continue-at - --output "$archive" "http://images.cocodataset.org/$1"
    unpack "$archive" "$2"
    rm "$archive"
}
unpack() {
    "$python" -m zipfile -e "$1" "$2" || { echo "error: $1 is damaged or $2 is full; delete it and repeat" >&2; exit 1; }
}
fetch zips/val2017.zip "$folder/images" val2017
fetch zips/train2017.zip "$folder/images" train2017
fetch annotations/annotations_trainval2017.zip "$folder" annotations/instances_train2017.json
fetch annotations/stuff_annotations_trainval2017.zip "$folder" annotations/stuff_val2017.json
for part in train val; do
    maps=stuff_${part}2017_pixelmaps
    if [ ! -d "$folder/annotations/$maps" ] || [ -e "$folder/annotations/$maps.zip" ]; then
        unpack "$folder/annotations/$maps.zip" "$folder/annotations"
        rm "$folder/annotations/$maps.zip"
    fi
done
count_files "$folder/images/train2017" '*.jpg' 118287 "train images"
count_files "$folder/images/val2017" '*.jpg' 5000 "val images"
echo "next: python main.py mode=check_data dataset=coco_things dataset.root=$folder"
