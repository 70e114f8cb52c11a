"""Parameters and FLOPs of a decoder, from its sizes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlpt.models.architecture import Architecture, Experts


@dataclass(frozen=True)
class Transformer:
    """Sizes of a decoder-only model."""

    layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    """Rows of the embedding, with padding."""
    gated: bool = True
    """Whether the feed-forward layer has a gate projection (SwiGLU)."""
    tied: bool = False
    experts: Experts | None = None

    @classmethod
    def of(cls, arch: Architecture) -> Transformer:
        """Return the sizes of ``arch``; all supported families have gated feed-forward layers."""
        return cls(
            layers=arch.layers,
            hidden=arch.hidden,
            ffn_hidden=arch.ffn_hidden,
            heads=arch.heads,
            kv_heads=arch.kv_heads,
            head_dim=arch.head_dim,
            vocab=arch.padded_vocab,
            tied=arch.tied_embeddings,
            experts=arch.experts,
        )

    @property
    def projections(self) -> int:
        """Matrices into the feed-forward layer: up, and gate if there is one."""
        return 2 if self.gated else 1

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's attention matrices."""
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert, or of the feed-forward layer of a dense model."""
        inner = self.experts.ffn_hidden if self.experts else self.ffn_hidden
        return self.hidden * inner * (self.projections + 1)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding; the output layer has as many."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of all matrices."""
        experts = self.experts.count if self.experts else 1
        router = self.experts.count * self.hidden if self.experts else 0
        layer = self.attention_parameters + experts * self.expert_parameters + router
        return self.layers * layer + self.embedding_parameters * (1 if self.tied else 2)

    @property
    def active_parameters(self) -> int:
        """Parameters that process one token in the layers."""
        experts = self.experts.per_token if self.experts else 1
        return self.layers * (self.attention_parameters + experts * self.expert_parameters)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the key-value cache per token, in bf16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def forward_flops(self, sequence: int, predicted: float | None = None, pairs: float | None = None) -> float:
        """Return the FLOPs of the forward pass of one sequence of ``sequence`` tokens, as Megatron counts them.

        Attention counts in full, not only its causal half, as in ``num_floating_point_operations`` of Megatron-LM's
        ``training.py`` (r0.8), so that utilization compares with published numbers.

        Args:
            sequence: tokens.
            predicted: tokens whose logits are computed; None for all.
            pairs: twice the pairs of query and key that causal attention computes; None for ``sequence`` squared.
        """
        attention = 4.0 * (sequence**2 if pairs is None else pairs) * self.heads * self.head_dim * self.layers
        logits = 2.0 * self.embedding_parameters * (sequence if predicted is None else predicted)
        return 2.0 * self.active_parameters * sequence + attention + logits
