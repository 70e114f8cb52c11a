"""Device runtime: the same Megatron-Core code on CUDA and on a CPU over gloo.

Megatron-Core hard-codes ``torch.cuda`` and ``device="cuda"``. Without CUDA this module replaces the name ``torch`` in
the modules of ``megatron.core``, and only there, by a proxy that maps "cuda" to the CPU. ``torch`` itself is not
patched: that breaks other libraries in the process (transformers then leaves rotary buffers uninitialized). Two tensor
methods that Megatron calls, ``Tensor.cuda`` and ``Tensor.type``, cannot be replaced in a module's globals; inside
``DeviceRuntime.megatron()`` they are swapped for versions that differ only when the caller is a Megatron module.

With CUDA nothing is replaced. In both cases, fixes for the installed Megatron-Core release (``megatron_compat.py``) are
applied when its modules are imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import socket
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch

from megatron_rlpt.distributed.processes import allow_open_files
from megatron_rlpt.distributed.ranks import (
    LauncherEnvironment,
    Ranks,
    contact_kept,
    ranks_on_this_machine,
    read_launcher_environment,
)
from megatron_rlpt.errors import ConfigError, TrainingError, first_line
from megatron_rlpt.policy import megatron_compat as compat
from megatron_rlpt.policy.layout import Layout

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "eye", "as_tensor",
              "empty_like", "zeros_like", "ones_like", "full_like")  # fmt: skip


class _CpuStream:
    """``torch.cuda.Stream`` on a CPU: operations run when they are called, in order."""

    def wait_event(self, event: object) -> None:
        """Do nothing."""

    def wait_stream(self, stream: object) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""


class _CpuEvent:
    """``torch.cuda.Event`` on a CPU, where operations run when they are called."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._seconds = 0.0

    def record(self, stream: object = None) -> None:
        self._seconds = time.perf_counter()

    def synchronize(self) -> None:
        """Do nothing."""

    def elapsed_time(self, end: _CpuEvent) -> float:
        """Return milliseconds from this event to ``end``."""
        return (end._seconds - self._seconds) * 1e3


