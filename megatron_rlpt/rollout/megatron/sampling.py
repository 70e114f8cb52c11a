"""Megatron's generation loop with separate random numbers for every request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core.inference.inference_request import InferenceRequest
from megatron.core.inference.model_inference_wrappers.abstract_model_inference_wrapper import (
    AbstractModelInferenceWrapper,
)
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController

from megatron_rlpt.policy.megatron_compat import pipeline_group_arguments
from megatron_rlpt.rollout.engine import Continuation, RolloutPrompt


class SeededController(TextGenerationController):
    """Megatron's ``TextGenerationController`` with sampling, stopping and log-probabilities per request.

    Megatron's version draws the tokens of a batch from one generator, so a request's tokens would depend on the other
    requests; it supports one end-of-sequence token, which it drops; and it computes log-probabilities only for the
    whole prompt, a [batch, prompt, vocabulary] tensor. Batching, prefill, cache and decoding are Megatron's.
    """

    def __init__(
        self, model: AbstractModelInferenceWrapper, *, vocab: int, stop_tokens: Iterable[int], temperature: float
    ) -> None:
        """Generate with ``model``.

        Args:
            model: the wrapped model in the rollout layout; all ranks of its group run the same controller.
            vocab: vocabulary size without padding; padding rows are never drawn.
            stop_tokens: end-of-sequence ids.
            temperature: for requests that are not greedy.
        """
        super().__init__(model, _NoText(), **pipeline_group_arguments(super().__init__, model))
        self._vocab = vocab
        self._stop_tokens = torch.tensor(sorted(stop_tokens), dtype=torch.long)
        self._temperature = temperature
        self._rows: _Rows | None = None

    def continuations(self, prompts: Sequence[RolloutPrompt], max_tokens: int) -> list[Continuation]:
        """Generate one continuation per prompt in one batch; the inference context must be large enough."""
        parameters = SamplingParams(num_tokens_to_generate=max_tokens)
        requests = OrderedDict(
            (
                row,
                InferenceRequest(
                    request_id=row, prompt="", sampling_params=parameters, prompt_tokens=list(prompt.prefix)
                ),
            )
            for row, prompt in enumerate(prompts)
        )
        self._rows = rows = _Rows(prompts, max_tokens)
        try:
            self.generate_all_output_tokens_static_batch(requests)
        finally:
            self._rows = None
        return rows.continuations(set(self._stop_tokens.tolist()))

    def sample_from_logits(
        self,
        last_token_logits: torch.Tensor,
        sampling_params: SamplingParams | None = None,
        vocab_size: int | None = None,
        generation_started: torch.Tensor | None = None,
        top_n_logprobs_dict: Any = None,
        logits: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the next token of every row, [batch], from ``last_token_logits`` [batch, padded vocabulary].

        ``generation_started`` [batch] is False for rows that still read their prompt: Megatron overwrites their token
        with the prompt's, and nothing is recorded.
        """
        assert self._rows is not None
        assert generation_started is not None
        scores = last_token_logits[:, : self._vocab].float()
        logprobs = scores.log_softmax(-1)
        tokens = _draw(scores / self._temperature, self._rows.next_draws(scores.device))
        greedy = self._rows.greedy.to(scores.device)
        tokens = torch.where(greedy, scores.argmax(-1), tokens)
        chosen = logprobs.gather(1, tokens[:, None])[:, 0]
        self._rows.record(tokens.cpu(), chosen.cpu(), generation_started.cpu(), self._stop_tokens)
        return tokens

    def update_generation_status(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which rows are done, and the number of tokens of each, including end-of-sequence."""
        assert self._rows is not None
        device = torch.device(self.sampling_rng.device)
        return self._rows.done.to(device), self._rows.counts.to(device, torch.int32)

    def detokenize_generations(self, *args: Any, **kwargs: Any) -> tuple[str, None]:
        """Return no text: rollouts are token ids."""
        return "", None


class _NoText:
    """A placeholder tokenizer; the controller only uses its padding token."""

    eod = 0


class _Rows:
    """The tokens of a batch generated so far, in host memory."""

    def __init__(self, prompts: Sequence[RolloutPrompt], max_tokens: int) -> None:
        # One random number per token, all from the request's seed, so that neither the other rows nor the device
        # affects them.
        self._draws = torch.stack(
            [
                torch.rand(max_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(prompt.seed))
                for prompt in prompts
            ]
        )
        self.greedy = torch.tensor([prompt.greedy for prompt in prompts])
        self._tokens = torch.zeros(len(prompts), max_tokens, dtype=torch.long)
        self._logprobs = torch.zeros(len(prompts), max_tokens)
        self.counts = torch.zeros(len(prompts), dtype=torch.long)
        self.done = torch.zeros(len(prompts), dtype=torch.bool)

    def next_draws(self, device: torch.device) -> torch.Tensor:
        """Return [batch] numbers in [0, 1) for the next token of each row; ignored for rows that are done."""
        last = self._draws.shape[1] - 1
        return self._draws.gather(1, self.counts.clamp(max=last)[:, None])[:, 0].to(device)

    def record(
        self, tokens: torch.Tensor, logprobs: torch.Tensor, started: torch.Tensor, stop_tokens: torch.Tensor
    ) -> None:
        live = (started & ~self.done).nonzero()[:, 0]
        positions = self.counts[live]
        self._tokens[live, positions] = tokens[live]
        self._logprobs[live, positions] = logprobs[live]
        self.counts[live] += 1
        self.done[live] = torch.isin(tokens[live], stop_tokens) | (self.counts[live] == self._draws.shape[1])

    def continuations(self, stop_tokens: set[int]) -> list[Continuation]:
        found = []
        for count, row, logprobs in zip(
            self.counts.tolist(), self._tokens.tolist(), self._logprobs.tolist(), strict=True
        ):
            tokens = tuple(row[:count])
            reason = "stop" if tokens[-1] in stop_tokens else "length"
            found.append(Continuation(tokens, tuple(logprobs[:count]), reason))
        return found


def _draw(scores: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Sample tokens [batch] from logits ``scores`` [batch, vocabulary] by inverting the distribution at ``draws``."""
    reached = scores.softmax(-1).double().cumsum(-1)
    # right=True picks the first token whose cumulative probability exceeds the draw, never one of probability 0.
    tokens = torch.searchsorted(reached, (draws * reached[:, -1])[:, None], right=True)[:, 0]
    return tokens.clamp(max=scores.shape[1] - 1)
