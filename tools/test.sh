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
second=
trap 'for lane in $background $second; do kill -- "-$lane" 2>/dev/null || true; done; rm -rf "$work"' EXIT
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
{ .venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy; } || failed=1
wait "$background"

if [ $# -gt 0 ]; then
    background=
    [ "$failed" = 0 ] || exit 1
    .venv/bin/python -m pytest "$@"
    exit
fi

# Three lanes beside each other: runs on Slurm wait a good deal, for nodes and each other. The first lane is shown as it
# goes, the reports of the others come last.
slurm=(tests/integration/test_slurm_*.py tests/integration/test_launch_*.py)
alone=(tests/odd tests/unit tests/integration/test_[a-d]*.py)
mapfile -t several < <(printf '%s\n' tests/integration/test_*.py | grep -vE '/test_(slurm_|launch_|[a-d])')
several+=(tests/distributed)
.venv/bin/python -m pytest "${slurm[@]}" >"$work/slurm" 2>&1 &
background=$!
.venv/bin/python -m pytest "${several[@]}" >"$work/several" 2>&1 &
second=$!
code=0
.venv/bin/python -m pytest "${alone[@]}" || code=$?
[ "$code" != 2 ] || exit 2 # interrupted
[ "$code" = 0 ] || failed=1
for lane in "$second" "$background"; do
    wait "$lane" || failed=1
done
cat "$work/several" "$work/slurm"
exit "$failed"
