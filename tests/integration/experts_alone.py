"""Check weight updates of the mixture of experts whose folder is the argument; print the version afterwards."""

import sys
from pathlib import Path

from rollout_contract import weights_of
from tiny_runs import start_engine

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    engine = start_engine(folder, max_batch=8)
    engine.self_check(lambda: weights_of(folder), 0)
    print(engine.version)
