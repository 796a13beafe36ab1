#!/usr/bin/env bash
# Unpack Cityscapes (images 11 GB, fine annotations 241 MB) and check that it is complete:
#   bash scripts/download_cityscapes.sh ~/Downloads/leftImg8bit_trainvaltest.zip ~/Downloads/gtFine_trainvaltest.zip /data/cityscapes
set -euo pipefail
python=${PYTHON:-python}
source "$(dirname "$0")/count_files.sh"
if [ $# -ne 3 ]; then
    cat <<'TEXT'
usage: bash scripts/download_cityscapes.sh leftImg8bit_trainvaltest.zip gtFine_trainvaltest.zip FOLDER

Cityscapes is given to registered users, for non-commercial purposes; it cannot be fetched without an account:
  1. register at https://www.cityscapes-dataset.com/ and accept the licence;
  2. download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip;
  3. run this script with the two archives and the folder they shall be unpacked to.
TEXT
    exit 2
fi
folder=$3
mkdir -p "$folder"
for archive in "$1" "$2"; do
    [ -f "$archive" ] || { echo "error: no file $archive" >&2; exit 1; }
    "$python" -m zipfile -e "$archive" "$folder" ||
        { echo "error: $archive is damaged or no zip archive, or $folder is full; download it again" >&2; exit 1; }
done
count_files "$folder/gtFine/train" '*_gtFine_instanceIds.png' 2975 "train masks"
count_files "$folder/gtFine/val" '*_gtFine_instanceIds.png' 500 "val masks"
echo "next: python main.py mode=check_data dataset=cityscapes dataset.root=$folder"
