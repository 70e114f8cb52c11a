#!/usr/bin/env bash
# Set up .venv-peers at the root of the repository: TRL beside the packages of .venv, for tools/bench/peers.py and
# tools/bench/grpo_loss.py. TRL has an environment of its own so that the product never imports it; torch and transformers
# are the same, so that only the trainers differ. Safe to repeat.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/environment.sh

VENV=.venv-peers
PEER=trl==1.16.0
STAMP=$VENV/.installed

bash tools/setup.sh
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$PEER" ]; then
    exit 0
fi
.venv/bin/python -m venv --clear "$VENV"
.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    > "$(echo "$VENV"/lib/python3.*/site-packages)/beside.pth"
install_packages "$VENV" "$PEER"
"$VENV/bin/python" -c "from trl.experimental.online_dpo import OnlineDPOTrainer" 2>/dev/null ||
    die "$PEER does not import in $VENV; remove $VENV and run this again"
echo "$PEER" > "$STAMP"
echo "$VENV is ready"
