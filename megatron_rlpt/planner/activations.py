"""Bytes that the forward pass leaves for the backward pass, tensor by tensor.

Counted for the two kinds of layers that ``policy/layers.py`` builds. For Megatron's own with torch's kernels (CPU)
every term was read off the tensors that autograd saves; for Transformer Engine's (GPU) it follows from what its modules
save (``layernorm_linear.py``, ``linear.py``; ``megatron/core/fusions/fused_bias_swiglu.py``) and is not measured.
Neither holds attention scores: both kinds attend through kernels that compute them again.
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
    """A micro-batch on one rank, and how it is computed."""

    arch: Architecture
    layout: Layout
    rows: int
    """Sequences."""
    length: int
    """Tokens of each that this rank has (context parallelism divides them)."""
    predicted: int
    """Tokens whose logits are needed, over all rows."""
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
        """Tokens in norms and residuals, which sequence parallelism divides."""
        return self.tokens // self.layout.tensor if self.layout.sequence else self.tokens

    @property
    def stream(self) -> int:
        """The residual stream between two layers."""
        return self.region * self.arch.hidden * self.width

    def layer(self) -> int:
        """One layer, nothing of it computed again."""
        return self._norms() + self._attention() + self._rotary() + self._feed_forward()

    def kept(self, layers: int) -> int:
        """``layers`` layers between their forward and their backward pass.

        ``selective`` computes core attention again, of which these kernels keep next to nothing in any case.
        """
        if self.recompute is Recompute.full:
            return layers * self.stream
        return layers * self.layer()

    def working(self) -> int:
        """What the backward pass of one layer takes on top of ``kept``: its own activations where they are computed
        again, and the gradients that flow through it (twice the residual stream, and the feed-forward layer's)."""
        again = self.layer() if self.recompute is Recompute.full else 0
        inner = self.arch.experts.ffn_hidden if self.arch.experts else self.arch.ffn_hidden // self.layout.tensor
        return again + 2 * self.stream + 2 * self.tokens * inner * self.width

    def final_norm(self) -> int:
        """The norm behind the last layer, and the hidden states that logits are computed from."""
        norm = self.width if self.fused else 2 * FLOAT
        return self.region * self.arch.hidden * norm + self.predicted * self.arch.hidden * self.width

    def head(self, rows: int, chunk: int) -> int:
        """The backward pass of ``policy/logprobs.py``: logits of a chunk, and the projection's gradient.

        Args:
            rows: of the projection on this rank.
            chunk: tokens whose logits exist at the same time.
        """
        matrix, logits = rows * self.arch.hidden, min(chunk, self.predicted) * rows
        hidden = self.predicted * self.arch.hidden * self.width
        if self.width == FLOAT:
            # Sum over chunks, what a chunk adds, and its logits, which become their gradient in place.
            return hidden + 2 * FLOAT * matrix + FLOAT * logits
        # Logits are turned into a gradient of the training precision, and then multiplied.
        turned = (FLOAT + self.width) * logits
        # Adding the product to an fp32 sum makes it fp32 first, where kernels do not convert on the way.
        multiplied = self.width * (logits + matrix) + (0 if self.fused else FLOAT * matrix)
        return hidden + FLOAT * matrix + max(turned, multiplied)

    def _norms(self) -> int:
        """Two norms and the projections behind them, each of which keeps its input."""
        # torch's norm keeps the input and the normalised input in fp32, Transformer Engine's the input.
        norm = self.width if self.fused else 2 * FLOAT
        return 2 * self.region * self.arch.hidden * (norm + self._product)

    def _attention(self) -> int:
        arch, tensor = self.arch, self.layout.tensor
        query, key = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        # Query, key and value in one piece, of which attention reads the value in place; query and key after rotation;
        # the output.
        per_token = (query + 2 * key + query + key + query) * self.width
        per_token += arch.heads * FLOAT  # log of the softmax's normaliser
        if arch.qk_norm:
            per_token += (query + key) * (self.width if self.fused else 2 * FLOAT)
        if self.fp8:
            per_token += query  # of the projection behind it
        kept = self.tokens * per_token // tensor
        if self.layout.context > 1 and not self.fused:
            kept += self._gathered(key)
        return kept

    def _gathered(self, key: int) -> int:
        """``policy/layers.py`` under context parallelism: keys and values of the whole sequence instead of the
        rotated keys of this rank's part, and the masks of its two chunks."""
        whole = self.tokens * (2 * self.layout.context - 1) * key * self.width // self.layout.tensor
        chunk = self.length // 2
        return whole + chunk * (2 * self.layout.context + 1) * chunk * self.width

    def _rotary(self) -> int:
        """Sine and cosine of every position, for queries and for keys; fused kernels compute them on the way."""
        return 0 if self.fused else 4 * self.length * self.arch.head_dim * self.width

    def _feed_forward(self) -> int:
        if self.arch.experts is None:
            return self.tokens * self.arch.ffn_hidden * self._inner // self.layout.tensor
        experts = self.arch.experts
        # With evenly used experts a rank computes as many tokens as it sends. Sorted by expert, through the experts,
        # and weighted; an estimate.
        sent = self.region * experts.per_token
        return sent * (2 * self.arch.hidden * self.width + experts.ffn_hidden * self._inner)

    @property
    def _product(self) -> int:
        """Bytes of an element that only a matrix product keeps."""
        return 1 if self.fp8 else self.width

    @property
    def _inner(self) -> int:
        """Bytes per element of the feed-forward layer's inner size."""
        if self.fused:
            return 2 * self.width + self._product  # gate and up; the activation, which the next product keeps
        return 5 * self.width  # gate and up, SiLU of the gate, up once more, and their product