class _CpuCuda(types.ModuleType):
    """``torch.cuda`` as Megatron sees it without CUDA."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.Stream = _CpuStream
        self.Event = _CpuEvent

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def current_stream(device: object = None) -> _CpuStream:
        # 0.19, distributed/param_and_grad_buffer.py: every gradient reduction waits on the current stream.
        return _CpuStream()

    @staticmethod
    def synchronize(device: object = None) -> None:
        """Do nothing: CPU operations return when they are done."""

    @staticmethod
    def empty_cache() -> None:
        """Do nothing: there is no cache."""

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
    """``torch`` as Megatron sees it without CUDA: "cuda" means CPU, everything else is ``torch``."""

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
        kwargs.pop("pin_memory", None)  # an error without a GPU
        return factory(*args, **kwargs)

    return call


def _called_by_megatron() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("megatron.core")


def _is_megatron(name: str) -> bool:
    return name == "megatron.core" or name.startswith("megatron.core.")


class _MegatronHook(compat.ImportHook):
    """Adapts Megatron modules when they are imported.

    Megatron imports parts of itself inside functions (such as checkpoint strategies), so adapting the modules that are
    loaded at one time is not enough.
    """

    def __init__(self, proxy: types.ModuleType | None) -> None:
        super().__init__(_is_megatron, lambda module: _adapt(module, proxy))


def _adapt(module: types.ModuleType, proxy: types.ModuleType | None) -> None:
    compat.adapt(module)
    if proxy is None:
        return
    if vars(module).get("torch") is torch:
        module.torch = proxy  # type: ignore[attr-defined]
    compat.adapt_to_cpu(module)


def _install(on_cuda: bool) -> None:
    """Adapt loaded Megatron modules and install the import hook, once per process."""
    if any(isinstance(finder, _MegatronHook) for finder in sys.meta_path):
        return
    proxy = None if on_cuda else _CpuTorch()
    sys.meta_path.insert(0, _MegatronHook(proxy))
    for name, module in list(sys.modules.items()):
        if _is_megatron(name):
            _adapt(module, proxy)


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the kernel after every large tensor.

    An update allocates and frees gigabytes of activations; page faults would cost more than a tenth of the step. Does
    nothing without glibc. ``return_freed_memory`` is called now and then instead.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _require_gpus(ranks: int, gpus: int) -> None:
    """Refuse more ranks on this machine than GPUs.

    Raises:
        ConfigError: names both numbers.
    """
    if ranks > gpus:
        raise ConfigError(
            f"{ranks} ranks were started on {socket.gethostname()}, which has {gpus} GPUs, and every rank needs one; "
            f"start {gpus} (torchrun --nproc-per-node, srun --ntasks-per-node)"
        )


def _require_own_gpus(gpus: Sequence[tuple[str, str]]) -> None:
    """Refuse ranks that share a GPU.

    Args:
        gpus: (machine, UUID) of the GPU of every rank.

    Raises:
        ConfigError: names the first two.
    """
    for rank, gpu in enumerate(gpus):
        if (first := gpus.index(gpu)) < rank:
            raise ConfigError(
                f"ranks {first} and {rank} have the same GPU of {gpu[0]}, and every rank needs its own; start "
                "as many ranks on a machine as it has GPUs (torchrun --nproc-per-node, srun --ntasks-per-node)"
            )


class DeviceRuntime:
    """The device and process groups of Megatron: ``cuda`` with a GPU, else ``cpu``. Groups exist once per process.

    Attributes:
        name: ``cuda`` or ``cpu``.
        device: the torch device of this rank.
        backend: the torch.distributed backend, ``nccl`` or ``gloo``.
    """

    is_deterministic: ClassVar[bool] = False
    """Whether every operation gives the same bits again, also on GPUs."""
    _layout: ClassVar[Layout | None] = None
    _ranks: ClassVar[Ranks | None] = None

    def __init__(self, launcher: LauncherEnvironment | None = None) -> None:
        """Set up the device of this process; ``launcher`` defaults to the launcher's environment variables.

        Sets the current GPU of this process to this rank's.

        Raises:
            ConfigError: this machine has more ranks than GPUs.
            RlptError: the installed Megatron-Core is not supported.
        """
        self._launcher = launcher or read_launcher_environment()
        if self._launcher.world > 1:
            # Read when CUDA starts. One queue keeps communication between computations in launch order; Megatron warns
            # without it (tensor_parallel/layers.py).
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
            # Every gloo group otherwise connects all pairs of its ranks when it is created, though most groups carry
            # messages between few of them or none: open files would run out near 150 data-parallel ranks.
            os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
            allow_open_files()
        self.on_cuda = torch.cuda.is_available()
        self.name = "cuda" if self.on_cuda else "cpu"
        self.backend = "nccl" if self.on_cuda else "gloo"
        # With a launcher that shows every rank only its own GPU (srun --gpus-per-task=1), each GPU has index 0;
        # init_distributed checks that they differ.
        gpus = torch.cuda.device_count()
        number = self._launcher.local_rank if gpus > 1 else 0
        if gpus > 1:
            _require_gpus(max(number + 1, ranks_on_this_machine() or 1), gpus)
        self.device = torch.device("cuda", number) if self.on_cuda else torch.device("cpu")
        if self.on_cuda:
            torch.cuda.set_device(self.device)
        compat.require_supported()
        _install(self.on_cuda)
        if not self.on_cuda:
            _keep_freed_memory()

    def return_freed_memory(self) -> None:
        """Return to the kernel what a CPU's heap holds and nobody uses; does nothing on a GPU or without glibc.

        Batches of ever other shapes leave holes, and a heap that is never returned grows by them.
        """
        if self.on_cuda:
            return
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)

    def make_deterministic(self) -> None:
        """Use only GPU operations that give the same bits again; call it before the first. A CPU's always do.

        An operation that has no such form then raises an error that names it.
        """
        if not self.on_cuda:
            return
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # asked for by torch's notes on reproducibility
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"  # Transformer Engine's attention
        # Measurements must not decide in which order ranks are summed.
        os.environ.setdefault("NCCL_ALGO", "Ring")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        DeviceRuntime.is_deterministic = True

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return self._launcher.rank

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self._launcher.world

    def describe(self) -> str:
        """Describe in one line which runtime is used and why."""
        if self.on_cuda:
            return f"cuda on {torch.cuda.get_device_name(self.device)} over nccl"
        return f"cpu with {torch.get_num_threads()} threads over gloo, because torch finds no CUDA device"

    def init_distributed(self, layout: Layout | None = None, timeout: float = 1800.0) -> Ranks:
        """Initialize torch.distributed and Megatron's groups for ``layout``; a collective over all ranks.

        A world of one opens no port. Calling it again with the same layout does nothing.

        Args:
            layout: the training layout; None for a world of one.
            timeout: seconds after which a collective that some rank did not join fails.

        Raises:
            ConfigError: ranks share a GPU.
            TrainingError: the ranks did not connect in time, or one has ended.
        """
        from megatron.core import parallel_state, tensor_parallel

        layout = layout or Layout()
        launcher, limit = self._launcher, datetime.timedelta(seconds=timeout)
        if not torch.distributed.is_initialized():
            try:
                where: dict[str, Any] = (
                    {"store": torch.distributed.HashStore()}
                    if launcher.world == 1
                    else {"init_method": f"tcp://{launcher.address}:{launcher.port}"}
                )
                torch.distributed.init_process_group(
                    self.backend, rank=launcher.rank, world_size=launcher.world, timeout=limit, **where
                )
            except (RuntimeError, ValueError) as error:  # including DistNetworkError and DistStoreError
                raise TrainingError(
                    f"rank {launcher.rank} of {launcher.world} could not reach the others at "
                    f"{launcher.address}:{launcher.port} within {timeout:g} s ({first_line(error)}); look at the "
                    "logs of the other ranks"
                ) from error
        if parallel_state.is_initialized():
            assert layout == self._layout, f"the groups are those of {self._layout}, not of {layout}"
        else:
            # torch does not wait for all ranks after creating a group; a rank that ends now would break it for the
            # rest.
            with contact_kept(), self.megatron():
                parallel_state.initialize_model_parallel(
                    tensor_model_parallel_size=layout.tensor,
                    pipeline_model_parallel_size=layout.pipeline,
                    virtual_pipeline_model_parallel_size=layout.virtual_stages if layout.virtual_stages > 1 else None,
                    context_parallel_size=layout.context,
                    expert_model_parallel_size=layout.expert,
                    # Experts are small: they are distributed whole, not sharded like the dense layers.
                    expert_tensor_parallel_size=1,
                    distributed_timeout_minutes=max(1, round(timeout / 60)),
                )
                tensor_parallel.model_parallel_cuda_manual_seed(1)
            DeviceRuntime._layout = layout
            with contact_kept():
                DeviceRuntime._ranks = ranks = Ranks(launcher.rank, layout if layout.world > 1 else None, timeout)
            if self.on_cuda:
                # NCCL's own error would name neither the ranks nor the fix.
                gpu = str(torch.cuda.get_device_properties(self.device).uuid)
                _require_own_gpus(ranks.all_gather((socket.gethostname(), gpu)))
        assert self._ranks is not None
        return self._ranks

    @contextlib.contextmanager
    def megatron(self) -> Iterator[None]:
        """Context for all calls to Megatron; re-entrant, a no-op on CUDA."""
        if self.on_cuda:
            yield
            return
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
