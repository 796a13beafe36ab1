#!/usr/bin/env bash
# The paper's sweep: every layer × every probe from ONE extraction. Arguments are overrides for all jobs:
#   bash scripts/train.sh model=dinov2_large dataset=ade20k dataset.root=/data/ADE20K_2021_17_01 model.layers=[0,6,12,18,23]
# PROBES chooses the pairwise probes (comma-separated).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
probes=${PROBES:-linear,diag_quadratic,quadratic,quadratic_fixed_rank,mlp}

"$python" main.py mode=extract "$@"
"$python" main.py -m mode=train probe.mode="$probes" "$@"
"$python" main.py mode=train_class "$@"
"$python" main.py mode=train_identity "$@"
