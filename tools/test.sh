#!/usr/bin/env bash
# Set up, then check and test everything: style, types, unit tests, integration tests with the real model, vLLM,
# Slurm and Redis (Debian packages, installed here when run as root).
#
#   bash tools/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup.sh
.venv/bin/python tools/prepare_demo.py
.venv/bin/python tools/sandbox/slurm.py install || echo "without Slurm, its tests will fail" >&2
.venv/bin/python tools/sandbox/redis.py install || echo "without Redis, its tests will fail" >&2
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi

# Beside each other: tests of worlds, servers and whole runs wait a good deal, unit tests do not. The report of the unit
# tests comes last.
report=$(mktemp)
.venv/bin/python -m pytest tests/unit >"$report" 2>&1 &
unit=$!
trap 'kill "$unit" 2>/dev/null || true; rm -f "$report"' EXIT
failed=0
.venv/bin/python -m pytest tests/distributed tests/integration || failed=1
wait "$unit" || failed=1
cat "$report"
exit "$failed"
