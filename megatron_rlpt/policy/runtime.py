"""Device runtime: the same Megatron-Core code on CUDA and on a CPU over gloo.

Megatron-Core writes ``torch.cuda`` and ``device="cuda"`` into its source. On a machine without CUDA this module gives
the modules of ``megatron.core``, and only those, a stand-in for the name ``torch`` under which "cuda" means the CPU.
``torch`` itself stays as it is: patching it globally breaks other libraries in the same process (transformers then
leaves rotary buffers uninitialised). Two tensor methods that Megatron calls, ``Tensor.cuda`` and ``Tensor.type``,
cannot be reached through a module's globals; inside ``DeviceRuntime.megatron()`` they are swapped for versions that
differ only when the caller is a Megatron module.

On CUDA nothing is replaced.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "eye", "as_tensor")


class _CpuCuda(types.ModuleType):
    """``torch.cuda`` as Megatron sees it on a CPU machine."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize(device: object = None) -> None:
        """Nothing to wait for: CPU operations return when they are done."""

    @staticmethod
    def empty_cache() -> None:
        """The CPU allocator keeps no cache of ours."""

    @staticmethod
    def get_rng_state(device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)


class _CpuTorch(types.ModuleType):
    """``torch`` as Megatron sees it on a CPU machine: "cuda" means CPU, all else is the real thing."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CpuCuda()
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _is_cuda(device: object) -> bool:
    return device is not None and str(device).startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return call


def _called_by_megatron() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("megatron.core")


class DeviceRuntime:
    """Where Megatron runs: ``cuda`` when a GPU is there, else ``cpu``.

    Attributes:
        name: ``cuda`` or ``cpu``.
        device: the torch device of this rank.
        backend: the torch.distributed backend, ``nccl`` or ``gloo``.
    """

    def __init__(self) -> None:
        self.on_cuda = torch.cuda.is_available()
        self.name = "cuda" if self.on_cuda else "cpu"
        self.backend = "nccl" if self.on_cuda else "gloo"
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if self.on_cuda else torch.device("cpu")
        self._stand_in = None if self.on_cuda else _CpuTorch()

    def describe(self) -> str:
        """One line for the log: which runtime is in force and why."""
        if self.on_cuda:
            return f"cuda on {torch.cuda.get_device_name(self.device)} over nccl"
        return f"cpu with {torch.get_num_threads()} threads over gloo, because torch finds no CUDA device"

    def init_distributed(self) -> None:
        """Start torch.distributed and Megatron's groups for a world of one process."""
        from megatron.core import parallel_state, tensor_parallel

        if not torch.distributed.is_initialized():
            if self.on_cuda:
                torch.cuda.set_device(self.device)
            torch.distributed.init_process_group(
                self.backend, store=torch.distributed.HashStore(), rank=0, world_size=1
            )
        if not parallel_state.is_initialized():
            with self.megatron():
                parallel_state.initialize_model_parallel()
                tensor_parallel.model_parallel_cuda_manual_seed(1)

    @contextlib.contextmanager
    def megatron(self) -> Iterator[None]:
        """Everything that calls Megatron runs inside this; re-entrant, a no-op on CUDA."""
        if self._stand_in is None:
            yield
            return
        self._give_stand_in()
        plain_cuda, plain_type = torch.Tensor.cuda, torch.Tensor.type

        def cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return tensor if _called_by_megatron() else plain_cuda(tensor, *args, **kwargs)

        def type_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            answer = plain_type(tensor, *args, **kwargs)
            # optimizer.py, distrib_optimizer.py and clip_grads.py compare this string with "torch.cuda.…Tensor".
            if isinstance(answer, str) and _called_by_megatron():
                return answer.replace("torch.", "torch.cuda.", 1)
            return answer

        torch.Tensor.cuda, torch.Tensor.type = cuda, type_  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.Tensor.cuda, torch.Tensor.type = plain_cuda, plain_type  # type: ignore[method-assign]

    def _give_stand_in(self) -> None:
        """Hand the stand-in to every Megatron module loaded so far (more are loaded as more is used)."""
        for name, module in list(sys.modules.items()):
            if name.startswith("megatron.core") and vars(module).get("torch") is torch:
                module.torch = self._stand_in  # type: ignore[attr-defined]
        rng = sys.modules.get("megatron.core.tensor_parallel.random")
        if rng is not None and vars(rng).get("_get_cuda_rng_state") is not _get_rng_state:
            # These reach for torch.cuda's C-level generators, which do not exist without a GPU.
            rng._get_cuda_rng_state = _get_rng_state  # type: ignore[attr-defined]
            rng._set_cuda_rng_state = _set_rng_state  # type: ignore[attr-defined]


def _get_rng_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)
