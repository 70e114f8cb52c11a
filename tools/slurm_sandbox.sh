#!/usr/bin/env bash
# A real Slurm of two nodes with accounting on this machine, to try a launch without a cluster (tools/sandbox/slurm.py).
#
#   eval "$(bash tools/slurm_sandbox.sh start DIR)"   # sets SLURM_CONF; installs Debian's packages first, when run as root
#   bash tools/slurm_sandbox.sh stop DIR              # cancels its jobs and stops it
set -euo pipefail

sandbox() { python3 "$(dirname "${BASH_SOURCE[0]}")/sandbox/slurm.py" "$@"; }

case "$#:${1:-}" in
    2:start) sandbox install && sandbox start "$2" ;;
    2:stop) sandbox stop "$2" ;;
    *) echo "usage: bash tools/slurm_sandbox.sh start|stop DIR" >&2; exit 2 ;;
esac
