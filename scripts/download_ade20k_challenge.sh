#!/usr/bin/env bash
# Get ADE20K of the 2016 scene-parsing challenge (923 MB, no account needed):
#   bash scripts/download_ade20k_challenge.sh /data
set -euo pipefail
python=${PYTHON:-python}
source "$(dirname "$0")/count_files.sh"
if [ $# -ne 1 ]; then
    echo "usage: bash scripts/download_ade20k_challenge.sh FOLDER (makes FOLDER/ADEChallengeData2016)"
    exit 2
fi
folder=$1
mkdir -p "$folder"
archive=$folder/ADEChallengeData2016.zip
# The archive stays until it is unpacked, so a stopped run is not taken for a finished one.
if [ ! -d "$folder/ADEChallengeData2016" ] || [ -e "$archive" ]; then
    curl --fail --location --continue-at - --output "$archive" http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip
    "$python" -m zipfile -e "$archive" "$folder" ||
        { echo "error: $archive is damaged or $folder is full; delete it and repeat the command" >&2; exit 1; }
    rm "$archive"
fi
masks=$folder/ADEChallengeData2016/annotations
count_files "$masks/training" 'ADE_*.png' 20210 "training masks"
count_files "$masks/validation" 'ADE_*.png' 2000 "validation masks"
echo "next: python main.py mode=check_data dataset=ade20k_challenge dataset.root=$folder/ADEChallengeData2016"
