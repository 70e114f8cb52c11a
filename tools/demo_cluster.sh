#!/usr/bin/env bash
# The demo as separate processes, from nothing: set up, make model and corpus, install Redis (Debian's package, as root),
# then trainer, two judge workers, a server of the teacher and Redis, each of which may be killed and is started again.
#
#   bash tools/demo_cluster.sh [section.key=value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup.sh
.venv/bin/python tools/prepare_demo.py
.venv/bin/python tools/sandbox/redis.py install
exec .venv/bin/python tools/demo_cluster.py "$@"
