"""Texts with a right verdict on safety or factuality, to train judges on and to measure them: of a file, or a world."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rlpt.config import Config
from megatron_rlpt.config.evaluation_sets import FACTUALITY, SAFETY
from megatron_rlpt.evaluation.formats.records import Row, read_rows
from megatron_rlpt.evaluation.labelled_pairs import LabelledPair, PairPlan, pairs_of_world
from megatron_rlpt.evaluation.prompt_sets import text_episode
from megatron_rlpt.evaluation.prompts import TextPrompt
from megatron_rlpt.teacher.verdicts import parsing
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer, TextTokens
from megatron_rlpt.types import Candidate, Episode, Group, Source, derive_seed, stable_id
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.grammar import text_of, words_of
from megatron_rlpt.world.measures import measure_text
from megatron_rlpt.world.rewriter import continue_words
from megatron_rlpt.world.writer import Manner

HELDOUT_TEXTS = "heldout_texts.jsonl"
"""Of a folder of ``rlpt teacher data``."""
POINTWISE: Mapping[str, Mapping[str, float]] = {SAFETY: parsing.SAFETY, FACTUALITY: parsing.FACTUALITY}
"""Axes that judge one text -> verdict -> its value."""
ORIGINAL, WRITTEN = "original", "written"
"""Kinds of texts that are not spoiled: of the document, and another way to go on."""
_MANNERS = (Manner(), Manner(asides=0.9), Manner(false_facts=0.5))
"""True texts, texts with more rumors, and texts that lie."""
_FETCH = "name a file of records with text, verdict and, for factuality, prefix and reference"


@dataclass(frozen=True)
class LabelledText:
    """A text with its right verdict."""

    axis: str
    """``safety`` or ``factuality``."""
    episode: Episode
    """Its prefix goes before the text, its suffix is a text that is true; both may be empty for safety."""
    tokens: tuple[int, ...]
    verdict: str
    """A word of the axis."""
    kind: str
    """What was done to the text."""

    def group(self) -> Group:
        """Return the text as the only candidate of a group."""
        return Group(self.episode, (Candidate(Source.ROLLOUT, self.tokens),))


def texts_of_file(path: Path, config: Config, tokenizer: PolicyTokenizer) -> list[LabelledText]:
    """Read every text of a file.

    Args:
        path: JSON Lines, JSON, CSV or Parquet with ``text``, ``verdict`` (which tells the axis), optionally ``kind``
            and, for factuality, ``prefix`` and ``reference`` (a text that is true).
        config: gives ``data.max_prefix``.
        tokenizer: of the policy.

    Raises:
        DataError: the file cannot be read, or a verdict is unknown.
    """
    return [_read(row, config, tokenizer) for row in read_rows(path, _FETCH)]


def has_verdicts(path: Path) -> bool:
    """Return whether the records of a file are texts with a verdict.

    Raises:
        DataError: the file cannot be read.
    """
    return "verdict" in read_rows(path, _FETCH)[0].values


def texts_of_world(
    folder: Path, config: Config, tokenizer: PolicyTokenizer, plan: PairPlan, axis: str
) -> list[LabelledText]:
    """Label held-out documents of a world, and the same spoiled, by its exact measures.

    Args:
        folder: of the world (``rlpt world make``).
        config: gives ``data.max_prefix`` and lengths.
        tokenizer: of the policy.
        plan: of the pairs whose texts are labelled; at most as many texts are returned.
        axis: key of ``POINTWISE``.

    Raises:
        ConfigError: an unknown kind, or lengths that no document has.
        DataError: the world cannot be read.
    """
    pairs = pairs_of_world(folder, config, tokenizer, plan)
    return texts_of_pairs(World.load(folder), pairs, tokenizer, axis, plan.seed, most=plan.pairs)


def texts_of_pairs(
    world: World, pairs: Sequence[LabelledPair], tokenizer: PolicyTokenizer, axis: str, seed: int, most: int = 0
) -> list[LabelledText]:
    """Label the texts of pairs and, for factuality, others in their place, by exact measures.

    Other texts matter because a judge that only ever sees the reference itself called true learns to compare words.

    Args:
        world: what is true.
        pairs: of its documents.
        tokenizer: of the policy.
        axis: key of ``POINTWISE``.
        seed: of the other texts, and of the choice.
        most: texts; 0: all.

    Returns:
        Equally many of every verdict that is found, each text once, in a random order.
    """
    found: dict[object, LabelledText] = {}
    for number, pair in enumerate(pairs):
        prefix = tokenizer.text_of(pair.episode.prefix)
        shown = [(pair.good, pair.kind if pair.other else ORIGINAL), (pair.bad, pair.kind)]
        if axis == FACTUALITY:
            shown += [(tokens, WRITTEN) for tokens in _written(world, pair, tokenizer, derive_seed(seed, number))]
        for tokens, kind in shown:
            text = tokenizer.text_of(tokens, pair.episode.prefix)
            if tokenizer.is_blank(tokenizer.encode(text)):
                continue  # a row of full stops is no word of a world's tokenizer, so no file could hold it
            measures = measure_text(world, prefix, text)
            safe = "safe" if measures.safe else "unsafe"
            verdict = safe if axis == SAFETY else measures.hallucination.value
            key = text if axis == SAFETY else (pair.episode.prefix, text)
            found.setdefault(key, LabelledText(axis, pair.episode, tokens, verdict, kind))
    return balanced(list(found.values()), seed, most)


def balanced(texts: Sequence[LabelledText], seed: int, most: int = 0) -> list[LabelledText]:
    """Return equally many texts of every verdict: a judge that always says one word must not look good.

    Args:
        texts: to choose from.
        seed: of choice and order.
        most: texts; 0: all.
    """
    rng = random.Random(derive_seed(seed, "balanced"))
    by_verdict: dict[str, list[LabelledText]] = {}
    for one in texts:
        by_verdict.setdefault(one.verdict, []).append(one)
    if not by_verdict:
        return []
    fewest = min(map(len, by_verdict.values()))
    fewest = min(fewest, max(1, most // len(by_verdict))) if most else fewest
    chosen = [one for row in by_verdict.values() for one in rng.sample(row, fewest)]
    rng.shuffle(chosen)
    return chosen


def as_json_lines(texts: Iterable[LabelledText], tokenizer: TextTokens) -> Iterator[str]:
    """Yield texts as lines that ``texts_of_file`` reads."""
    for one in texts:
        prefix = one.episode.prefix
        record = {"text": tokenizer.text_of(one.tokens, prefix), "verdict": one.verdict, "kind": one.kind}
        if one.axis == FACTUALITY:
            record |= {"prefix": tokenizer.text_of(prefix), "reference": tokenizer.text_of(one.episode.suffix, prefix)}
        yield json.dumps(record) + "\n"


def _written(world: World, pair: LabelledPair, tokenizer: PolicyTokenizer, seed: int) -> Iterator[tuple[int, ...]]:
    """Yield other continuations of the pair's prefix, as long as the good one."""
    prefix = pair.episode.prefix
    before = words_of(tokenizer.text_of(prefix))
    for number, manner in enumerate(_MANNERS):
        rng = random.Random(derive_seed(seed, "written", number))
        # Words of a world may be several tokens of another tokenizer, so cut tokens, not words.
        words = continue_words(before, len(pair.good), world, rng, manner)
        whole = text_of([*before, *words])
        tokens = tuple(tokenizer.continue_with(prefix, whole[len(text_of(before)) :]))[: len(pair.good)]
        yield tokens[: tokenizer.whole_characters(tokens, prefix) or len(tokens)]


def _read(row: Row, config: Config, tokenizer: PolicyTokenizer) -> LabelledText:
    verdict = row.text("verdict").strip().lower()
    axis = next((axis for axis, words in POINTWISE.items() if verdict in words), "")
    if not axis:
        allowed = ", ".join(word for words in POINTWISE.values() for word in words)
        raise row.error(f"has the verdict {verdict!r}; allowed: {allowed}")
    text, name = row.text("text"), f"{row.path.stem}-{row.number}"
    kind = row.optional("kind", "label") or "unnamed"
    if axis == SAFETY:
        episode = Episode(stable_id(name, text), (), (), row.path.name, name, 0)
    else:
        prompt = TextPrompt(name, row.text("prefix"), row.text("reference"))
        episode = text_episode(prompt, str(row.path), config, tokenizer)
        # Several texts of a file may have the same prefix and reference; a judge's seed and fence follow the episode.
        episode = replace(episode, id=stable_id(episode.id, text))
    tokens = tuple(tokenizer.continue_with(episode.prefix, text))
    if tokenizer.is_blank(tokens):
        raise row.error("has a text of which the tokenizer of model.path knows nothing; remove it")
    return LabelledText(axis, episode, tokens, verdict, kind)
