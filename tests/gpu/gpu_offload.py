"""Offloading: reference weights and optimizer state to host memory and back."""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_figures import FAIL, PASS, SKIPPED, Row, gib
from gpu_models import ON_GPU, case_of, configuration, make_policy, model_folder, timed, used_bytes

from megatron_rlpt.objectives import Example
from megatron_rlpt.policy.offload import OptimizerOffload
from megatron_rlpt.policy.optimizer import parts_with_parameters
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.policy.reference import ReferenceWeights


def offload(options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Move the reference's weights and the optimizer's state, through pageable and through pinned memory."""
    policy = make_policy(configuration(options, model_folder(options, scratch), objective="online_dpo"))
    examples = case_of(options, 2).batch(0)
    yield _reference(policy, examples[:1])
    policy.update(examples)  # the moments exist from here on
    yield _optimizer(policy, examples, pinned=False)
    if ON_GPU:
        yield _optimizer(policy, examples, pinned=True)
    else:
        yield Row("optimizer offload, pinned", SKIPPED, "", "memory is pinned for a GPU")


def _reference(policy: Policy, examples: list[Example]) -> Row:
    expected = policy.logprobs(examples)
    reference = ReferenceWeights(policy._model_chunks, version=0)
    held = used_bytes()
    active = reference.active()
    swap = timed(active.__enter__)
    inside = used_bytes()
    same = torch.equal(policy.logprobs(examples), expected)
    active.__exit__(None, None, None)
    gc.collect()
    left = used_bytes() - held if ON_GPU else 0
    hosted = all(tensor.device.type == "cpu" for tensor in reference.weights())
    return Row(
        "reference offload",
        PASS if same and hosted and left <= 2**20 else FAIL,
        f"{gib(max(0, inside - held))} in use while active, {gib(max(0, left))} afterwards; swapped in in "
        f"{swap * 1e3:.0f} ms",
        f"log-probabilities as with the policy's own weights: {same}; weights in host memory: {hosted}",
        {"swap_s": swap, "active_bytes": inside - held, "left_bytes": left},
    )


def _optimizer(policy: Policy, examples: list[Example], *, pinned: bool) -> Row:
    """Offload and restore twice, the second time with buffers that exist, as in every step of a run."""
    device = next(policy._model_chunks[0].parameters()).device
    mover = OptimizerOffload(parts_with_parameters(policy._optimizer), device)
    if not pinned:
        mover._buffers = [torch.empty_like(place.tensor, device="cpu") for place in mover._places()]
    nbytes = sum(place.tensor.nbytes for place in mover._places())
    before = [place.tensor.clone() for place in mover._places()][:4]
    resident, first = used_bytes(), timed(mover.offload)
    freed = resident - used_bytes()
    timed(mover.restore)
    out, back = timed(mover.offload), timed(mover.restore)
    same = all(torch.equal(place.tensor, one) for place, one in zip(mover._places(), before, strict=False))
    loss = policy.update(examples)["loss"]
    enough = not ON_GPU or freed >= 0.9 * nbytes
    return Row(
        f"optimizer offload, {'pinned' if pinned else 'pageable'}",
        PASS if same and enough and math.isfinite(loss) else FAIL,
        f"{nbytes / 1e9:.2f} GB out in {out:.2f} s ({nbytes / out / 1e9:.1f} GB/s), back in {back:.2f} s "
        f"({nbytes / back / 1e9:.1f} GB/s); the first time {first:.2f} s; {gib(max(0, freed))} freed",
        f"state unchanged: {same}; the next update's loss is {loss:.4f}",
        {"out_s": out, "back_s": back, "first_s": first, "bytes": nbytes, "freed_bytes": freed},
    )
