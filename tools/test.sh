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
.venv/bin/python tools/sandbox/login.py install || echo "without an SSH server, the test of one will fail" >&2
.venv/bin/python tools/sandbox/redis.py install || echo "without Redis, its tests will fail" >&2
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi

# Two beside each other: tests of worlds, servers and whole runs wait a good deal, and so do those on Slurm. The report of
# what runs in the background comes last.
slurm=(tests/integration/test_slurm_*.py tests/integration/test_launch_*.py)
report=$(mktemp)
.venv/bin/python -m pytest "${slurm[@]}" >"$report" 2>&1 &
background=$!
trap 'kill "$background" 2>/dev/null || true; rm -f "$report"' EXIT
failed=0
.venv/bin/python -m pytest tests/unit || failed=1
.venv/bin/python -m pytest tests/distributed tests/integration "${slurm[@]/#/--ignore=}" || failed=1
wait "$background" || failed=1
cat "$report"
exit "$failed"
