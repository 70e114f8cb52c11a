"""A model that answers lm-eval's requests: lm-eval's own class for Hugging Face models, shared by ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lm_eval.api.task
from lm_eval.models.huggingface import HFLM
from typing_extensions import override

from megatron_rlpt.config import Dtype
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.teacher.frozen_model import load_frozen
from megatron_rlpt.tokens.loading import load_tokenizer

_LOGITS_CPU = 1 << 27
"""Logits of one forward pass; lm-eval's class has those of all tokens at once, 4 bytes each, and copies them."""
_LOGITS_GPU = 1 << 31


def _without_bar(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items


lm_eval.api.task.tqdm = _without_bar  # a bar per task and rank would cut into the log


class RankedModel(HFLM):
    """lm-eval's class for Hugging Face models, answering the share of its rank.

    lm-eval runs alike on every rank and sees a world of one; only the answers are shared.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int, ranks: Ranks) -> None:
        """
        Args:
            model: loaded, on its device.
            tokenizer: of ``transformers``.
            batch_tokens: most tokens in one forward pass.
            ranks: share the requests; one question stays on one rank.
        """
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        logits = _LOGITS_CPU if self.device.type == "cpu" else _LOGITS_GPU
        self._most = max(1, min(batch_tokens, logits // model.get_input_embeddings().weight.shape[0]))
        self._ranks = ranks

    @override
    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._shared(super().loglikelihood, requests)

    @override
    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        return self._shared(super().loglikelihood_rolling, requests)

    @override
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        self.batch_size_per_gpu = max(1, self._most // self.max_length)
        return self._shared(super().generate_until, requests)

    @override
    def _loglikelihood_tokens(self, requests: Sequence[Any], *arguments: Any, **options: Any) -> list[Any]:
        longest = max((len(before) + len(after) for _, before, after in requests), default=1)
        self.batch_size_per_gpu = max(1, self._most // min(longest, self.max_length))
        found: list[Any] = super()._loglikelihood_tokens(requests, *arguments, **options)
        return found

    def _shared(self, answer: Callable[..., list[Any]], requests: Sequence[Any]) -> list[Any]:
        ranks = self._ranks
        mine = [index for index, one in enumerate(requests) if (one.doc_id or 0) % ranks.size == ranks.rank]

        def work() -> dict[int, Any]:
            share = [requests[index] for index in mine]
            return dict(zip(mine, answer(share, disable_tqdm=True), strict=True)) if share else {}

        found: dict[int, Any] = {}
        for part in ranks.all_gather(ranks.run_on_all_ranks(work, "answers to a standard task")):
            found |= part
        return [found[index] for index in range(len(requests))]


def answering_model(folder: Path, device: str, dtype: Dtype, batch_tokens: int, ranks: Ranks) -> RankedModel:
    """Load a Hugging Face folder; nothing is downloaded.

    Raises:
        ModelError: it cannot be loaded.
    """
    return RankedModel(load_frozen(folder, device, dtype), load_tokenizer(folder), batch_tokens, ranks)
