#!/usr/bin/env bash
# Set up, then check and test everything: style, types, unit tests, integration tests with the real model, vLLM,
# Slurm and Redis (Debian packages, installed here when run as root).
#
#   bash tools/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Two beside each other wherever one waits, or has work for one core.
work=$(mktemp -d)
background=
trap 'kill -- "-$background" 2>/dev/null || true; rm -rf "$work"' EXIT
set -m # what runs in the background is a process group, to be ended whole

bash tools/setup_launch.sh &
background=$!
bash tools/setup.sh
wait "$background"

{
    for part in slurm login redis; do
        .venv/bin/python "tools/sandbox/$part.py" install || echo "without $part, its tests will fail" >&2
    done
    .venv/bin/python tools/prepare_demo.py
} &
background=$!
failed=0
{ .venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy && .venv/bin/shellcheck {tools,launch/templates}/*.sh; } || failed=1
wait "$background"

if [ $# -gt 0 ]; then
    background=
    [ "$failed" = 0 ] || exit 1
    .venv/bin/python -m pytest "$@"
    exit
fi

# Whole runs on Slurm wait a good deal, for nodes and each other; unit tests come after them. The reports of both follow
# that of the rest, which is shown as it goes.
slurm=(tests/integration/test_slurm_*.py tests/integration/test_launch_*.py)
{
    failed=0
    .venv/bin/python -m pytest "${slurm[@]}" || failed=1
    .venv/bin/python -m pytest tests/unit || failed=1
    exit "$failed"
} >"$work/report" 2>&1 &
background=$!
code=0
.venv/bin/python -m pytest tests/odd tests/distributed tests/integration "${slurm[@]/#/--ignore=}" || code=$?
[ "$code" != 2 ] || exit 2 # interrupted
[ "$code" = 0 ] || failed=1
wait "$background" || failed=1
cat "$work/report"
exit "$failed"
