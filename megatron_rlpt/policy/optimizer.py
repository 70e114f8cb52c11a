"""Megatron's distributed AdamW and learning-rate schedule, and their checkpoint state.

Megatron's checkpoint code expects the fused Adam of Transformer Engine or Apex, which keeps the step counter in the
parameter group. torch's Adam, used if neither is installed, keeps it with the moments of each parameter
(``megatron/core/optimizer/distrib_optimizer.py``); this module handles both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rlpt.config import Dtype, OptimizerConfig, TrainConfig
from megatron_rlpt.policy.model import HiddenStateModel
from megatron_rlpt.policy.optimizer_shares import own_shares
from megatron_rlpt.policy.precision import torch_dtype_of


def build_optimizer(
    model_chunks: Sequence[HiddenStateModel], config: OptimizerConfig, dtype: Dtype, overlap: bool
) -> tuple[list[Any], Any]:
    """Wrap every model chunk in Megatron's DDP (fp32 gradients) and build one distributed AdamW (fp32 main weights).

    Args:
        model_chunks: this rank's model chunks.
        config: the optimizer's settings.
        dtype: precision of the model_chunks.
        overlap: reduce gradients during the backward pass and gather weights during the next forward pass.
    """
    ddps = [
        DistributedDataParallel(
            config=model_chunk.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=overlap,
                overlap_param_gather=overlap,
            ),
            module=model_chunk,
            # Only the first model chunk has computation left to hide bucketed communication behind.
            disable_bucketing=number > 0,
        )
        for number, model_chunk in enumerate(model_chunks)
    ]
    for ddp in ddps:
        for bucket_group in (*ddp.bucket_groups, *ddp.expert_parallel_bucket_groups):
            _skip_lone_collectives(bucket_group)
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=dtype is Dtype.bf16,
            params_dtype=torch_dtype_of(dtype),
            use_distributed_optimizer=True,
        ),
        ddps,
    )
    _init_state(optimizer)
    shared = model_chunks[0].config
    shared.grad_scale_func = optimizer.scale_loss
    shared.finalize_model_grads_func = finalize_model_grads
    shared.no_sync_func = ddps[0].no_sync if len(ddps) == 1 else [ddp.no_sync for ddp in ddps]
    return ddps, optimizer


def _skip_lone_collectives(bucket_group: Any) -> None:
    """Leave out the collectives of a data-parallel group of one rank, in which every rank has what they would bring.

    Gloo would copy all gradients and all weights to say so. Overlapped collectives are left as they are: Megatron waits
    for their handles (``megatron/core/distributed/param_and_grad_buffer.py``).
    """
    settings = bucket_group.ddp_config
    if (
        bucket_group.intra_distributed_optimizer_instance_size > 1
        or settings.num_distributed_optimizer_instances > 1
        or settings.overlap_grad_reduce
        or settings.overlap_param_gather
    ):
        return

    def scale_gradients(force_all_reduce: bool | None = False) -> None:
        for bucket in bucket_group.buckets:
            if bucket.gradient_scaling_factor != 1.0:
                bucket.grad_data *= bucket.gradient_scaling_factor

    def gather_nothing(force_sync: bool = False) -> None:
        bucket_group.param_gather_dispatched = True

    bucket_group.start_grad_sync = scale_gradients
    bucket_group.start_param_sync = gather_nothing


def build_scheduler(optimizer: Any, config: OptimizerConfig, train: TrainConfig) -> Any:
    """Return Megatron's schedule; it is stepped before every update, so the first uses lr / warmup_steps, not 0."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        # One more than the number of updates, so that the last one still has a learning rate above min_lr.
        lr_decay_steps=train.steps + 1,
        lr_decay_style=config.decay.name,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def _init_state(optimizer: Any) -> None:
    """Create Adam's moments now: Megatron cannot write or read a checkpoint without them."""
    for part in parts_with_parameters(optimizer):
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.Adam):  # also AdamW
            for group in part.optimizer.param_groups:
                # One pass over the memory per parameter instead of one per operation of Adam.
                group["fused"] = True
            # ``init_state_fn`` does not set it.
            _set_steps(part.optimizer, 0)


def _set_steps(adam: torch.optim.Adam, updates: int) -> None:
    """Set the step counter of every parameter: one each, since Adam adds to it in place, beside the moments."""
    for state in adam.state.values():
        state["step"] = torch.tensor(float(updates), device=state["exp_avg"].device)


def sharded_optimizer_state(optimizer: Any, model: Any, is_loading: bool) -> dict[str, Any]:
    """Return main weights and moments, sharded like their parameters in ``model``, and the number of updates.

    A save has this rank's own share (``optimizer_shares.py``); a load has all of the parameters that this rank holds.

    Megatron's ``sharded_state_dict`` also saves the parameter groups of every optimizer in the chain, and the length of
    the chain depends on the layout: experts that are distributed over ranks have their own optimizer. Apart from the
    number of updates, groups hold only values that configuration and schedule set.

    Args:
        optimizer: Megatron's optimizer or chain of optimizers.
        model: the sharded state of every model chunk, with the parameters as its data.
        is_loading: describe what to read instead.
    """
    return {
        "updates": _updates(optimizer),
        "tensors": {
            number: (
                part.sharded_param_state_fully_reshardable(model, True, {}) if is_loading else own_shares(part, model)
            )
            for number, part in enumerate(parts_with_parameters(optimizer))
        },
    }


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load a ``sharded_optimizer_state`` whose tensors were read.

    Megatron copies every entry of a parameter's state from the checkpoint, but torch's step counter is not in it, so it
    is removed during the copy.
    """
    updates = int(state["updates"])
    for number, part in enumerate(parts_with_parameters(optimizer)):
        torch_adam = isinstance(part.optimizer, torch.optim.Adam)
        if torch_adam:
            for entries in part.optimizer.state.values():
                entries.pop("step", None)
        part.load_parameter_state_from_fully_reshardable(state["tensors"][number])
        if torch_adam:
            _set_steps(part.optimizer, updates)
        else:
            for group in part.optimizer.param_groups:
                group["step"] = updates


def _updates(optimizer: Any) -> int:
    """Return the number of updates in the optimizer's state; 0 if this rank has no state."""
    counters = [0]
    for part in parts_with_parameters(optimizer):
        counters += [int(entries["step"]) for entries in part.optimizer.state.values() if "step" in entries]
        counters += [int(group["step"]) for group in part.optimizer.param_groups if "step" in group]
    return max(counters)


def parts_with_parameters(optimizer: Any) -> list[Any]:
    """Return the optimizers of a chain that have parameters on this rank."""
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chain if not part.is_stub_optimizer]
