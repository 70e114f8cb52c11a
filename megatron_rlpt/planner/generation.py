"""How long a language model takes to generate: reading prompts, then one token per sequence and pass.

Decoding is bound by memory: every pass reads all weights once and the keys and values of every sequence. A pass takes
the longer of that and of its arithmetic, plus what a pass costs the host. The model holds for the rollout engine and
for the servers of the teacher.
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
    "assumed: about 20 kernels of a layer that Python launches one by one, 10 microseconds each (Megatron's static "
    "generation uses no CUDA graphs)",
)
"""Seconds of the host per layer and pass without CUDA graphs."""
HOP_LATENCY = Constant(
    1e-5, "assumed: seconds of an all-reduce of few tokens among the GPUs of a node; two per layer and pass"
)


@dataclass(frozen=True)
class GenerationEngine:
    """A language model that generates, on ``tensor`` GPUs."""

    model: Transformer
    nodes: Nodes
    tensor: int
    cache: float
    """Bytes of key-value cache per GPU."""
    max_batch: int
    """Most sequences decoded at once."""
    fp8: bool = False
    """Weights and products in fp8; the cache stays in bf16."""
    static: bool = False
    """Megatron's static generation: every sequence reads and keeps its own prompt, and kernels are launched one by one.
    Otherwise vLLM, which shares prompts and replays CUDA graphs."""

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
        """Sequences whose keys and values fit at once, at most ``max_batch``.

        Args:
            shared: tokens that ``fan`` sequences have in common and that are kept once.
            own: tokens that each sequence has for itself.
            fan: sequences with one prompt.
        """
        fan = 1 if self.static else fan
        return min(self.max_batch, int(self.cache / self._cache_bytes(own + shared / fan)))

    def cache_needed(self, length: float) -> float:
        """Bytes of cache per GPU without which not one sequence of ``length`` tokens is generated."""
        return self._cache_bytes(length)

    def _cache_bytes(self, tokens: float) -> float:
        """Per GPU; a key-value head is not divided but copied where there are more GPUs."""
        return self.model.kv_bytes / min(self.tensor, self.model.kv_heads) * tokens

    def prompt_seconds(self, tokens: float, length: float) -> float:
        """Seconds to read ``tokens`` tokens of prompts of ``length`` each."""
        if not tokens:
            return 0.0
        gpu, model = self.nodes.gpu, self.model
        # Large prompts fill the GPU; the same efficiency as a forward pass in training.
        products = 2.0 * model.active_parameters / self.tensor * tokens / self._speed
        attention, _ = attention_seconds(gpu, tokens / length, length, model.heads * model.head_dim / self.tensor)
        return products + model.layers * attention + 2 * model.layers * self._all_reduce(tokens)

    def pass_seconds(self, sequences: float, context: float) -> float:
        """Seconds of one pass that gives each of ``sequences`` one more token, at ``context`` tokens of cache each."""
        model, gpu = self.model, self.nodes.gpu
        read = self._weight_bytes * self._weights_read(sequences) / self.tensor
        read += self._cache_bytes(sequences * context)
        flops = 2.0 * sequences * (model.active_parameters + model.embedding_parameters)
        work = max(memory_seconds(gpu, read), flops / self.tensor / self._speed)
        host = PASS_OVERHEAD + (EAGER_LAYER * model.layers if self.static else 0.0)
        # The host runs ahead of the GPU while kernels are launched one by one; what takes longer counts.
        busy = work + 2 * model.layers * self._all_reduce(sequences)
        return max(busy, host) if self.static else busy + host

    def generate_seconds(self, prompts: float, fan: int, prompt: float, answer: float) -> float:
        """Seconds to answer ``prompts`` prompts of ``prompt`` tokens ``fan`` times each with ``answer`` tokens.

        Each prompt is read once and its answers share what was read (vLLM's prefix cache), unless the engine is static.
        The cache holds one sequence at least.
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
        """Parameters that a pass reads: all but the embedding's other rows and experts that no token goes to."""
        model = self.model
        if model.experts is None:
            return model.active_parameters + model.embedding_parameters
        missed = (1 - model.experts.per_token / model.experts.count) ** sequences
        experts = model.experts.count * (1 - missed)
        return model.layers * (model.attention_parameters + experts * model.expert_parameters) + (
            model.embedding_parameters
        )

    def _all_reduce(self, tokens: float) -> float:
        """Seconds to add up the layer's output of ``tokens`` tokens over the tensor-parallel GPUs."""
        if self.tensor == 1:
            return 0.0
        moved = 2 * tokens * self.model.hidden * 2 * (self.tensor - 1) / self.tensor
        return HOP_LATENCY + moved / self.nodes.bandwidth(self.tensor)


def score_seconds(model: Transformer, gpu: Gpu, prefixes: float, prefix: float, fan: int, suffix: float) -> float:
    """Seconds to find how probable ``fan`` continuations of each of ``prefixes`` prefixes are, on one GPU.

    The prefix is read once and its keys and values are shared (``teacher/likelihood.py``).
    """
    tokens = prefixes * (prefix + fan * suffix)
    width = model.heads * model.head_dim
    ahead, _ = attention_seconds(gpu, prefixes, prefix, width)
    beside = 2.0 * ahead * fan * suffix / max(1.0, prefix)  # every continuation looks at the whole prefix
    logits = matmul_seconds(gpu, prefixes * fan * suffix, model.vocab, model.hidden)
    return 2.0 * model.active_parameters * tokens / (gpu.bf16 * gpu.matmul) + model.layers * (ahead + beside) + logits
