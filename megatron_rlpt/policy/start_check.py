"""Start check: the loaded policy must compute what ``transformers`` computes from the same folder.

A misread configuration trains without an error. So before the first step random tokens go through the policy, the
inputs and outputs of its layers are recorded, and ``transformers``' layers get the same inputs. Each layer is compared
separately, which bounds memory, works in every layout and keeps rounding errors from accumulating. Rotary frequencies
are compared directly, because short sequences do not distinguish some of them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_rlpt.config import Dtype, Fp8
from megatron_rlpt.errors import ModelError
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.policy.layers import whole_sequence
from megatron_rlpt.policy.layout import Layout
from megatron_rlpt.policy.model import HiddenStateModel
from megatron_rlpt.policy.precision import torch_dtype_of
from megatron_rlpt.policy.transformers_layers import TransformersLayers, is_small, logprobs_after, run_layer

TOKENS = 32
"""Maximum length of the probe."""
SAMPLED = 3
"""Layers compared per pipeline stage in a model that is too large to load whole."""
FREQUENCY_TOLERANCE = 1e-5
"""Largest relative difference of a rotary frequency; fp32 powers differ by 1e-6."""


@dataclass(frozen=True)
class Tolerance:
    """Largest differences that rounding may cause between policy and ``transformers``."""

    layer: float
    """Mean over tokens of the distance of a layer's outputs, relative to the update of the residual stream."""
    logprob: float
    """Mean difference of a token's log-probability for the same hidden states, relative to the spread of logits."""
    rounding: float
    """Relative rounding error of one number, which the sum of input and output also has."""


TOLERANCES = {
    torch.float32: Tolerance(1e-3, 1e-3, 2.0**-22),
    torch.bfloat16: Tolerance(5e-2, 5e-2, 2.0**-8),
}
FP8_TOLERANCE = Tolerance(0.25, 5e-2, 2.0**-8)
"""E4M3 has 3 bits of fraction; the output layer stays in bf16."""


@dataclass
class RecordedActivations:
    """The probe's activations on this rank: shares of [tokens, batch, hidden] by layer number."""

    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    final: torch.Tensor | None = None
    """Input of the final norm; on its stage only."""


def probe_tokens(vocab: int, longest: int) -> tuple[int, ...]:
    """Return the tokens of the probe, the same on every rank."""
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randint(vocab, (max(2, min(TOKENS, longest)),), generator=draw).tolist())


