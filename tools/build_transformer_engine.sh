#!/usr/bin/env bash
# Compile the part of Transformer Engine for PyTorch, which has no wheel, against the packages of tools/gpu-lock.txt.
# Needs the CUDA toolkit (nvcc and its headers) and g++; takes some minutes and several GB of memory.
#
#   bash tools/build_transformer_engine.sh [PYTHON]    # default: python
#
#   MAX_JOBS  compilers beside each other
set -euo pipefail

PYTHON=${1:-python}
LOCK=$(dirname "${BASH_SOURCE[0]}")/gpu-lock.txt

die() { echo "error: $*" >&2; exit 1; }

version=$(sed -n 's/^transformer-engine==//p' "$LOCK")
[ -n "$version" ] || die "$LOCK names no transformer-engine"
if "$PYTHON" -c 'import sys, importlib.metadata as m; sys.exit(m.version("transformer-engine-torch") != sys.argv[1])' \
    "$version" 2>/dev/null; then
    exit 0
fi

# Its build looks for headers in the CUDA toolkit (build_tools/utils.py: get_cuda_include_dirs), which has neither
# cuDNN's nor the NCCL that torch is linked with, and it reads neither CUDNN_PATH nor CUDNN_INCLUDE_DIR. The compiler
# finds those of the wheels through CPATH.
packages=$("$PYTHON" -c 'import nvidia; print(list(nvidia.__path__)[0])' 2>/dev/null) ||
    die "$PYTHON has no package nvidia; install $LOCK first"
for header in cudnn/include/cudnn.h nccl/include/nccl.h; do
    [ -f "$packages/$header" ] || die "$packages/$header does not exist; install $LOCK first"
    CPATH=$packages/${header%/*}${CPATH:+:$CPATH}
done
export CPATH
[ -n "${CUDA_HOME:-}" ] || command -v nvcc > /dev/null || [ -x /usr/local/cuda/bin/nvcc ] ||
    die "no CUDA toolkit found; install it or name one with CUDA_HOME"

# Compile, instead of looking for a wheel on GitHub that fits this torch.
NVTE_PYTORCH_FORCE_BUILD=TRUE "$PYTHON" -m pip install --no-build-isolation --no-deps \
    "transformer-engine-torch==$version"
