"""Adaptations to the differences between supported Megatron-Core releases.

Each names the release and the file of ``megatron/core`` that requires it. The device runtime calls ``adapt`` for every
Megatron module after its import, so no other code depends on the installed release.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import logging
import re
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from typing_extensions import override

from megatron_rlpt.errors import RlptError

OLDEST, NEWEST = (0, 16), (0, 19)
"""First and last release series (major, minor) of Megatron-Core with which the tests pass."""

REQUIREMENT = f"megatron-core>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"
"""The same as a pip requirement."""

_NEEDS_PYTHON_312 = (0, 17)
_JIT = "megatron.core.jit"


def version_problem(version: str) -> str | None:
    """Return an error for release ``version`` of Megatron-Core; None if it is supported."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        return None
    return (
        f"megatron-core {version} is not supported, only {_text(OLDEST)} to {_text(NEWEST)} "
        f"(from {_text(_NEEDS_PYTHON_312)} on with Python 3.12 or newer)"
    )


def require_supported() -> None:
    """Refuse a Megatron-Core that is not supported or that cannot write checkpoints.

    Raises:
        RlptError: the release is outside the supported range, or psutil is missing.
    """
    from megatron.core.package_info import __version__

    problem = version_problem(__version__)
    if problem:
        raise RlptError(f"{problem}; pip install '{REQUIREMENT}'")
    # All releases, dist_checkpointing/strategies/filesystem_async.py: without psutil the writer dies before it reports,
    # and the save waits forever.
    if importlib.util.find_spec("psutil") is None:
        raise RlptError(
            "psutil is not installed and Megatron never finishes a checkpoint without it; pip install psutil"
        )


def _text(series: tuple[int, int]) -> str:
    return f"{series[0]}.{series[1]}"


