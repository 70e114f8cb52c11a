"""Log-likelihoods of continuations under a frozen model in this process.

All continuations of a prefix share it, and it is most of the tokens (1,920 of 2,048 in the paper's setting). So the
model runs the prefix once, copies its key-value cache to one row per continuation, and runs only these on top.

    prefixes [groups, P] --> cache [groups] --select--> cache [rows] + continuations [rows, L] --> states --> head
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlpt.config import Dtype
from megatron_rlpt.errors import ModelError
from megatron_rlpt.plain_text import shortened

_HEAD_CHUNK_CPU = 128
"""Tokens whose vocabulary logits exist at the same time; few on a CPU, so that they fit its cache."""
_HEAD_CHUNK_GPU = 2048


class FrozenModel:
    """A causal language model that is only read.

    Attributes:
        vocabulary: number of token ids it has embeddings of.
        context: most tokens of a sequence, or None without a limit.
    """

    def __init__(self, path: str | Path, batch_tokens: int, device: str, dtype: Dtype, role: str = "model") -> None:
        """Load the model from a local Hugging Face folder; nothing is downloaded.

        Args:
            path: the folder.
            batch_tokens: most tokens in one forward pass, copied prefixes and padding included.
            device: torch device.
            dtype: precision of the weights.
            role: what the model is to the user, for errors: ``teacher``.

        Raises:
            ModelError: the folder is missing or cannot be loaded.
        """
        self._role = role
        self._batch_tokens = batch_tokens
        self._device = torch.device(device)
        self._model = load_frozen(Path(path), device, dtype, role)
        self.vocabulary: int = self._model.get_input_embeddings().weight.shape[0]
        self.context: int | None = getattr(self._model.config, "max_position_embeddings", None)
        # Body and head run separately, so that the logits of a long sequence never exist at once.
        self._head = self._plain_head()

    def problem(self, prefix: Sequence[int], tokens: Sequence[int]) -> str | None:
        """Return why ``tokens`` after ``prefix`` have no likelihood, or None. A small set of reasons, for counting."""
        if not tokens:
            return "empty candidate"
        if not prefix:
            return "empty prefix"
        if not all(0 <= token < self.vocabulary for part in (prefix, tokens) for token in part):
            return f"token id outside the {self._role}'s vocabulary of {self.vocabulary}"
        if self.context is not None and len(prefix) + len(tokens) > self.context:
            return f"longer than the {self._role}'s context of {self.context} tokens"
        return None

    @torch.inference_mode()
    def mean_loglikelihood(
        self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[float]]:
        """Return the mean log-probability per token, in nats, of each continuation given its prefix.

        NaN where ``problem`` names one.
        """
        means = [[math.nan] * len(row) for row in continuations]
        wanted = {
            group: [index for index, tokens in enumerate(row) if self.problem(prefixes[group], tokens) is None]
            for group, row in enumerate(continuations)
        }
        for batch in self._prefix_batches(prefixes, [group for group, rows in wanted.items() if rows]):
            prefix = torch.tensor([list(prefixes[group]) for group in batch], device=self._device)
            cache, states = self._forward(prefix, None, only_last=True)
            last = states[:, -1]
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
            size = max(1, self._batch_tokens // length)
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
        size = max(1, self._batch_tokens // (prefix_length + longest))
        for start in range(0, len(rows), size):
            yield list(rows[start : start + size])

    def _continue(self, cache: Any, last: Tensor, slots: Tensor, texts: Sequence[Sequence[int]]) -> list[float]:
        """Return means of ``texts`` after the cached prefixes ``slots`` [rows]; ``last`` is [prefixes, width]."""
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
        joined = torch.cat(states, dim=1)
        real = torch.arange(width, device=self._device) < lengths.unsqueeze(1)
        logprobs = torch.zeros(tokens.shape, dtype=torch.float32, device=self._device)
        logprobs[real] = self._logprobs(joined[real], tokens[real])
        means: list[float] = (logprobs.double().sum(dim=1) / lengths).tolist()
        return means

    def _forward(self, tokens: Tensor, cache: Any, only_last: bool = False) -> tuple[Any, Tensor]:
        """Return key-value cache and states [rows, length, width] of ``tokens`` [rows, length].

        States are what ``_head`` makes logits of: final hidden states, or logits. Those of the last token are enough
        for the caller where ``only_last`` is true; logits are then computed for no other.
        """
        if self._head is None:
            kept = {"logits_to_keep": 1} if only_last else {}
            output = self._model(input_ids=tokens, past_key_values=cache, use_cache=True, **kept)
            return output.past_key_values, output.logits
        output = self._model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
        return output.past_key_values, output.last_hidden_state

    def _logprobs(self, states: Tensor, targets: Tensor) -> Tensor:
        """Return fp32 log-probabilities of ``targets`` [tokens] given ``states`` [tokens, width], in chunks."""
        chunk = _HEAD_CHUNK_CPU if self._device.type == "cpu" else _HEAD_CHUNK_GPU
        parts = []
        for part, wanted in zip(states.split(chunk), targets.split(chunk), strict=True):
            logits = (part if self._head is None else self._head(part)).float()
            parts.append(logits.gather(1, wanted.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=1))
        return torch.cat(parts)

    @torch.inference_mode()
    def _plain_head(self) -> Any:
        """Return the output layer, or None for families that scale or cap logits after it."""
        tokens = torch.arange(4, device=self._device).remainder(self.vocabulary).unsqueeze(0)
        head = self._model.get_output_embeddings()
        hidden = self._model.base_model(input_ids=tokens).last_hidden_state
        whole = self._model(input_ids=tokens).logits
        return head if torch.allclose(head(hidden), whole, rtol=1e-2, atol=1e-2, equal_nan=True) else None


def load_frozen(path: Path, device: str, dtype: Dtype, role: str = "model") -> Any:
    """Load a causal language model of ``transformers``, without gradients, from a local Hugging Face folder.

    Raises:
        ModelError: the folder is missing or cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    if not (path / "config.json").is_file():
        raise ModelError(f"the {role} is {path}; it needs to be a local Hugging Face folder with a config.json")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.bfloat16 if dtype is Dtype.bf16 else torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
        )
    except Exception as error:  # transformers raises any type for a bad configuration
        raise ModelError(f"the {role} in {path} cannot be loaded: {shortened(str(error))}") from error
    return model.to(device).eval().requires_grad_(False)
