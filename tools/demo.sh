#!/usr/bin/env bash
# The demo, from nothing: set up, make model and corpus, train, train the next-token baseline, compare.
#
#   bash tools/demo.sh [section.key=value ...]
#
# Overrides apply to the run, its baseline and the evaluation. Run it again to resume; when all is done it only prints the
# report.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup.sh
rlpt=.venv/bin/rlpt
run=$("$rlpt" config --config configs/demo.yaml "$@" --get run.dir)
.venv/bin/python tools/prepare_demo.py

echo "== self-improving pretraining -> $run"
"$rlpt" train --config configs/demo.yaml "$@"
echo "== next-token baseline on the same episodes -> $run/baseline_ntp"
"$rlpt" train --config configs/demo_ntp.yaml "$@" "run.dir=$run/baseline_ntp" objective.name=ntp \
    candidates.original=true candidates.rewrite=false candidates.rollouts=0
echo "== evaluation on held-out prefixes"
"$rlpt" evaluate --config configs/demo.yaml "$@"
