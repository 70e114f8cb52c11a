"""The seconds that a language model takes to generate: prefill of the prompts, then one token per sequence and pass.

Decoding is bound by memory: every pass reads all weights once, and the keys and values of every sequence. A pass takes
the longer of its memory traffic and its arithmetic, plus the host's overhead. The model applies to the rollout engine
and to the teacher servers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rlpt.planner.hardware import Constant, Gpu, Nodes, attention_seconds, matmul_seconds, memory_seconds
from megatron_rlpt.planner.transformer import Transformer

PASS_OVERHEAD = Constant(
    0.002, "assumed: seconds that scheduling, launching and sampling add to a pass of vLLM with CUDA graphs"
)
EAGER_LAYER = Constant(
    2e-4,
    "assumed: about 20 kernels per layer that Python launches one by one, 10 microseconds each (Megatron's static "
    "generation uses no CUDA graphs)",
)
"""Host seconds per layer and pass without CUDA graphs."""
HOP_LATENCY = Constant(
    1e-5, "assumed: seconds of an all-reduce of few tokens between the GPUs of a node; two per layer and pass"
)


@dataclass(frozen=True)
class GenerationEngine:
    """A language model that generates on ``tensor`` GPUs."""

    model: Transformer
    nodes: Nodes
    tensor: int
    cache: float
    """Bytes of key-value cache per GPU."""
    max_batch: int
    """Most sequences decoded concurrently."""
    fp8: bool = False
    """Whether weights and products are fp8; the cache stays bf16."""
    eager: bool = False
    """Whether kernels are launched one by one instead of replayed as CUDA graphs."""
    static: bool = False
    """Whether it is Megatron's static generation: every sequence reads and keeps its own prompt, and kernels are
    launched one by one. Otherwise it is vLLM, which shares prompts and replays CUDA graphs."""

    @property
    def weights(self) -> float:
        """Bytes of weights per GPU."""
        return self._weight_bytes * self.model.parameters / self.tensor

    @property
    def _weight_bytes(self) -> float:
        return 1.0 if self.fp8 else 2.0

    @property
    def _speed(self) -> float:
        """FLOP/s of large products."""
        gpu = self.nodes.gpu
        return (gpu.fp8 if self.fp8 else gpu.bf16) * gpu.matmul

    def concurrency(self, shared: float, own: float, fan: int) -> int:
        """Return how many sequences the cache holds concurrently, at most ``max_batch``.

        Args:
            shared: tokens that ``fan`` sequences share and that are cached once.
            own: further tokens of each sequence.
            fan: sequences per prompt.
        """
        fan = 1 if self.static else fan
        return min(self.max_batch, int(self.cache / self._cache_bytes(own + shared / fan)))

    def cache_needed(self, length: float) -> float:
        """Return the bytes of cache per GPU that one sequence of ``length`` tokens needs."""
        return self._cache_bytes(length)

    def _cache_bytes(self, tokens: float) -> float:
        """Return the bytes per GPU; key-value heads are copied, not split, if there are more GPUs than heads."""
        return self.model.kv_bytes / min(self.tensor, self.model.kv_heads) * tokens

    def prompt_seconds(self, tokens: float, length: float) -> float:
        """Return the seconds to prefill ``tokens`` tokens of prompts of ``length`` each."""
        if not tokens:
            return 0.0
        gpu, model = self.nodes.gpu, self.model
        # Large prompts fill the GPU: the efficiency of a forward pass in training.
        products = 2.0 * model.active_parameters / self.tensor * tokens / self._speed
        attention, _ = attention_seconds(gpu, tokens / length, length, model.heads * model.head_dim / self.tensor)
        return products + model.layers * attention + 2 * model.layers * self._all_reduce(tokens)

    def pass_seconds(self, sequences: float, context: float) -> float:
        """Return the seconds of a pass that adds one token to each of ``sequences`` with ``context`` cached tokens."""
        model, gpu = self.model, self.nodes.gpu
        read = self._weight_bytes * self._weights_read(sequences) / self.tensor
        read += self._cache_bytes(sequences * context)
        flops = 2.0 * sequences * (model.active_parameters + model.embedding_parameters)
        work = max(memory_seconds(gpu, read), flops / self.tensor / self._speed)
        eager = self.static or self.eager
        host = PASS_OVERHEAD + (EAGER_LAYER * model.layers if eager else 0.0)
        # Without CUDA graphs the host launches kernels while the GPU works: the slower of the two counts.
        busy = work + 2 * model.layers * self._all_reduce(sequences)
        return max(busy, host) if eager else busy + host

    def generate_seconds(self, prompts: float, fan: int, prompt: float, answer: float) -> float:
        """Return the seconds to answer ``prompts`` prompts of ``prompt`` tokens ``fan`` times with ``answer`` tokens.

        Answers to a prompt share its prefill (vLLM's prefix cache), unless the engine is static. The cache holds at
        least one sequence.
        """
        sequences = prompts * fan
        read = sequences if self.static else prompts
        if not sequences:
            return 0.0
        together = max(1, self.concurrency(prompt, answer, fan))
        waves = math.ceil(sequences / together)
        decode = waves * answer * self.pass_seconds(sequences / waves, prompt + answer / 2)
        return self.prompt_seconds(read * prompt, prompt) + decode

    def _weights_read(self, sequences: float) -> float:
        """Return the parameters that a pass reads: all but unused rows of the embedding and unused experts."""
        model = self.model
        if model.experts is None:
            return model.active_parameters + model.embedding_parameters
        missed = (1 - model.experts.per_token / model.experts.count) ** sequences
        experts = model.experts.count * (1 - missed)
        return model.layers * (model.attention_parameters + experts * model.expert_parameters) + (
            model.embedding_parameters
        )

    def _all_reduce(self, tokens: float) -> float:
        """Return the seconds to reduce a layer's output of ``tokens`` tokens over the tensor-parallel GPUs."""
        if self.tensor == 1:
            return 0.0
        moved = 2 * tokens * self.model.hidden * 2 * (self.tensor - 1) / self.tensor
        return HOP_LATENCY + moved / self.nodes.bandwidth(self.tensor)


def score_seconds(model: Transformer, gpu: Gpu, prefixes: float, prefix: float, fan: int, suffix: float) -> float:
    """Return the seconds to compute the likelihood of ``fan`` suffixes of each of ``prefixes`` prefixes on one GPU.

    Suffixes share the keys and values of their prefix (``teacher/frozen_model.py``).
    """
    tokens = prefixes * (prefix + fan * suffix)
    width = model.heads * model.head_dim
    ahead, _ = attention_seconds(gpu, prefixes, prefix, width)
    suffixes = 2.0 * ahead * fan * suffix / max(1.0, prefix)  # every suffix attends to the whole prefix
    logits = matmul_seconds(gpu, prefixes * fan * suffix, model.vocab, model.hidden)
    return 2.0 * model.active_parameters * tokens / (gpu.bf16 * gpu.matmul) + model.layers * (ahead + suffixes) + logits
