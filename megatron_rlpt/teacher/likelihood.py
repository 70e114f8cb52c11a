"""The likelihood judge: mean log-likelihood of a candidate under a frozen teacher, minus repetition.

Plain likelihood rewards loops, hence the repetition term. All candidates of an episode share its prefix, which is most
of the tokens (1,920 of 2,048 in the paper's setting). So the teacher runs the prefix once, copies its key-value cache
to one row per candidate, and runs only the candidates on top.

    prefixes [groups, P] --> cache [groups] --select--> cache [rows] + candidates [rows, L] --> hidden --> chunked head
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from megatron_rlpt.config import Dtype, LikelihoodConfig
from megatron_rlpt.errors import ModelError
from megatron_rlpt.plain_text import shortened
from megatron_rlpt.teacher.judge import Judge
from megatron_rlpt.teacher.likelihood_reward import likelihood_reward
from megatron_rlpt.types import BLANK, Failed, Group, Reward

_HEAD_CHUNK_CPU = 128
"""Tokens whose vocabulary logits exist at the same time; few on a CPU, so that they fit its cache."""
_HEAD_CHUNK_GPU = 2048


class LikelihoodJudge(Judge):
    """Rewards candidates by mean log-likelihood under a frozen teacher minus weighted repetition."""

    def __init__(
        self, model_path: str | Path, config: LikelihoodConfig, device: str, dtype: Dtype = Dtype.fp32
    ) -> None:
        """Load the teacher from a local Hugging Face folder; nothing is downloaded.

        Args:
            model_path: the folder.
            config: how likelihoods become rewards.
            device: torch device.
            dtype: precision of the weights.

        Raises:
            ModelError: the folder is missing, cannot be loaded, or its family changes logits after the output layer.
        """
        self.config = config
        self.name = f"likelihood/{Path(model_path).name}"
        self._device = torch.device(device)
        self._model = _load(Path(model_path), self._device, torch.bfloat16 if dtype is Dtype.bf16 else torch.float32)
        self._vocabulary: int = self._model.get_input_embeddings().weight.shape[0]
        self._context: int | None = getattr(self._model.config, "max_position_embeddings", None)
        self._check_head(model_path)

    @override
    def judge(self, groups: Sequence[Group]) -> list[Group]:
        rewarded = self.judge_tokens(
            [group.episode.prefix for group in groups],
            [[candidate.tokens for candidate in group.candidates if not candidate.blank] for group in groups],
        )
        judged = []
        for group, row in zip(groups, rewarded, strict=True):
            rewards = iter(row)
            judged.append(
                replace(
                    group,
                    rewards=tuple(BLANK if candidate.blank else next(rewards) for candidate in group.candidates),
                )
            )
        return judged

    def judge_tokens(
        self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Reward | Failed]]:
        """Return rewards of the continuations (token ids) of each prefix (token ids, at least one).

        ``Reward.detail`` holds ``loglik_mean`` (nats per token) and ``repetition`` (fraction of repeated n-grams).
        """
        means = self.mean_loglikelihood(prefixes, continuations)
        return [
            [self._reward(prefix, tokens, mean) for tokens, mean in zip(row, row_means, strict=True)]
            for prefix, row, row_means in zip(prefixes, continuations, means, strict=True)
        ]

    def _reward(self, prefix: Sequence[int], tokens: Sequence[int], mean: float) -> Reward | Failed:
        if (problem := self._problem(prefix, tokens)) is not None:
            return Failed(problem, {"prefix": len(prefix), "candidate": len(tokens)})
        return likelihood_reward(self.name, self.config, tokens, mean)

    def _problem(self, prefix: Sequence[int], tokens: Sequence[int]) -> str | None:
        """Return why ``tokens`` after ``prefix`` have no likelihood, or None. A small set of reasons, for counting."""
        if not tokens:
            return "empty candidate"
        if not prefix:
            return "empty prefix"
        if not all(0 <= token < self._vocabulary for part in (prefix, tokens) for token in part):
            return f"token id outside the teacher's vocabulary of {self._vocabulary}"
        if self._context is not None and len(prefix) + len(tokens) > self._context:
            return f"longer than the teacher's context of {self._context} tokens"
        return None

    @torch.inference_mode()
    def mean_loglikelihood(
        self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float]]:
        """Return the mean log-probability per token, in nats, of each continuation given its prefix.

        NaN for an empty prefix or continuation, a token id outside the vocabulary, or more tokens than the teacher's
        context.
        """
        means = [[math.nan] * len(row) for row in continuations]
        wanted = {
            group: [index for index, tokens in enumerate(row) if self._problem(prefixes[group], tokens) is None]
            for group, row in enumerate(continuations)
        }
        for batch in self._prefix_batches(prefixes, [group for group, rows in wanted.items() if rows]):
            prefix = torch.tensor([list(prefixes[group]) for group in batch], device=self._device)
            cache, hidden = self._forward(prefix, None)
            last = hidden[:, -1]
            rows = [(slot, group, index) for slot, group in enumerate(batch) for index in wanted[group]]
            for chunk in self._row_chunks(rows, prefix.shape[1], continuations):
                slots = torch.tensor([slot for slot, _, _ in chunk], device=self._device)
                texts = [continuations[group][index] for _, group, index in chunk]
                results = self._continue(cache, last, slots, texts)
                for (_, group, index), mean in zip(chunk, results, strict=True):
                    means[group][index] = mean
        return means

    def _prefix_batches(self, prefixes: Sequence[Sequence[int]], groups: Sequence[int]) -> Iterator[list[int]]:
        """Yield groups with equally long prefixes (no padding, no mask), at most ``batch_tokens`` per forward."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for group in groups:
            by_length[len(prefixes[group])].append(group)
        for length, members in by_length.items():
            size = max(1, self.config.batch_tokens // length)
            for start in range(0, len(members), size):
                yield members[start : start + size]

    def _row_chunks(
        self,
        rows: Sequence[tuple[int, int, int]],
        prefix_length: int,
        continuations: Sequence[Sequence[Sequence[int]]],
    ) -> Iterator[list[tuple[int, int, int]]]:
        """Yield rows (at least one) whose prefix copies and padded continuations have at most ``batch_tokens``."""
        longest = max(len(continuations[group][index]) for _, group, index in rows)
        size = max(1, self.config.batch_tokens // (prefix_length + longest))
        for start in range(0, len(rows), size):
            yield list(rows[start : start + size])

    def _continue(self, cache: Any, last: Tensor, slots: Tensor, texts: Sequence[Sequence[int]]) -> list[float]:
        """Return means of ``texts`` after the cached prefixes ``slots`` [rows]; ``last`` is [prefixes, hidden]."""
        lengths = torch.tensor([len(text) for text in texts], device=self._device)
        width = int(lengths.max())
        tokens = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=self._device)
        rows_cache = copy.deepcopy(cache)
        rows_cache.batch_select_indices(slots)
        # Right padding needs no mask: attention is causal, so no real token sees a padded one. The last token is
        # only a target and need not be run.
        states = [last[slots].unsqueeze(1)]
        if width > 1:
            states.append(self._forward(tokens[:, :-1], rows_cache)[1])
        hidden = torch.cat(states, dim=1)
        real = torch.arange(width, device=self._device) < lengths.unsqueeze(1)
        logprobs = torch.zeros(tokens.shape, dtype=torch.float32, device=self._device)
        logprobs[real] = self._logprobs(hidden[real], tokens[real])
        means: list[float] = (logprobs.double().sum(dim=1) / lengths).tolist()
        return means

    def _forward(self, tokens: Tensor, cache: Any) -> tuple[Any, Tensor]:
        """Return key-value cache and final hidden states [rows, length, hidden] of ``tokens`` [rows, length]."""
        output = self._model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
        return output.past_key_values, output.last_hidden_state

    def _logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return fp32 log-probabilities of ``targets`` [tokens] given ``hidden`` [tokens, hidden], in chunks."""
        head = self._model.get_output_embeddings()
        chunk = _HEAD_CHUNK_CPU if self._device.type == "cpu" else _HEAD_CHUNK_GPU
        parts = []
        for states, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = head(states).float()
            parts.append(logits.gather(1, wanted.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=1))
        return torch.cat(parts)

    @torch.inference_mode()
    def _check_head(self, model_path: str | Path) -> None:
        """Refuse families that scale or cap logits after the head, because body and head run separately here."""
        tokens = torch.arange(4, device=self._device).remainder(self._vocabulary).unsqueeze(0)
        _, hidden = self._forward(tokens, None)
        whole = self._model(input_ids=tokens).logits
        if not torch.allclose(self._model.get_output_embeddings()(hidden), whole, rtol=1e-2, atol=1e-2, equal_nan=True):
            raise ModelError(
                f"the teacher {model_path} changes its logits after the output layer, which the likelihood judge does "
                "not do; use a Llama-type teacher or teacher.judge=generative"
            )


def _load(path: Path, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    if not (path / "config.json").is_file():
        raise ModelError(f"teacher.path is {path}; it needs to be a local Hugging Face folder with a config.json")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, trust_remote_code=False, weights_only=True
        )
    except Exception as error:  # transformers raises any type for a bad configuration
        raise ModelError(f"the teacher in {path} cannot be loaded: {shortened(str(error))}") from error
    return model.to(device).eval().requires_grad_(False)
