"""Sizes of a teacher of any family, because vLLM serves many models that are not supported as policy. Imports no torch.

The planner needs the number of weights, how many of them process a token, and the size of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlpt.errors import ModelError
from megatron_rlpt.models.architecture import Architecture, Experts, parse_architecture
from megatron_rlpt.models.rope import Rope

_NAMES: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads", "multi_query_group_num"),
    "ffn": ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "d_ff", "hidden_dim"),
    "vocab": ("vocab_size", "padded_vocab_size"),
    "context": ("max_position_embeddings", "n_positions", "seq_length", "max_sequence_length", "max_seq_len"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "per_token": ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts"),
    "expert_ffn": ("moe_intermediate_size", "expert_ffn_hidden_size"),
    "shared": ("n_shared_experts", "num_shared_experts"),
}
"""Size -> its names in Hugging Face configurations."""
_TEXT_PARTS = ("text_config", "llm_config", "language_config")
_UNGATED = {
    *("bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "nemotron", "opt", "phi"),
    "starcoder2",
}
"""Families whose feed-forward layer has two matrices, not three."""
_HEAD_DIM, _VOCABULARY, _CONTEXT = 128, 131072, 32768
"""Assumed if a configuration leaves them to its family's defaults."""


@dataclass(frozen=True)
class TeacherModel:
    """The teacher to plan with."""

    arch: Architecture
    quantized: bool = False
    """Whether its weights take at most one byte each."""
    notes: tuple[str, ...] = ()
    """Assumptions and omissions; empty for a family that is supported as policy."""


def parse_teacher(raw: dict[str, Any], path: Path) -> TeacherModel:
    """Return the teacher that the entries ``raw`` of a ``config.json`` describe; errors name ``path``.

    Raises:
        ModelError: the number of layers or their size is missing or not a number.
    """
    try:
        return TeacherModel(parse_architecture(raw, path))
    except ModelError:
        return _Lenient(raw, path).read()


class _Lenient:
    """A configuration read by its sizes alone, with notes on what was assumed."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self._path = path
        self._notes: list[str] = []
        part = next((name for name in _TEXT_PARTS if isinstance(raw.get(name), dict)), None)
        self._raw: dict[str, Any] = raw | raw[part] if part else raw
        if part:
            self._notes.append("only its text model is counted")

    def read(self) -> TeacherModel:
        raw = self._raw
        layers, hidden = self._required("layers"), self._required("hidden")
        heads = self._size("heads", max(1, hidden // _HEAD_DIM))
        kv_heads = 1 if raw.get("multi_query") else self._number("kv_heads") or heads
        head_dim = self._named("head_dim") or max(1, hidden // heads)
        if rank := self._named("kv_lora_rank"):
            # All heads read one latent vector per token; half of it counts as key, half as value.
            kv_heads, head_dim = 1, (rank + (self._named("qk_rope_head_dim") or 0)) // 2
            self._notes.append("its attention is latent: the cache is exact, the attention weights are approximate")
        if raw.get("sliding_window") and raw.get("use_sliding_window", True):
            self._notes.append("sliding-window layers count like full attention")
        ffn = self._size("ffn", 4 * hidden)
        if str(raw.get("model_type")) in _UNGATED:
            ffn = max(1, 2 * ffn // 3)
        quantization = raw.get("quantization_config") or raw.get("compression_config")
        if quantization:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
            self._notes.append(f"its weights are quantized ({method}) and count as one byte each")
        arch = Architecture(
            model_type=str(raw.get("model_type")),
            layers=layers,
            hidden=hidden,
            ffn_hidden=ffn,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=self._size("vocab", _VOCABULARY),
            max_positions=self._size("context", _CONTEXT),
            norm_eps=1e-6,
            rope=Rope(1e4),
            tied_embeddings=bool(raw.get("tie_word_embeddings", str(raw.get("model_type")).startswith("gemma"))),
            init_std=0.02,
            experts=self._experts(layers, ffn),
        )
        kind = f"the teacher is planned by its sizes alone: {arch.model_type} is not a family supported as policy"
        return TeacherModel(arch, bool(quantization), ("; ".join([kind, *self._notes]),))

    def _experts(self, layers: int, ffn: int) -> Experts | None:
        """Return the experts per layer of a model with the same weights and equal layers.

        Dense layers and shared experts count as experts of the same size.
        """
        raw = self._raw
        count = self._number("experts")
        if not count or count == 1:
            return None
        per_token = self._size("per_token", 2)
        inner = self._number("expert_ffn") or ffn
        shared = float(self._number("shared") or 0)
        if wide := self._named("shared_expert_intermediate_size"):
            shared = wide / inner
        if str(raw.get("model_type")).startswith("llama4"):
            shared = 1.0
        first = self._named("first_k_dense_replace") or 0
        step = self._named("interleave_moe_layer_step") or self._named("decoder_sparse_step") or 1
        only = raw.get("mlp_only_layers") or []
        sparse = sum(layer >= first and (layer + 1) % step == 0 and layer not in only for layer in range(layers))
        dense = (layers - sparse) * (self._named("intermediate_size_mlp") or ffn) / inner
        stored = max(1, round((sparse * (count + shared) + dense) / layers))
        active = max(1, round((sparse * (per_token + shared) + dense) / layers))
        if sparse < layers or shared:
            self._notes.append("dense layers and shared experts count as experts of the same size")
        return Experts(count=stored, per_token=min(active, stored), ffn_hidden=inner, normalized=True)

    def _required(self, size: str) -> int:
        found = self._number(size)
        if found is None:
            raise ModelError(
                f"{self._path} has none of {', '.join(_NAMES[size])}; give the config.json of a language model"
            )
        return found

    def _size(self, size: str, assumed: int) -> int:
        found = self._number(size)
        if found is None:
            self._notes.append(f"{_NAMES[size][0]} is missing and assumed to be {assumed}")
        return assumed if found is None else found

    def _number(self, size: str) -> int | None:
        return next((value for name in _NAMES[size] if (value := self._named(name)) is not None), None)

    def _named(self, name: str) -> int | None:
        """Return the positive integer of an entry; None if it is missing, null or 0."""
        value = self._raw.get(name)
        if not value:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < 2**40 or value % 1:
            raise ModelError(f"{self._path}: {name} is {value!r}; it must be a whole number above 0")
        return int(value)
