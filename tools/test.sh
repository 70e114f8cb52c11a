#!/usr/bin/env bash
# Set up, then check and test everything: style, types, unit tests, integration tests with the real model and vLLM.
#
#   bash tools/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup.sh
.venv/bin/python tools/prepare_demo.py
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest "$@"
