"""A rollout engine in a process of its own, with the model folder that is the argument; prints what it samples."""

import json
import sys
from pathlib import Path

from rollout_contract import LENGTH, prompts
from tiny_runs import start_engine

if __name__ == "__main__":
    results = start_engine(Path(sys.argv[1])).generate(prompts(), LENGTH, 0)
    print(json.dumps([[result.tokens, result.logprobs] for result in results]))
