"""Bytes that the forward pass saves for the backward pass, tensor by tensor.

Counted for both kinds of layers that ``policy/layers.py`` builds. For Megatron's layers with torch's kernels (CPU)
every term was read off the tensors that autograd saves. For Transformer Engine's (GPU) it follows from what its modules
save (``layernorm_linear.py``, ``linear.py``; ``megatron/core/fusions/fused_bias_swiglu.py``) and is not measured.
Neither saves attention scores: both attention kernels recompute them.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlpt.config import Recompute
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.policy.layout import Layout

FLOAT = 4
"""Bytes of fp32."""


@dataclass(frozen=True)
class Pass:
    """A micro-batch on one rank and how it is computed."""

    arch: Architecture
    layout: Layout
    rows: int
    """1 for a pack, else sequences."""
    length: int
    """Tokens of each row on this rank (context parallelism splits them)."""
    predicted: int
    """Tokens of all rows whose logits are computed."""
    width: int
    """Bytes of the training precision."""
    fused: bool
    """Whether the layers are Transformer Engine's."""
    fp8: bool = False
    recompute: Recompute = Recompute.none

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.length

    @property
    def region(self) -> int:
        """Tokens in norms and residuals, which sequence parallelism splits."""
        return self.tokens // self.layout.tensor if self.layout.sequence else self.tokens

    @property
    def stream(self) -> int:
        """Bytes of the residual stream between two layers."""
        return self.region * self.arch.hidden * self.width

    def layer(self) -> int:
        """Return the bytes of one layer without recomputation."""
        return self._norms() + self._attention() + self._rotary() + self._feed_forward()

    def kept(self, layers: int) -> int:
        """Return the bytes that ``layers`` layers keep between their forward and their backward pass.

        ``selective`` recomputes core attention, of which these kernels keep next to nothing in any case.
        """
        if self.recompute is Recompute.full:
            return layers * self.stream
        if self.recompute is Recompute.mlp:  # the input, which is kept, is the output of a norm
            return layers * (self.layer() - self._feed_forward())
        return layers * self.layer()

    def working(self) -> int:
        """Return what the backward pass of one layer needs on top of ``kept``: its recomputed activations, and the
        gradients that flow through it (twice the residual stream, and the feed-forward layer's)."""
        again = {Recompute.full: self.layer(), Recompute.mlp: self._feed_forward()}.get(self.recompute, 0)
        inner = self.arch.experts.ffn_hidden if self.arch.experts else self.arch.ffn_hidden // self.layout.tensor
        return again + 2 * self.stream + 2 * self.tokens * inner * self.width

    def final_norm(self) -> int:
        """Return the bytes of the final norm and of the hidden states that logits are computed from."""
        norm = self.width if self.fused else 2 * FLOAT
        return self.region * self.arch.hidden * norm + self.predicted * self.arch.hidden * self.width

    def head(self, rows: int, chunk: int) -> int:
        """Return the bytes of the backward pass of ``policy/logprobs.py``: a chunk's logits, the projection's gradient.

        Args:
            rows: rows of the projection on this rank.
            chunk: tokens whose logits exist at the same time.
        """
        matrix, logits = rows * self.arch.hidden, min(chunk, self.predicted) * rows
        hidden = self.predicted * self.arch.hidden * self.width
        if self.width == FLOAT:
            # The sum over chunks, a chunk's contribution, and its logits, which become their gradient in place.
            return hidden + 2 * FLOAT * matrix + FLOAT * logits
        # Logits become a gradient in the training precision, which is then multiplied.
        converted = (FLOAT + self.width) * logits
        # Adding the product to an fp32 sum copies it to fp32 first, unless the kernel converts.
        multiplied = self.width * (logits + matrix) + (0 if self.fused else FLOAT * matrix)
        return hidden + FLOAT * matrix + max(converted, multiplied)

    def _norms(self) -> int:
        """Return the bytes of two norms and the projections after them, each of which keeps its input."""
        # torch's norm keeps the input and the normalized input in fp32, Transformer Engine's only the input.
        norm = self.width if self.fused else 2 * FLOAT
        return 2 * self.region * self.arch.hidden * (norm + self._product)

    def _attention(self) -> int:
        arch, tensor = self.arch, self.layout.tensor
        query, key = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        # Query, key and value in one tensor, whose value attention reads in place; rotated query and key; the output.
        per_token = (query + 2 * key + query + key + query) * self.width
        per_token += arch.heads * FLOAT  # log of the softmax's normalizer
        if arch.qk_norm:
            per_token += (query + key) * (self.width if self.fused else 2 * FLOAT)
        if self.fp8:
            per_token += query  # of the projection after it
        kept = self.tokens * per_token // tensor
        if self.layout.context > 1 and not self.fused:
            kept += self._gathered(key)
        return kept

    def _gathered(self, key: int) -> int:
        """Return the bytes that ``policy/layers.py`` adds under context parallelism: keys and values of the whole
        sequence instead of this rank's rotated keys, and the masks of its two chunks."""
        whole = self.tokens * (2 * self.layout.context - 1) * key * self.width // self.layout.tensor
        chunk = self.length // 2
        return whole + chunk * (2 * self.layout.context + 1) * chunk * self.width

    def _rotary(self) -> int:
        """Return the bytes of sine and cosine for queries and keys; fused kernels compute them on the fly."""
        return 0 if self.fused else 4 * self.length * self.arch.head_dim * self.width

    def _feed_forward(self) -> int:
        if self.arch.experts is None:
            return self.tokens * self.arch.ffn_hidden * self._inner // self.layout.tensor
        experts = self.arch.experts
        # An estimate: tokens sorted by expert, through the experts, and weighted. If experts are used evenly, a rank
        # computes as many tokens as it sends.
        sent = self.region * experts.per_token
        return sent * (2 * self.arch.hidden * self.width + experts.ffn_hidden * self._inner)

    @property
    def _product(self) -> int:
        """Bytes per element that only a matrix product keeps."""
        return 1 if self.fp8 else self.width

    @property
    def _inner(self) -> int:
        """Bytes per element of the feed-forward layer's inner size."""
        if self.fused:
            return 2 * self.width + self._product  # gate and up; the activation, which the next product keeps
        return 5 * self.width  # gate and up, SiLU of the gate, up once more, and their product
