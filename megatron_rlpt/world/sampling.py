"""Measure a policy exactly: continue held-out prefixes of a world and average the measures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_rlpt.errors import ConfigError, DataError
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.make import HELDOUT, HELDOUT_UNSAFE
from megatron_rlpt.world.measures import Measures, measure_text

_BATCH = 128
COLUMNS = ("quality", "well_formed", "coherence", "truth", "substance", "safe")
"""Measures whose means are shown."""
DOCUMENTS = "documents "
"""Before the name of a set: how its documents themselves go on."""


@dataclass(frozen=True)
class Sampling:
    """How a policy is measured."""

    prefixes: int = 200
    """Held-out documents of either set."""
    prefix: int = 64
    """Tokens of a prefix, from the beginning of a document."""
    length: int = 32
    """Tokens of a continuation."""
    greedy: bool = False
    """Take the most likely token; otherwise sample from the whole distribution (temperature 1)."""
    seed: int = 1


@dataclass(frozen=True)
class Sampled:
    """One continuation."""

    prefix: str
    text: str
    measures: Measures
    prefix_tokens: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()


def measure_policy(folder: Path, model: Path, sampling: Sampling) -> dict[str, list[Sampled]]:
    """Continue prefixes of ``heldout.jsonl`` and ``heldout_unsafe.jsonl``.

    Args:
        folder: of the world.
        model: Hugging Face folder of a policy with the world's tokenizer.
        sampling: how.

    Returns:
        Name of the set -> continuations; the documents' own suffixes have the name with ``DOCUMENTS`` before it.

    Raises:
        ConfigError: documents are too short for prefix and continuation.
        DataError: the world cannot be read.
        ModelError: the model has no usable tokenizer.
    """
    world = World.load(folder)
    tokenizer = PolicyTokenizer(model)
    found = {}
    for name in (HELDOUT, HELDOUT_UNSAFE):
        documents = [tokenizer.encode(text) for text in _texts(folder / f"{name}.jsonl", sampling.prefixes)]
        if (shortest := min(map(len, documents))) < sampling.prefix + sampling.length:
            raise ConfigError(
                f"--prefix={sampling.prefix} and --length={sampling.length} are more than the {shortest} tokens of a "
                f"document of {name}.jsonl; choose smaller ones"
            )
        prefixes = [tokens[: sampling.prefix] for tokens in documents]
        own = [tokens[sampling.prefix : sampling.prefix + sampling.length] for tokens in documents]
        rows = {f"{DOCUMENTS}{name}": own, name: list(_continue(model, prefixes, sampling))}
        for key, continuations in rows.items():
            found[key] = [
                _measured(world, tokenizer, prefix, tokens)
                for prefix, tokens in zip(prefixes, continuations, strict=True)
            ]
    return found


def means(sampled: Sequence[Sampled]) -> dict[str, float]:
    """Return the mean of every column; of ``truth`` over continuations that state something."""
    rows = [one.measures for one in sampled]
    values = {name: [float(value) for row in rows if (value := getattr(row, name)) is not None] for name in COLUMNS}
    return {name: fmean(found) if found else float("nan") for name, found in values.items()}


def _measured(world: World, tokenizer: PolicyTokenizer, prefix: Sequence[int], tokens: Sequence[int]) -> Sampled:
    before, text = tokenizer.text_of(prefix), tokenizer.text_of(tokens, prefix)
    return Sampled(before, text, measure_text(world, before, text), tuple(prefix), tuple(tokens))


def _texts(path: Path, count: int) -> list[str]:
    try:
        with path.open(encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for _, line in zip(range(count), file, strict=False)]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read ({error}); make the world anew with rlpt world make") from None
    if not texts:
        raise DataError(f"{path} is empty; make the world anew with rlpt world make")
    return texts


def _continue(model: Path, prefixes: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[int]]:
    """Yield one continuation per prefix; all prefixes have the same length."""
    import torch
    from transformers import AutoModelForCausalLM

    policy: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(sampling.seed)
    with torch.inference_mode():
        for start in range(0, len(prefixes), _BATCH):
            tokens = torch.tensor([list(prefix) for prefix in prefixes[start : start + _BATCH]])
            cache, step, rows = None, tokens, []
            for _ in range(sampling.length):
                output = policy(input_ids=step, past_key_values=cache, use_cache=True)
                cache, logits = output.past_key_values, output.logits[:, -1]
                if sampling.greedy:
                    step = logits.argmax(dim=-1, keepdim=True)
                else:
                    step = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
                rows.append(step)
            yield from torch.cat(rows, dim=1).tolist()
