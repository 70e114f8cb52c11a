"""Precision of the layers' matrix products: bf16, or one of Transformer Engine's FP8 recipes.

With any recipe, parameters are bf16, and main weights, gradients (including their sums over ranks and micro-batches)
and the optimizer's moments are fp32 (``policy/optimizer.py``). FP8 is never used for norms, core attention, the router,
the embedding or the vocabulary projection: log-probabilities come from a bf16 product with fp32 sums
(``policy/logprobs.py``).
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_rlpt.config import Dtype, Fp8
from megatron_rlpt.errors import ConfigError, first_line
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.policy.layout import Layout

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Recipe:
    """One FP8 recipe, as Megatron-Core and Transformer Engine define it."""

    name: str
    """``TransformerConfig.fp8_recipe``."""
    format: str
    """``TransformerConfig.fp8``: ``hybrid`` is E4M3 forward and E5M2 for gradients, ``e4m3`` is E4M3 for both. These
    are the defaults of Transformer Engine's recipes (``transformer_engine/common/recipe``)."""
    engine: tuple[int, int]
    """First Transformer Engine version with which Megatron uses it (``megatron/core/fp8_utils.py: get_fp8_recipe``)."""
    check: str
    """Function of Transformer Engine that checks GPU and CUDA version."""
    capability: tuple[int, int]
    """Lowest GPU compute capability that ``check`` accepts."""
    multiple: int
    """Numbers of tokens and matrix sizes must be a multiple of this (``fp8_utils.py: get_fp8_align_size``)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of ``TransformerConfig``."""


