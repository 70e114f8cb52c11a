#!/usr/bin/env bash
# Set up, then check and test everything: style, types, unit tests, integration tests with the real model, vLLM and
# Slurm (Debian packages, installed here when run as root).
#
#   bash tools/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup.sh
.venv/bin/python tools/prepare_demo.py
.venv/bin/python tools/sandbox/slurm.py install || echo "without Slurm, its tests will fail" >&2
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest "$@"
