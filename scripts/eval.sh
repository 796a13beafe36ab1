#!/usr/bin/env bash
# Score every finished run again. Arguments are overrides for all jobs, for example another split or data set:
#   bash scripts/eval.sh eval.split=val
#   bash scripts/eval.sh dataset=folder dataset.root=/data/mine
# OUTPUTS names the folder that holds the runs.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
outputs=${OUTPUTS:-outputs}

found=0
for facts in "$outputs"/train*/*/run.json; do
    grep -qs '"status": "finished"' "$facts" || continue
    found=1
    "$python" main.py mode=eval run="$(dirname "$facts")" output_dir="$outputs" "$@"
done
if [ "$found" = 0 ]; then
    echo "error: no finished run under $outputs; run scripts/train.sh first" >&2
    exit 1
fi
