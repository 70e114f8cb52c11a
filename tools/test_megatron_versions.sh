#!/usr/bin/env bash
# Run the tests of the policy and of Megatron's rollout engine with every supported release of Megatron-Core. Not part of
# tools/test.sh: releases from 0.17 on need Python 3.12 and hence another environment, and each takes several minutes.
#
#   bash tools/test_megatron_versions.sh [pytest arguments]
#
# Without arguments it runs tests/unit/{policy,checkpoint,rollout}, tests/distributed and
# tests/integration/test_megatron_engine.py. vLLM is not installed: tests that start it are skipped.
#
#   RLPT_PYTHON312      interpreter to use (default: python3.12)
#   RLPT_VERSIONS       releases to test (default: the newest of every supported series)
#   RLPT_VERSIONS_DIR   folder of the environment, about 5 GB with a CUDA build of torch (default: .venv-megatron)
#   RLPT_TORCH_INDEX    address of PyTorch's CPU wheel index, where pip does not find a CPU build by itself
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VERSIONS=${RLPT_VERSIONS:-0.16.1 0.17.1 0.18.2 0.19.2}
FOLDER=${RLPT_VERSIONS_DIR:-.venv-megatron}
PYTHON=${RLPT_PYTHON312:-python3.12}
# Versions are those of tools/cpu-lock.txt. vLLM is left out: neither the policy nor this engine needs it.
PACKAGES="numpy einops transformers safetensors omegaconf typer rich psutil xxhash gguf tensorboard pytest pytest-timeout hypothesis"

die() { echo "error: $*" >&2; exit 1; }

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
"$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 12))' 2>/dev/null ||
    die "no Python 3.12 found; install it or name one with RLPT_PYTHON312=/path/to/python3.12"
[ -x "$FOLDER/python/bin/python" ] || "$PYTHON" -m venv "$FOLDER/python"
pip() { "$FOLDER/python/bin/pip" install -qq "$@"; }

pinned() {
    local name
    for name in "$@"; do
        sed -n "s/^\($name==[^ ;]*\).*/\1/p" tools/cpu-lock.txt | grep . || echo "$name"
    done
}

pip ${RLPT_TORCH_INDEX:+--extra-index-url "$RLPT_TORCH_INDEX"} "$(pinned torch)"
# Unquoted: one argument per package.
# shellcheck disable=SC2046,SC2086
pip $(pinned $PACKAGES)

[ $# -gt 0 ] || set -- tests/unit/{policy,checkpoint,rollout} tests/distributed tests/integration/test_megatron_engine.py
failed=""
for version in $VERSIONS; do
    target=$FOLDER/megatron-core-$version
    [ -d "$target" ] || pip --no-deps --target "$target" "megatron-core==$version"
    echo "== megatron-core $version"
    # One folder per release, first on the path: no release replaces another.
    if ! OMP_NUM_THREADS=1 PYTHONPATH="$PWD:$target" "$FOLDER/python/bin/python" -m pytest "$@"; then
        failed="$failed $version"
    fi
done
[ -z "$failed" ] || die "tests failed with megatron-core$failed"
echo "all passed with megatron-core $VERSIONS"
