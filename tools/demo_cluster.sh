#!/usr/bin/env bash
# The demo as separate processes, from nothing: set up, make model and corpus, install Redis (Debian's package, as root),
# then launch trainer, judge workers, a server of the teacher and Redis on this machine.
#
#   bash tools/demo_cluster.sh [section.key=value ...]
#
# Kill any process that `.venv-launch/bin/rlpt status runs/demo_cluster` lists: it is restarted, up to five times in ten
# minutes, and the run continues. Ctrl-C stops the run with a checkpoint; the same command resumes it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup.sh
bash tools/setup_launch.sh
.venv/bin/python tools/prepare_demo.py
.venv/bin/python tools/sandbox/redis.py install
exec .venv-launch/bin/rlpt launch --pack-dirty --cluster configs/cluster/local.yaml \
    --config configs/demo_cluster.yaml "$@"
