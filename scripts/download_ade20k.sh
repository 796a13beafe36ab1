#!/usr/bin/env bash
# Unpack the full ADE20K release and check that it is complete:
#   bash scripts/download_ade20k.sh ~/Downloads/ADE20K_2021_17_01.zip /data
set -euo pipefail
python=${PYTHON:-python}

if [ $# -ne 2 ]; then
    cat <<'TEXT'
usage: bash scripts/download_ade20k.sh ARCHIVE.zip FOLDER

ADE20K is given to registered users, for non-commercial research and education; it cannot be fetched without an account:
  1. request access at https://ade20k.csail.mit.edu/ and accept the terms of use;
  2. download the full data set ADE20K_2021_17_01 (with object masks; not the scene-parsing ADEChallengeData2016);
  3. run this script with the archive and the folder it shall be unpacked to: FOLDER/ADE20K_2021_17_01 is made.
TEXT
    exit 2
fi
archive=$1
folder=$2
[ -f "$archive" ] || { echo "error: no file $archive" >&2; exit 1; }
mkdir -p "$folder"
echo "unpacking $archive to $folder (about 600 000 small files: this takes a while)"
"$python" -m zipfile -e "$archive" "$folder" 2>/dev/null ||
    { echo "error: $archive is damaged or no zip archive, or $folder is full; download it again" >&2; exit 1; }

images=$folder/ADE20K_2021_17_01/images/ADE
[ -d "$images" ] || { echo "error: the archive holds no ADE20K_2021_17_01/images/ADE: it is another release" >&2; exit 1; }
for part in "training 25574" "validation 2000"; do
    read -r name whole <<<"$part"
    found=$(find "$images/$name" -name 'ADE_*_????????.jpg' 2>/dev/null | wc -l || true)
    echo "$((found)) of $whole $name images"
    [ "$found" -eq "$whole" ] || echo "note: $name is not complete; splits are then cut by file number" >&2
done
echo "next: python main.py mode=check_data dataset=ade20k dataset.root=$folder/ADE20K_2021_17_01"
