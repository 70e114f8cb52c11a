# shellcheck shell=bash
# Shared by the set-up scripts, which source it: find an interpreter, install pinned packages.
#
#   RLPT_PYTHON  interpreter to use (default: the first Python of the version asked for)

UV=uv==0.13.9 # unpacks and installs wheels in a fifth of pip's processor time

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

die() { echo "error: $*" >&2; exit 1; }

# Print an interpreter: find_python [VERSION]
find_python() {
    local candidate version=${1:-3.11}
    for candidate in ${RLPT_PYTHON:-} "python$version" python3 python; do
        if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c \
            'import sys; sys.exit("{}.{}".format(*sys.version_info) != sys.argv[1])' "$version" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "no Python $version found; install it or name one with RLPT_PYTHON=/path/to/python$version"
}

# Print a hash of files that an environment depends on: a change of any of them means a new set-up.
fingerprint() { cat pyproject.toml tools/environment.sh "$@" | sha256sum | cut -d' ' -f1; }

# Install what pip would install, without dependency resolution and without compiling: install_packages VENV ARGUMENTS...
# uv does not read pip's configuration, so it is told pip's index where one is set.
install_packages() {
    local venv=$1 index
    shift
    "$venv/bin/python" -c 'import sys, importlib.metadata as m; sys.exit(m.version("uv") != sys.argv[1])' "${UV#*==}" \
        2>/dev/null || "$venv/bin/pip" install -qq --no-compile "$UV"
    index=$("$venv/bin/pip" config get global.index-url 2>/dev/null || "$venv/bin/pip" config get :env:.index-url \
        2>/dev/null || true)
    UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index} "$venv/bin/uv" pip install --quiet --no-deps \
        --python "$venv/bin/python" "$@"
}
