#!/usr/bin/env bash
# Set up .venv-launch at the root of the repository: nemo-run and this package for a login node or a laptop, without
# torch. It is separate from .venv because leptonai, which nemo-run needs, pins releases that vLLM refuses.
# Safe to repeat: an environment that matches the lock file stays as it is.
#
#   RLPT_PYTHON  interpreter to use (default: the first Python 3.11 found)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/environment.sh

# The dependencies of nemo-run, leptonai<0.28 (newer releases lack a module that nemo-run imports), this package and
# pyyaml, without ray, which leptonai requires but only its own jobs use, and the packages that only ray needs.
LOCK=tools/launch-lock.txt
VENV=.venv-launch
STAMP=$VENV/.installed

if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(fingerprint "$LOCK" tools/setup_launch.sh)" ]; then
    exit 0
fi

PYTHON=$(find_python)
echo "setting up $VENV with $("$PYTHON" --version)"
# --clear: remove packages that only an older lock file had.
"$PYTHON" -m venv --clear "$VENV"

install_packages "$VENV" -r "$LOCK" --editable .
# Importing compiles the modules that are used.
env -u PYTHONDONTWRITEBYTECODE "$VENV/bin/python" -c "import nemo_run, megatron_rlpt.cli.main, launch.experiment" 2>/dev/null ||
    die "the packages in $VENV do not import together; remove $VENV and run this again"
if "$VENV/bin/python" -c "import torch" 2>/dev/null; then
    die "$VENV has torch, which a login node must not need; remove it from $LOCK"
fi
fingerprint "$LOCK" tools/setup_launch.sh > "$STAMP"
echo "$VENV is ready"
