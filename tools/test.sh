#!/usr/bin/env bash
# Set up, then check and test everything: style, types, unit tests, integration tests with the real model, vLLM,
# Slurm and Redis (Debian packages, installed here when run as root).
#
#   bash tools/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup.sh
bash tools/setup_launch.sh
.venv/bin/python tools/prepare_demo.py
.venv/bin/python tools/sandbox/slurm.py install || echo "without Slurm, its tests will fail" >&2
.venv/bin/python tools/sandbox/redis.py install || echo "without Redis, its tests will fail" >&2
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi

# Three beside each other: tests of worlds, servers and whole runs wait a good deal, those on Slurm even more, unit tests
# do not. Reports of what runs in the background come last.
reports=$(mktemp -d)
background=()
beside() {
    local name=$1
    shift
    .venv/bin/python -m pytest "$@" >"$reports/$name" 2>&1 &
    background+=("$!")
}
trap 'kill "${background[@]}" 2>/dev/null || true; rm -rf "$reports"' EXIT
slurm=(tests/integration/test_slurm_*.py tests/integration/test_launch_*.py)
beside unit tests/unit
beside slurm "${slurm[@]}"
failed=0
.venv/bin/python -m pytest tests/distributed tests/integration "${slurm[@]/#/--ignore=}" || failed=1
for job in "${background[@]}"; do
    wait "$job" || failed=1
done
cat "$reports"/*
exit "$failed"
