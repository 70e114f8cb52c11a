"""Ask a mixture of experts, whose folder is the argument, for rollouts with their experts; print them.

Twice in this process, before and after an update that changes nothing, and once with an engine of its own process.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rollout_contract import LENGTH, prompts, weights_of
from tiny_runs import start_engine

from megatron_rlpt.rollout.engine import RolloutPrompt
from megatron_rlpt.rollout.placement import EngineMode, EnginePlace
from megatron_rlpt.rollout.vllm.engine import VllmEngine


def asked() -> list[RolloutPrompt]:
    """Three rollouts of each prefix, so that two of them read whole blocks from the prefix cache."""
    return [RolloutPrompt(one.prefix, one.seed + number) for one in prompts(8) for number in range(3)]


def told(engine: VllmEngine) -> list[Any]:
    """Return prefix, completion, and the experts of both, for every rollout."""
    found = []
    for prompt, one in zip(asked(), engine.generate(asked(), LENGTH, 0), strict=True):
        assert one.routing is not None
        found.append([prompt.prefix, one.tokens, list(one.routing.prefix), list(one.routing.completion)])
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    engine = start_engine(folder, router_replay=True)
    first = told(engine)
    engine.update_weights(weights_of(folder), 0)
    second = told(engine)
    apart = told(start_engine(folder, place=EnginePlace(EngineMode.OWN_PROCESS), router_replay=True))
    print(json.dumps({"first": first, "second": second, "apart": apart}))
