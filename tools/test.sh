#!/usr/bin/env bash
# Set up, check style and types, run the tests.
#
#   bash tools/test.sh                      everything; installs Slurm, Redis and Chromium (Debian packages) when run as root
#   bash tools/test.sh --quick [...]        unit tests that need no server, for every edit
#   bash tools/test.sh tests/unit/data -x   arguments of pytest instead of all tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

unset PYTHONDONTWRITEBYTECODE # compile once what the set-up did not

background=()
set -m # give background jobs their own process groups, so that they can be killed as a whole
# shellcheck disable=SC2329 # called by the trap
end_background() {
    local job
    for job in ${background[@]+"${background[@]}"}; do kill -- "-$job" 2>/dev/null || true; done
}
trap end_background EXIT
wait_for_background() {
    local job
    for job in "${background[@]}"; do wait "$job"; done
    background=()
}

# tests/conftest.py decides which tests share a process and which start first.
# Four processes, also on two cores: two drive Slurm and mostly wait for it.
# One thread each: more would wait for each other, at the cost of a sixth of the processor time.
pytest=(env OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 4 --no-loadscope-reorder)

check() {
    local failed=0
    .venv/bin/ruff check . && .venv/bin/ruff format --check . || failed=1
    .venv/bin/mypy || failed=1
    .venv/bin/mypy --explicit-package-bases tools || failed=1
    .venv/bin/shellcheck {tools,launch/templates}/*.sh || failed=1
    return "$failed"
}

if [ "${1:-}" = --quick ]; then
    shift
    bash tools/setup.sh
    check
    exec "${pytest[@]}" -m "not slow and not redis and not slurm and not vllm and not chromium" tests/unit "$@"
fi

# Run all set-ups concurrently: they wait for the network and the disk.
. tools/environment.sh
bash tools/setup_launch.sh &
background+=($!)
python=$(find_python)
for part in slurm login redis chromium; do
    "$python" "tools/sandbox/$part.py" install || echo "without $part, its tests cannot run" >&2
done &
background+=($!)
RLPT_COMPILE=no bash tools/setup.sh
wait_for_background
# Then two processes side by side.
{
    .venv/bin/python tools/compile_modules.py
    .venv/bin/python tools/prepare_demo.py --part model
} &
background+=($!)
failed=0
check || failed=1
.venv/bin/python tools/prepare_demo.py --part corpus
wait_for_background

if [ $# -gt 0 ]; then
    [ "$failed" = 0 ] || exit 1
    exec .venv/bin/python -m pytest "$@"
fi
"${pytest[@]}" tests || failed=1
exit "$failed"
