"""Verification of a conversion: every tensor bit for bit, then the logits of both models.

Equal tensors show that nothing was lost. Equal logits, computed by ``transformers`` on one side and by Megatron on the
other, show that the mapping itself (order of heads, gate and up, rotation, norms) is right.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_rlpt.convert.formats import Input
from megatron_rlpt.convert.megatron_keys import VOCABULARY
from megatron_rlpt.convert.megatron_reader import MegatronSource
from megatron_rlpt.convert.source import CheckpointSource, lone_file
from megatron_rlpt.errors import ModelError
from megatron_rlpt.models.families import expected_shapes, mapping
from megatron_rlpt.plain_text import shortened
from megatron_rlpt.policy.layout import Layout

_ROWS = 2
_LENGTH = 64
"""Maximum number of random tokens per row."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest allowed difference of a logit, relative to the largest logit. The first covers rounding in fp32 and applies
if weights kept their values; the others apply if weights were rounded to that precision."""


def verify(
    found: Input,
    source: CheckpointSource,
    made: Input,
    written: CheckpointSource,
    dtype: torch.dtype | None,
    say: Callable[[str], None],
) -> None:
    """Compare a conversion's result with its source.

    Logits are always computed in fp32, one model after the other, which needs memory for one model in fp32.

    Args:
        found: the recognized source.
        source: the opened source.
        made: the recognized result.
        written: the opened result.
        dtype: the requested precision of the result, if any.
        say: called with the findings, by line.

    Raises:
        ModelError: they differ by more than rounding to ``dtype`` explains.
    """
    rounded = _compare_tensors(source, written, dtype)
    arch = source.arch
    count = len(expected_shapes(arch))
    say(
        f"verify: {count} tensors of {made.path} "
        + ("equal the source bit for bit" if not rounded else f"are the source's rounded to {dtype}")
    )
    weights = sum(torch.Size(shape).numel() for shape in expected_shapes(arch).values())
    say(f"verify: computing logits in fp32, which needs about {weights * 4 / 2**30:.1f} GiB of memory")
    tokens = torch.randint(
        arch.vocab, (_ROWS, min(_LENGTH, arch.max_positions)), generator=torch.Generator().manual_seed(0)
    )
    expected = _logits(found, source, tokens, own=False)
    actual = _logits(made, written, tokens, own=True)
    difference = float((expected - actual).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    agreement = float((expected.argmax(-1) == actual.argmax(-1)).float().mean())
    allowed = TOLERANCE[dtype if rounded and dtype is not None else torch.float32] * scale
    line = (
        f"logits differ by at most {difference:.2e} (allowed {allowed:.2e}, largest logit {scale:.1f}), "
        f"argmax equal at {agreement:.1%} of {tokens.numel()} positions"
    )
    if not difference <= allowed:  # NaN fails
        raise ModelError(f"{made.path} is not the model in {found.path}: {line}")
    say(f"verify: {line}")


def _compare_tensors(source: CheckpointSource, written: CheckpointSource, dtype: torch.dtype | None) -> bool:
    """Return True if rounding to ``dtype`` changed any value; raise for any other difference."""
    rounded = False
    for rule in mapping(source.arch):
        for name, before, after in zip(rule.hf, source.read(rule), written.read(rule), strict=True):
            expected = before.to(dtype or before.dtype)
            if expected.dtype != after.dtype or not torch.equal(expected, after):
                raise ModelError(f"{written.path}: {name} differs from {source.path}; convert again")
            rounded = rounded or not torch.equal(expected.to(before.dtype), before)
    return rounded


def _logits(found: Input, source: CheckpointSource, tokens: torch.Tensor, own: bool) -> torch.Tensor:
    """Return logits [rows, length, vocabulary] in fp32; ``own`` says that this process wrote the checkpoint."""
    try:
        if isinstance(source, MegatronSource):
            return _megatron_logits(source, own, tokens)
        return _transformers_logits(found.path, tokens)
    finally:
        gc.collect()


def _transformers_logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"gguf_file": path.name} if path.is_file() else {"use_safetensors": True}
    try:
        with lone_file(path) if path.is_file() else contextlib.nullcontext(path) as folder:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                **options,
            )
    except Exception as error:  # its configuration checks raise many types
        raise ModelError(f"transformers cannot load {path}: {shortened(str(error))}") from error
    with torch.no_grad():
        return model.eval()(tokens).logits.float()


def _megatron_logits(source: MegatronSource, own: bool, tokens: torch.Tensor) -> torch.Tensor:
    from megatron_rlpt.config import Dtype
    from megatron_rlpt.policy.device_runtime import DeviceRuntime

    runtime = DeviceRuntime()
    runtime.init_distributed()
    from megatron.core import dist_checkpointing

    from megatron_rlpt.policy.model import build_model
    from megatron_rlpt.policy.weights import named_parameters

    arch = source.arch
    (model,) = build_model(arch, Dtype.fp32, runtime)
    with runtime.megatron(), torch.no_grad():
        if own:
            # Read it as Megatron does. Under a separate key, because other state of the checkpoint is loaded too.
            state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(source.path))
            model.load_state_dict(state["model"])
        else:
            # Megatron would require the keys of this model's layers and unpickle what is stored there. Read it tensor
            # by tensor: the order of heads, gate and up is as stored, so the mapping is not used.
            parameters = named_parameters([model], arch, Layout())
            for rule in mapping(arch):
                parameters[rule.megatron][: arch.vocab if rule.megatron in VOCABULARY else None].copy_(
                    source.merged(rule)
                )
        tokens = tokens.to(runtime.device)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
        hidden = model.eval()(tokens, positions, None)
        return (hidden @ model.output_weight()[: arch.vocab].t()).cpu()
