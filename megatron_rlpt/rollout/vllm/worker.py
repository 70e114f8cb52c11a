"""Methods that run inside vLLM's worker, called by name through ``LLM.collective_rpc``.

vLLM mixes ``WorkerExtension`` into its worker class (``worker_extension_cls``, vllm/v1/worker/worker_base.py), so
``self`` is the worker. All method names start with ``rlpt_`` so that they cannot clash with the worker's.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Iterator
from typing import Any, TypedDict

import torch

from megatron_rlpt.rollout.vllm.amx import MayUseAmx
from megatron_rlpt.rollout.vllm.process import exit_with_parent, ignore_stop_signals
from megatron_rlpt.rollout.vllm.routing import RequestRows, RoutingRecorder

EXTENSION = f"{__name__}.WorkerExtension"
"""Value of vLLM's ``worker_extension_cls``."""
_ROWS = 1024
"""Rows of the identity matrix multiplied with a packed matrix at a time."""


class BucketFile(TypedDict):
    """One file of concatenated weights."""

    path: str
    tensors: list[tuple[str, str, list[int]]]
    """(Hugging Face name, torch dtype name, shape), in the order of the bytes."""


class WorkerExtension(MayUseAmx):
    """The methods that ``collective_rpc`` calls on every worker."""

    model_runner: Any
    rlpt_routing: RoutingRecorder | None = None

    def rlpt_load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> str | None:
        """Replace all weights, and repack on CPU what ``reload_weights`` does not.

        Returns:
            Name of the first weight that the model's loader did not take; None if it took them all.
        """
        stream = iter(weights)
        self.reload_weights(weights_iterator=stream)  # type: ignore[attr-defined]
        left, _ = next(stream, (None, None))
        if not torch.cuda.is_available():
            self.rlpt_repack_tied_head()
            self.rlpt_repack_experts()
        return left

    def rlpt_load_buckets(self, buckets: list[BucketFile]) -> str | None:
        """Call ``rlpt_load`` on bucket files, one in memory at a time."""
        return self.rlpt_load(_read_buckets(buckets))

    def rlpt_repack_tied_head(self) -> None:
        """Repack a tied output layer from the embedding's current values.

        ``reload_weights`` repacks a layer when weights are loaded into it. A tied output layer gets no weights, so on
        CPU, where the matrix product reads a packed copy, it would silently keep the old values.
        """
        model = self.model_runner.get_model()
        head, embedding = model.lm_head, model.model.embed_tokens
        if head.weight is embedding.weight:
            head.quant_method.process_weights_after_loading(head)

    def rlpt_repack_experts(self) -> None:
        """Pack the weights of a mixture of experts for the CPU kernel.

        vLLM packs them only at the first load (unquantized_fused_moe_method.py: _setup_kernel); after a reload the
        kernel would read plain weights as packed ones. A vLLM that repacks them itself would fail the start-up check.
        """
        for layer in self.model_runner.get_model().modules():
            kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
            if kernel is not None:
                kernel.fused_experts.process_weights_after_loading(layer)

    def rlpt_update_pickled(self, update: bytes) -> None:
        """Call ``update_weights`` of vLLM's worker with a payload of CUDA handles, which vLLM cannot encode.

        The bytes come from the trainer that started this process, over the same socket as every other call.
        """
        self.update_weights(pickle.loads(update))  # type: ignore[attr-defined]

    def rlpt_weight_digests(self) -> dict[str, str]:
        """Return the SHA-256 of every weight by vLLM's names.

        A matrix that exists only in the packed form of a CPU kernel is read by multiplying it with the identity: the
        product is exact, because all other terms of each sum are zero.
        """
        model = self.model_runner.get_model()
        digests = {name: _digest([value]) for name, value in model.named_parameters() if value.numel()}
        for name, layer in model.named_modules():
            width = layer.embedding_dim if name == "lm_head" else getattr(layer, "input_size_per_partition", None)
            if width is not None and hasattr(layer, "cpu_linear"):
                digests[f"{name}.weight"] = _digest(_through(layer, width, self.model_runner.dtype))
        return digests

    def rlpt_buffer_digests(self) -> dict[str, str]:
        """Return the SHA-256 of every buffer, such as rotary tables and cache scales."""
        return {name: _digest([value]) for name, value in self.model_runner.get_model().named_buffers()}

    def rlpt_kernels(self) -> str:
        """Return which attention kernels vLLM selected, and in which way it launches kernels."""
        config = self.model_runner.vllm_config.compilation_config
        layers = config.static_forward_context.values()
        names = {layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")}
        return f"attention={'+'.join(sorted(names))} graphs={config.cudagraph_mode.name}"

    def rlpt_zero_cache(self) -> None:
        """Zero the key-value cache: memory that was just mapped again may hold any values.

        Kernels multiply masked slots by a weight of 0, and 0 times NaN is NaN (seen on CPU: after one bad batch every
        later one was bad).
        """
        for cache in self.model_runner.kv_caches:
            cache.zero_()

    def rlpt_record_routing(self) -> None:
        """Keep the experts of all tokens from now on."""
        self.rlpt_routing = RoutingRecorder(self.model_runner)

    def rlpt_take_routing(self) -> dict[str, list[RequestRows]]:
        """Return the experts by request, and forget them."""
        assert self.rlpt_routing is not None
        return self.rlpt_routing.take()

    def rlpt_exit_with(self, trainer: int | None) -> None:
        """Exit when the parent process ``trainer`` exits, and ignore stop signals; called in the main thread.

        Args:
            trainer: None for one of several workers, whose parent is the engine's process (``executor.py``).
        """
        ignore_stop_signals()
        if trainer is not None:
            exit_with_parent(trainer)


def bytes_of(tensor: torch.Tensor) -> Any:
    """Return the bytes of ``tensor`` as an object with Python's buffer protocol."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _read_buckets(buckets: list[BucketFile]) -> Iterator[tuple[str, torch.Tensor]]:
    for bucket in buckets:
        with open(bucket["path"], "rb") as file:
            data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
        start = 0
        for name, dtype_name, shape in bucket["tensors"]:
            dtype = getattr(torch, dtype_name)
            size = torch.Size(shape).numel() * dtype.itemsize
            yield name, data[start : start + size].view(dtype).view(shape)
            start += size


def _through(layer: Any, width: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    for start in range(0, width, _ROWS):
        rows = torch.zeros(min(_ROWS, width - start), width, dtype=dtype)
        rows[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = 1
        yield layer.cpu_linear(rows, layer.weight, None)


@torch.inference_mode()
def _digest(parts: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(bytes_of(part))
    return digest.hexdigest()