RECIPES: dict[Fp8, Recipe] = {
    Fp8.delayed: Recipe(
        "delayed",
        "hybrid",
        (1, 0),
        "check_fp8_support",
        (8, 9),
        16,
        # Transformer Engine's defaults; Megatron's history length is 1.
        {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"},
    ),
    Fp8.current: Recipe("tensorwise", "hybrid", (2, 2), "check_fp8_support", (8, 9), 16),
    Fp8.blockwise: Recipe("blockwise", "e4m3", (2, 3), "check_fp8_block_scaling_support", (9, 0), 16),
    Fp8.mxfp8: Recipe("mxfp8", "e4m3", (2, 1), "check_mxfp8_support", (10, 0), 32),
}
"""Every value of ``model.fp8`` except ``off``."""


@dataclass(frozen=True)
class TransformerEngine:
    """The installed Transformer Engine and the GPU of this process."""

    version: str
    device: str
    """Name and compute capability of the GPU."""
    check: Callable[[str], tuple[bool, str]]
    """Calls one of Transformer Engine's check functions; returns (supported, reason if not)."""


def find_engine() -> TransformerEngine | str:
    """Return the installed Transformer Engine, or the reason why there is none."""
    import torch

    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        import transformer_engine

        checks = _checks_module()
    except (ImportError, OSError, RuntimeError) as error:
        return f"Transformer Engine cannot be imported ({first_line(error)})"

    def check(name: str) -> tuple[bool, str]:
        found = getattr(checks, name, None)
        return found() if found else (False, f"Transformer Engine has no {name}")

    major, minor = torch.cuda.get_device_capability()
    device = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    return TransformerEngine(transformer_engine.__version__, device, check)


def _checks_module() -> Any:
    """Return the module with Transformer Engine's check functions, which older versions call ``fp8``."""
    try:
        return importlib.import_module("transformer_engine.pytorch.quantization")
    except ModuleNotFoundError:
        return importlib.import_module("transformer_engine.pytorch.fp8")


def refusal(fp8: Fp8, engine: TransformerEngine | str) -> str | None:
    """Return why ``engine`` cannot run recipe ``fp8``; None if it can."""
    if fp8 is Fp8.off:
        return None
    if isinstance(engine, str):
        return engine
    recipe = RECIPES[fp8]
    if _series(engine.version) < recipe.engine:
        first = ".".join(map(str, recipe.engine))
        return f"it needs Transformer Engine {first} or newer, and {engine.version} is installed"
    works, reason = engine.check(recipe.check)
    return None if works else f"{reason.strip().rstrip('.')}; this is {engine.device}"


def _series(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def supported_recipes() -> tuple[Fp8, ...]:
    """Return values of ``model.fp8`` other than ``off`` that work here; none without GPU and Transformer Engine."""
    engine = find_engine()
    return tuple(fp8 for fp8 in RECIPES if refusal(fp8, engine) is None)


def require(fp8: Fp8, dtype: Dtype) -> None:
    """Refuse a precision that is not supported here, instead of silently using another.

    Raises:
        ConfigError: names the reason and the supported values.
    """
    check_dtype(fp8, dtype)
    if fp8 is Fp8.off:
        return
    reason = refusal(fp8, find_engine())
    if reason is not None:
        supported = ", ".join([Fp8.off.value, *(one.value for one in supported_recipes())])
        raise ConfigError(f"model.fp8 is {fp8.value}: {reason}; supported here: {supported}")


def torch_dtype_of(dtype: Dtype) -> torch.dtype:
    """Return the torch dtype of a configured precision, which the configuration has resolved to bf16 or fp32."""
    import torch

    return {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}[dtype]


def check_dtype(fp8: Fp8, dtype: Dtype) -> None:
    """Check that FP8 is combined with bf16 parameters.

    Raises:
        ConfigError: ``dtype`` is fp32.
    """
    if fp8 is not Fp8.off and dtype is Dtype.fp32:
        raise ConfigError(f"model.fp8 is {fp8.value} and model.dtype {dtype.value}; FP8 needs model.dtype=bf16")


def recipes_of(capability: tuple[int, int]) -> tuple[Fp8, ...]:
    """Return values of ``model.fp8`` for a GPU compute capability, with a recent Transformer Engine and CUDA."""
    return (Fp8.off, *(fp8 for fp8, recipe in RECIPES.items() if capability >= recipe.capability))


def check_sizes(fp8: Fp8, arch: Architecture, layout: Layout) -> None:
    """Check that the matrices of a tensor-parallel rank have sizes that FP8 products support.

    Raises:
        ConfigError: names the size and what it must be a multiple of.
    """
    if fp8 is Fp8.off:
        return
    multiple = RECIPES[fp8].multiple
    tensor = layout.tensor
    sizes = {
        "hidden size": arch.hidden,
        "query, key and value rows per tensor-parallel rank": (arch.heads + 2 * arch.kv_heads)
        * arch.head_dim
        // tensor,
        "attention output columns per tensor-parallel rank": arch.heads * arch.head_dim // tensor,
    }
    if arch.experts:
        sizes["feed-forward size of an expert"] = arch.experts.ffn_hidden
    else:
        sizes["feed-forward size per tensor-parallel rank"] = arch.ffn_hidden // tensor
    for what, size in sizes.items():
        if size % multiple:
            raise ConfigError(
                f"model.fp8 is {fp8.value}: the {what} is {size}, not a multiple of {multiple}; use model.fp8=off or a "
                "smaller parallel.tensor"
            )


def transformer_arguments(fp8: Fp8) -> dict[str, Any]:
    """Return the arguments of Megatron's ``TransformerConfig`` for ``fp8``; empty for ``off``."""
    if fp8 is Fp8.off:
        return {}
    recipe = RECIPES[fp8]
    return {"fp8": recipe.format, "fp8_recipe": recipe.name, **recipe.settings}


def length_multiple(layout: Layout, fp8: Fp8 = Fp8.off) -> int:
    """Return the number of which the tokens per row must be a multiple, for any number of rows.

    Context parallelism splits a row into two chunks per rank, sequence parallelism splits a rank's share again, and the
    result must be a size that FP8 products support. (Megatron pads the tokens of each expert itself.)
    """
    chunks = 2 * layout.context if layout.context > 1 else 1
    sequence = layout.tensor if layout.sequence else 1
    multiple = chunks * sequence
    if fp8 is not Fp8.off:
        multiple = math.lcm(multiple, RECIPES[fp8].multiple * layout.context * sequence)
    return multiple
