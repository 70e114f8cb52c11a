"""What Megatron's distributed optimizer needs from us where neither Transformer Engine nor Apex is installed.

Its checkpoint code is written for their fused Adam, which keeps the step counter in the parameter group; torch's Adam
keeps it beside the moments of each parameter (``megatron/core/optimizer/distrib_optimizer.py``).
"""

from __future__ import annotations

from typing import Any

import torch


def init_optimizer_state(optimizer: Any) -> None:
    """Create Adam's moments now: Megatron cannot write or read a checkpoint of an optimizer that has none yet."""
    for part in _parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.Adam):  # AdamW is one of these
            for state in part.optimizer.state.values():
                # ``init_state_fn`` leaves this one out.
                state.setdefault("step", torch.tensor(0.0))


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """``optimizer.load_state_dict(state)`` that also works with torch's Adam.

    Megatron copies every entry of a parameter's state from the checkpoint's tensors, and the step counter is not
    among these (it travels in the parameter group). So the counter is set first and kept aside during the copy.
    """
    (part,) = _parts(optimizer)
    tensors = state.pop("param_state")
    sharding = state.pop("param_state_sharding_type")
    assert sharding == "fully_reshardable", sharding
    part.load_state_dict(state)
    counters = {parameter: values.pop("step", None) for parameter, values in part.optimizer.state.items()}
    part.load_parameter_state_from_fully_reshardable(tensors)
    for parameter, counter in counters.items():
        if counter is not None:
            # One counter each: load_state_dict leaves the same tensor in every entry, which Adam would add to often.
            part.optimizer.state[parameter]["step"] = counter.clone()


def _parts(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])