def own_writer_arguments(async_save: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments with which a strategy's ``async_save`` plans for Megatron's own writer."""
    # From 0.17 on, dist_checkpointing/strategies/torch.py defaults to nvidia-resiliency-ext and fails without it.
    return {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(async_save).parameters else {}


def static_context(batch: int, tokens: int, groups: Any) -> Any:
    """Return a ``StaticInferenceContext``, a key-value cache that is not allocated yet.

    Args:
        batch: number of sequences.
        tokens: length of the longest prompt with its continuation.
        groups: ``ProcessGroupCollection`` of the model.
    """
    from megatron.core.inference.contexts import StaticInferenceContext

    context: Any = StaticInferenceContext(max_batch_size=batch, max_sequence_length=tokens)
    # From 0.17 on, inference/contexts/base_context.py: wrapper and controller read the groups from the context's
    # configuration and default to those of the training layout. 0.16 takes them as arguments.
    if hasattr(context, "config"):
        context.config.pg_collection = groups
    return context


def inference_wrapper(model: Any, context: Any, max_batch: int, max_tokens: int) -> Any:
    """Wrap a ``GPTModel`` with ``pg_collection`` in a ``GPTInferenceWrapper`` for the static generation loop.

    Args:
        model: the model.
        context: from ``static_context``, with the groups of the model; may be replaced by a larger one later.
        max_batch: number of sequences of the largest context.
        max_tokens: length of the longest sequence.
    """
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper

    wrapper: Any = GPTInferenceWrapper
    name = "megatron.core.inference.model_inference_wrappers.inference_wrapper_config"
    # Removed in 0.17, which reads the sizes from the model and the context.
    if importlib.util.find_spec(name) is None:
        return wrapper(model, context)
    sizes = importlib.import_module(name).InferenceWrapperConfig(
        hidden_size=model.config.hidden_size,
        params_dtype=model.config.params_dtype,
        inference_batch_times_seqlen_threshold=-1,
        padded_vocab_size=model.vocab_size,
        inference_max_requests=max_batch,
        inference_max_seq_length=max_tokens,
    )
    return wrapper(model, sizes, context, model.pg_collection)


def pipeline_group_arguments(controller: Callable[..., Any], wrapper: Any) -> dict[str, Any]:
    """Return the arguments that pass the pipeline group of ``wrapper`` to ``TextGenerationController``."""
    # 0.16, inference/text_generation_controllers/text_generation_controller.py; from 0.17 on the context has it.
    return {"pp_group": wrapper.pp_group} if "pp_group" in inspect.signature(controller).parameters else {}


def plan_transfers(source: Any, target: Any) -> Any:
    """Plan the transfer of parameters from ``source`` to ``target`` for ``execute_reshard_plan``; a collective.

    The caller caches the plan. From 0.17 on, resharding/refit.py caches one plan per layout in the process, which would
    be wrong for a second model with other weight names.
    """
    from megatron.core import resharding

    # 0.19 renamed it and warns under the old name.
    new = getattr(resharding, "build_local_reshard_plan", None)
    return (new or resharding.build_centralized_reshard_plan)(source, target)


def adapt(module: types.ModuleType) -> None:
    """Apply the fixes for ``module``, a module of ``megatron.core`` that was just imported."""
    correct = _CORRECTIONS.get(module.__name__)
    if correct is not None:
        correct(module)


class ImportHook(importlib.abc.MetaPathFinder):
    """Import hook that adapts modules right after they are imported."""

    def __init__(self, applies: Callable[[str], bool], then: Callable[[types.ModuleType], None]) -> None:
        """
        Args:
            applies: whether a module of that name is adapted.
            then: called with the module once it is executed.
        """
        self._applies = applies
        self._then = then

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not self._applies(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            self._then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def watch_jit() -> None:
    """Adapt ``megatron.core.jit`` when it is imported, which all of Megatron does before a device runtime can exist."""
    sys.meta_path.insert(0, ImportHook(_JIT.__eq__, adapt))


def _no_compiler_on_cpu(module: types.ModuleType) -> None:
    # All releases, jit.py: decorating a fusion imports torch's compiler, a third of the time until a CPU build of
    # torch has imported Megatron, and compiles the few that a CPU runs with a C++ compiler that may be missing.
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        module.disable_jit_fuser()


def adapt_to_cpu(module: types.ModuleType) -> None:
    """Apply the fixes for ``module`` that are needed without CUDA."""
    if module.__name__ == "megatron.core.tensor_parallel.random":
        # All releases: these use torch.cuda's C-level generators, which do not exist without a GPU.
        for name, replacement in (("_get_cuda_rng_state", _get_rng_state), ("_set_cuda_rng_state", _set_rng_state)):
            assert hasattr(module, name), f"{module.__name__} no longer has {name}"
            setattr(module, name, replacement)


def _get_rng_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> Any:
    import torch

    return torch.get_rng_state()


def _set_rng_state(new_state: Any, device: object = -1, graph_safe: bool = False) -> None:
    import torch

    torch.set_rng_state(new_state)


def _router_product(module: types.ModuleType) -> None:
    # 0.16, transformer/moe/moe_utils.py: the router tests if ``te_general_gemm`` is None, but without Transformer
    # Engine the name does not exist. From 0.17 on it is None.
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None  # type: ignore[attr-defined]


def _quiet(*beginnings: str) -> Callable[[types.ModuleType], None]:
    def correct(module: types.ModuleType) -> None:
        logging.getLogger(module.__name__).addFilter(lambda record: not record.getMessage().startswith(beginnings))

    return correct


_CORRECTIONS: dict[str, Callable[[types.ModuleType], None]] = {
    _JIT: _no_compiler_on_cpu,
    "megatron.core.transformer.moe.moe_utils": _router_product,
    # 0.19 warns for every model chunk that HybridModel succeeds it. 0.16 has no such model.
    "megatron.core.models.gpt.gpt_model": _quiet("GPTModel IS DEPRECATED"),
    # 0.18 and 0.19 warn for every model chunk that no parameter layout was passed. 0.16 computes it the same way.
    "megatron.core.distributed.distributed_data_parallel": _quiet("DistributedDataParallel: full_param_layout not"),
    # From 0.17 on it recommends nvidia-resiliency-ext.
    "megatron.core.dist_checkpointing.strategies.torch": _quiet("MCore's async save is deprecated"),
}
