"""The experts that vLLM routes the tokens of rollouts to.

On GPUs vLLM returns them with every output (``enable_return_routed_experts``). Its runner for CPUs does not
(vllm/config/vllm.py: _verify_aux_output_compatibility), so there ``RoutingRecorder``, inside vLLM's worker, keeps what
the routers of its layers choose, step by step, and ``recorded_routing`` fetches it after the last one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

import torch

from megatron_rlpt.errors import EngineError
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.types import Routing

RECORD, TAKE = "rlpt_record_routing", "rlpt_take_routing"
"""Methods of ``worker.py: WorkerExtension``."""


class RequestRows(TypedDict):
    """Consecutive tokens of one request that were computed in one step."""

    start: int
    """Position of the first."""
    experts: bytes
    """A row of [layers, per token] int16 for each."""


def routing_arguments(*, on_cuda: bool) -> dict[str, Any]:
    """Return the arguments of ``vllm.LLM`` with which it returns the experts itself, where it can."""
    return {"enable_return_routed_experts": True} if on_cuda else {}


def recorded_routing(
    llm: Any, outputs: Sequence[Any], arch: Architecture, *, on_cuda: bool, block: int
) -> list[Routing]:
    """Return the experts of every output of ``llm``, which was told to record them.

    Args:
        llm: a ``vllm.LLM``.
        outputs: all that it generated since its prefix cache was dropped.
        arch: its model, a mixture of experts.
        on_cuda: whether it returns the experts itself.
        block: tokens of a block of its prefix cache.

    Raises:
        EngineError: the experts of a token are missing, or are not those of such a model.
    """
    assert arch.experts is not None
    sequences = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in outputs]
    if on_cuda:
        rows = [_returned(output.outputs[0].routed_experts) for output in outputs]
    else:
        taken: dict[str, list[RequestRows]] = llm.collective_rpc(TAKE)[0]
        size = (arch.layers, arch.experts.per_token)
        computed = [_of_request(taken, str(output.request_id)) for output in outputs]
        rows = _assembled(computed, sequences, size, block)
    found = []
    prefixes: dict[tuple[int, ...], bytes] = {}
    for output, tokens, experts in zip(outputs, sequences, rows, strict=True):
        # The last token is sampled and not computed.
        expected = (len(tokens) - 1, arch.layers, arch.experts.per_token)
        if experts.shape != expected or not 0 <= int(experts.min()) <= int(experts.max()) < arch.experts.count:
            raise EngineError(
                f"vLLM recorded the experts of a rollout as {tuple(experts.shape)} (expected: {expected} numbers below "
                f"{arch.experts.count}); set rollout.router_replay=false"
            )
        width = 1 if arch.experts.count <= 256 else 2
        data = experts.to(torch.uint8 if width == 1 else torch.int16).contiguous().numpy()
        count = len(output.prompt_token_ids)
        # One object for all rollouts of a prefix: it is sent to other ranks once.
        prefix = prefixes.setdefault(tuple(output.prompt_token_ids), data[:count].tobytes())
        found.append(Routing(prefix, data[count:].tobytes(), arch.layers, arch.experts.per_token, width))
    return found


def _returned(experts: Any) -> torch.Tensor:
    """Return vLLM's array of uint8 or uint16 as a tensor; empty if there is none."""
    return torch.zeros(1) if experts is None else torch.from_numpy(experts.astype("int32"))


def _of_request(taken: Mapping[str, list[RequestRows]], request: str) -> list[RequestRows]:
    """Return the rows of a request; vLLM adds random characters to its id (input_processor.py: assign_request_id)."""
    return next((rows for name, rows in taken.items() if request in (name, name.rpartition("-")[0])), [])


def _assembled(
    computed: Sequence[list[RequestRows]], sequences: Sequence[Sequence[int]], size: tuple[int, int], block: int
) -> list[torch.Tensor]:
    """Return the experts of every sequence, [tokens - 1, *size] int16.

    What a request took from vLLM's prefix cache, another one with the same first tokens has computed.
    """
    found: list[torch.Tensor] = []
    for parts, tokens in zip(computed, sequences, strict=True):
        experts = torch.full((len(tokens) - 1, *size), -1, dtype=torch.int16)
        for part in parts:
            rows = torch.frombuffer(bytearray(part["experts"]), dtype=torch.int16).view(-1, *size)
            # A step that was scheduled before the last token was known computes that one too.
            rows = rows[: len(experts) - part["start"]]
            experts[part["start"] : part["start"] + len(rows)] = rows
        found.append(experts)
    blocks: dict[bytes, torch.Tensor] = {}
    for fill in (False, True):
        for experts, tokens in zip(found, sequences, strict=True):
            for start, key in _block_keys(tokens[:-1], block):
                own = experts[start : start + block]
                if int(own.min()) >= 0:
                    blocks.setdefault(key, own)
                elif fill and key in blocks:
                    own.copy_(blocks[key])
    return found


def _block_keys(tokens: Sequence[int], block: int) -> Iterator[tuple[int, bytes]]:
    """Yield the start of every whole block, and what distinguishes it: all tokens up to its end."""
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(tokens) - block + 1, block):
        digest.update(repr(list(tokens[start : start + block])).encode())
        yield start, digest.digest()


class RoutingRecorder:
    """Keeps the experts of all tokens that a model runner of vLLM computes."""

    def __init__(self, model_runner: Any) -> None:
        """Watch the routers of ``model_runner`` and its steps.

        Raises:
            ValueError: the experts are chosen inside a kernel, which shows nobody.
        """
        from vllm.model_executor.layers.fused_moe.layer import MoERunner
        from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

        self._runner = model_runner
        self._step: dict[int, torch.Tensor] = {}
        self._rows: dict[str, list[RequestRows]] = {}
        for module in model_runner.get_model().modules():
            if isinstance(module, MoERunner):
                if module.is_monolithic or not isinstance(module.router, BaseRouter):
                    raise ValueError(
                        "its kernel chooses the experts itself and cannot record them; set rollout.router_replay=false"
                    )
                module.router.set_capture_fn(partial(self._keep, module.layer_id))
        self._execute = model_runner.execute_model
        model_runner.execute_model = self._execute_and_record

    def take(self) -> dict[str, list[RequestRows]]:
        """Return the rows by vLLM's id of the request, and forget them."""
        rows, self._rows = self._rows, {}
        return rows

    def _keep(self, layer: int, experts: torch.Tensor) -> None:
        self._step[layer] = experts.to(torch.int16)

    def _execute_and_record(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self._step = {}
        result = self._execute(scheduler_output, *args, **kwargs)
        if self._step:
            batch, scheduled = self._runner.input_batch, scheduler_output.num_scheduled_tokens
            # [tokens, layers, per token]; requests follow each other in the order of the batch.
            experts = torch.stack([self._step[layer] for layer in sorted(self._step)], dim=1).cpu().numpy()
            first = 0
            for index, request in enumerate(batch.req_ids):
                count = scheduled[request]
                rows = RequestRows(
                    start=int(batch.num_computed_tokens_cpu[index]), experts=experts[first : first + count].tobytes()
                )
                self._rows.setdefault(request, []).append(rows)
                first += count
        return result
