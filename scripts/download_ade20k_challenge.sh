#!/usr/bin/env bash
# Get ADE20K of the 2016 scene-parsing challenge (923 MB, no account needed):
#   bash scripts/download_ade20k_challenge.sh /data
set -euo pipefail
python=${PYTHON:-python}
if [ $# -ne 1 ]; then
    echo "usage: bash scripts/download_ade20k_challenge.sh FOLDER (makes FOLDER/ADEChallengeData2016)"
    exit 2
fi
folder=$1
mkdir -p "$folder"
archive=$folder/ADEChallengeData2016.zip
[ -d "$folder/ADEChallengeData2016" ] || {
    curl --fail --location --continue-at - --output "$archive" http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip
    "$python" -m zipfile -e "$archive" "$folder" ||
        { echo "error: $archive is damaged or $folder is full; delete it and repeat the command" >&2; exit 1; }
}
for part in "training 20210" "validation 2000"; do
    read -r name whole <<<"$part"
    found=$(find "$folder/ADEChallengeData2016/annotations/$name" -name 'ADE_*.png' | wc -l)
    echo "$((found)) of $whole $name masks"
done
echo "next: python main.py mode=check_data dataset=ade20k_challenge dataset.root=$folder/ADEChallengeData2016"
