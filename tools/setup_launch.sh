#!/usr/bin/env bash
# Set up .venv-launch at the root of the repository: nemo-run and this package for a login node or a laptop, without
# torch. It is separate from .venv because leptonai, which nemo-run needs, pins releases that vLLM refuses.
# Safe to repeat: an environment that matches the lock file stays as it is.
#
#   RLPT_PYTHON  interpreter to use (default: the first Python 3.11 found)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The dependencies of nemo-run, leptonai<0.28 (newer releases lack a module that nemo-run imports), this package and
# pyyaml, without ray, which leptonai requires but only its own jobs use, and the packages that only ray needs.
LOCK=tools/launch-lock.txt
VENV=.venv-launch
STAMP=$VENV/.installed

die() { echo "error: $*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${RLPT_PYTHON:-} python3.11 python3 python; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.11 found; install it or name one with RLPT_PYTHON=/path/to/python3.11"
}

# Everything that the environment depends on; a change of any of it means a new set-up.
fingerprint() { cat "$LOCK" pyproject.toml tools/setup_launch.sh | sha256sum | cut -d' ' -f1; }

if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(fingerprint)" ]; then
    exit 0
fi

PYTHON=$(find_python)
echo "setting up $VENV with $("$PYTHON" --version)"
# --clear: remove packages that only an older lock file had.
"$PYTHON" -m venv --clear "$VENV"

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
# Without compiling: the import below does that for the modules that are used.
"$VENV/bin/pip" install -qq --no-deps --no-compile -r "$LOCK"
"$VENV/bin/pip" install -qq --no-deps --no-compile --editable .
env -u PYTHONDONTWRITEBYTECODE "$VENV/bin/python" -c "import nemo_run, megatron_rlpt.cli.main, launch.experiment" 2>/dev/null ||
    die "the packages in $VENV do not import together; remove $VENV and run this again"
if "$VENV/bin/python" -c "import torch" 2>/dev/null; then
    die "$VENV has torch, which a login node must not need; remove it from $LOCK"
fi
fingerprint > "$STAMP"
echo "$VENV is ready"