@contextlib.contextmanager
def recording(model_chunks: Sequence[HiddenStateModel], numbers: Sequence[int]) -> Iterator[RecordedActivations]:
    """Record inputs and outputs of the layers ``numbers`` for the first micro-batch inside the block."""
    recorded, hooks = RecordedActivations(), []

    def enter(number: int) -> Callable[..., None]:
        def hook(_: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = named["hidden_states"] if "hidden_states" in named else arguments[0]
            recorded.inputs.setdefault(number, hidden.detach().clone())

        return hook

    def leave(number: int) -> Callable[..., None]:
        def hook(_: torch.nn.Module, __: object, result: Any) -> None:
            recorded.outputs.setdefault(number, (result[0] if isinstance(result, tuple) else result).detach().clone())

        return hook

    def finish(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        recorded.final = arguments[0].detach().clone() if recorded.final is None else recorded.final

    for model_chunk in model_chunks:
        for layer in model_chunk.decoder.layers:
            if (number := layer.layer_number - 1) in numbers:
                hooks += [
                    layer.register_forward_pre_hook(enter(number), with_kwargs=True),
                    layer.register_forward_hook(leave(number)),
                ]
        if model_chunk.decoder.final_layernorm is not None:
            hooks.append(model_chunk.decoder.final_layernorm.register_forward_pre_hook(finish))
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


class StartCheck:
    """The comparison of one loaded policy; every rank creates one.

    Attributes:
        layers: numbers, in the whole model, of this rank's layers that are compared.
    """

    def __init__(
        self,
        folder: Path,
        arch: Architecture,
        layout: Layout,
        model_chunks: Sequence[HiddenStateModel],
        *,
        dtype: Dtype,
        fp8: Fp8,
        longest: int,
    ) -> None:
        """Choose the layers.

        Args:
            folder: where the policy was loaded from.
            arch: its architecture.
            layout: the training layout.
            model_chunks: this rank's model_chunks, with the weights of ``folder``.
            dtype: precision of the weights.
            fp8: FP8 recipe of the layers.
            longest: length of the longest sequence of the run.
        """
        self._folder, self._arch, self._layout, self._model_chunks = folder, arch, layout, model_chunks
        self._longest = longest
        self._dtype = torch_dtype_of(dtype)
        self._tolerance = TOLERANCES[self._dtype] if fp8 is Fp8.off else FP8_TOLERANCE
        if arch.experts:  # a token near the boundary may be routed to another expert
            self._tolerance = replace(self._tolerance, layer=2 * self._tolerance.layer)
        self._compares = (
            parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_context_parallel_rank() == 0
            and parallel_state.get_data_parallel_rank() == 0
        )
        own = [layer.layer_number - 1 for model_chunk in model_chunks for layer in model_chunk.decoder.layers]
        self.layers = own if arch.layers <= SAMPLED or is_small(arch) else spread(own, SAMPLED)

    def compare(self, recorded: RecordedActivations, tokens: Sequence[int], logprobs: torch.Tensor) -> str | None:
        """Compare the recorded activations; a collective.

        Args:
            recorded: what ``recording`` recorded of a pass over ``tokens``.
            tokens: the probe.
            logprobs: the policy's log-probabilities of every token but the first.

        Returns:
            A summary in one line; None on a rank that compares nothing.

        Raises:
            ModelError: transformers cannot load the folder, or differs from the policy; names the first difference.
        """
        began = time.monotonic()
        for parts in (recorded.inputs, recorded.outputs):
            for number in sorted(parts):
                parts[number] = self._whole(parts[number])[: len(tokens)]
        final = None if recorded.final is None else self._whole(recorded.final)[: len(tokens)]
        if not self._compares:
            return None
        # Only now: a failure must not leave other ranks waiting in the collectives above.
        self._transformers = TransformersLayers(self._folder, self._arch, self._dtype)
        found = torch.tensor(tokens)
        worst = 0.0
        if self.layers[0] == 0:
            self._compare_embedding(recorded.inputs[0], found)
        for number in self.layers:
            worst = max(worst, self._compare_layer(number, recorded.inputs[number], recorded.outputs[number]))
        text = f"{len(self.layers)} layers differ by at most {worst:.1e} (allowed {self._tolerance.layer:g})"
        if final is not None:
            gap = self._compare_head(final, found, logprobs.cpu())
            text += f", log-probabilities by {gap:.1e} (allowed {self._tolerance.logprob:g})"
        return f"start check: the policy agrees with transformers: {text}; took {time.monotonic() - began:.1f} s"

    def _compare_embedding(self, actual: torch.Tensor, tokens: torch.Tensor) -> None:
        expected = self._transformers.ends.model.embed_tokens(tokens)
        if not torch.equal(actual.float().cpu(), expected):
            raise self._differs("the token embedding differs")

    def _compare_layer(self, number: int, entered: torch.Tensor, left: torch.Tensor) -> float:
        """Compare one layer and return the mean relative distance over tokens."""
        layer, rotary = self._transformers.layer(number)
        self._compare_settings(number, layer, rotary)
        expected, actual, before = run_layer(layer, rotary, entered), left.float().cpu(), entered.float().cpu()
        scale = (expected - before).norm(dim=-1)
        distance = ((actual - expected).norm(dim=-1) - self._tolerance.rounding * expected.norm(dim=-1)).clamp(min=0)
        error = float((distance / scale).nan_to_num(nan=0.0 if bool((distance == 0).all()) else torch.inf).mean())
        if not error <= self._tolerance.layer:
            raise self._differs(
                f"the output of layer {number} is off by {error:.1%} (allowed {self._tolerance.layer:.1%})"
            )
        return error

    def _compare_settings(self, number: int, layer: Any, rotary: Any) -> None:
        """Compare settings that a short probe does not show: frequencies, window, and the norms' epsilon."""
        model_chunk = self._model_chunks[0]
        actual, expected = model_chunk.rotary_pos_emb.inv_freq.cpu(), rotary.inv_freq.cpu()
        off = float((actual / expected - 1).abs().max()) if actual.shape == expected.shape else torch.inf
        if not off <= FREQUENCY_TOLERANCE:
            raise self._differs(f"rotary frequencies are off by up to {off:.1%} (read: {self._arch.rope.parameters})")
        scale = model_chunk.config.softmax_scale or self._arch.head_dim**-0.5
        wanted = layer.self_attn.scaling * rotary.attention_scaling**2
        if abs(scale / wanted - 1) > FREQUENCY_TOLERANCE:
            raise self._differs(f"attention is scaled by {scale:.6g}, not {wanted:.6g}")
        epsilon = layer.input_layernorm.variance_epsilon
        if abs(model_chunk.config.layernorm_epsilon / epsilon - 1) > FREQUENCY_TOLERANCE:
            raise self._differs(f"rms_norm_eps is {model_chunk.config.layernorm_epsilon:g}, not {epsilon:g}")
        config = layer.self_attn.config
        # Set on the layer, or for families with one window for all layers, on the class of the configuration.
        common = config.sliding_window if hasattr(type(config), "sliding_window") else None
        window = getattr(layer.self_attn, "sliding_window", common)
        if window is not None and window < self._longest:
            raise self._differs(
                f"layer {number} sees {window} tokens back, and sequences of the run have up to {self._longest}"
            )

    def _compare_head(self, hidden: torch.Tensor, tokens: torch.Tensor, actual: torch.Tensor) -> float:
        """Compare log-probabilities and return the mean difference, relative to the spread of logits."""
        expected, deviation = logprobs_after(self._transformers.ends, hidden, tokens)
        gap = float((expected - actual).abs().mean()) / deviation
        if not gap <= self._tolerance.logprob:
            raise self._differs(
                f"log-probabilities for the same last hidden states are off by {gap:.1%} of the spread of logits "
                f"(allowed {self._tolerance.logprob:.1%}): the last norm or the output layer differs"
            )
        return gap

    def _whole(self, part: torch.Tensor) -> torch.Tensor:
        """Gather the whole sequence, [tokens, hidden], from the shares of this rank and its group."""
        if self._layout.sequence:
            part = gather_from_sequence_parallel_region(part)
        if self._layout.context > 1:
            part = whole_sequence(part, parallel_state.get_context_parallel_group(), self._layout.context)
        return part[:, 0]

    def _differs(self, what: str) -> ModelError:
        return ModelError(
            f"the policy loaded from {self._folder} does not compute what transformers computes from it: {what}; "
            "compare its config.json with the original and do not train it like this"
        )


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """Return ``count`` evenly spaced ``numbers``, including the first and the last; all if there are fewer."""
    if len(numbers) <= count:
        return list(numbers)
    return sorted({numbers[round(index * (len(numbers) - 1) / (count - 1))] for index in range(count)})
