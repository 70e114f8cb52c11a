"""Pairs of a good and a worse continuation of a text, to measure judges on: of a file, a world, or any documents."""

from __future__ import annotations

import json
import math
import random
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rlpt.config import Config
from megatron_rlpt.data import heldout_episodes
from megatron_rlpt.errors import ConfigError, DataError
from megatron_rlpt.evaluation import formats
from megatron_rlpt.evaluation.formats.records import read_rows
from megatron_rlpt.evaluation.prompt_sets import text_episode
from megatron_rlpt.evaluation.prompts import TextPrompt
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Source, derive_seed
from megatron_rlpt.world.corruptions import Corruption, corrupt
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.grammar import text_of, words_of
from megatron_rlpt.world.make import HELDOUT

HELDOUT_PAIRS = "heldout_pairs.jsonl"
"""Of a folder of ``rlpt teacher data``."""
PARTS = 3
"""A corruption begins in the first, middle or last third of a text."""
_LEAST_PREFIX = 12
"""Words of a world's document that stay before a continuation."""
_TRIES = 20
"""Documents tried for a corruption before it is given up."""
_FETCH = "name a file of records with prefix, good, bad and kind"


@dataclass(frozen=True)
class LabelledPair:
    """A text, its good continuation and a worse one."""

    episode: Episode
    """Prefix and the continuation of the document."""
    bad: tuple[int, ...]
    kind: str
    """What is wrong with the bad one."""
    other: tuple[int, ...] = ()
    """The good one, if it is not that of the document."""

    @property
    def good(self) -> tuple[int, ...]:
        """Tokens of the good one."""
        return self.other or self.episode.suffix

    @property
    def begins_at(self) -> float:
        """Where the two begin to differ, as a share (0 to 1) of the good one's tokens."""
        shorter = min(len(self.good), len(self.bad))
        same = next((index for index in range(shorter) if self.good[index] != self.bad[index]), shorter)
        return min(same, len(self.good) - 1) / len(self.good)

    def group(self, *, good_first: bool = True) -> Group:
        """Return both as the candidates of a group."""
        rows = (self.good, self.bad) if good_first else (self.bad, self.good)
        return Group(self.episode, tuple(Candidate(Source.ROLLOUT, tokens) for tokens in rows))


@dataclass(frozen=True)
class PairPlan:
    """How many pairs of which sort to make."""

    pairs: int
    kinds: tuple[str, ...] = ()
    """Empty: all."""
    lengths: tuple[int, ...] = ()
    """Tokens of the good continuation; empty: ``data.suffix_length``, its half and its quarter."""
    seed: int = 1

    def sized(self, config: Config) -> tuple[int, ...]:
        """Return the lengths."""
        full = config.data.suffix_length
        return self.lengths or tuple(sorted({max(4, full // 4), max(4, full // 2), full}))

    def of(self, known: Sequence[str]) -> tuple[str, ...]:
        """Return the kinds.

        Raises:
            ConfigError: one is not among ``known``.
        """
        for kind in self.kinds:
            if kind not in known:
                raise ConfigError(f"--kind is {kind}; allowed: {', '.join(known)}")
        return self.kinds or tuple(known)


def pairs_of_file(path: Path, config: Config, tokenizer: PolicyTokenizer, form: str = "jsonl") -> list[LabelledPair]:
    """Read every pair of a file.

    Args:
        path: JSON Lines, JSON, CSV or Parquet with ``prefix``, ``good``, ``bad`` and optionally ``kind``; or a file or
            folder in another format of ``evaluation/formats`` whose prompts have a right and a wrong continuation.
        config: gives ``data.max_prefix``.
        tokenizer: of the policy.
        form: name of the format.

    Raises:
        ConfigError: there is no such format.
        DataError: the file cannot be read, or has no pair.
    """
    if form == "jsonl":
        rows = read_rows(path, _FETCH)
        prompts = [
            TextPrompt(
                f"{path.stem}-{row.number}",
                row.text("prefix", "text", "prompt"),
                row.text("good", "reference"),
                row.text("bad", "other"),
                row.optional("kind", "label") or "unnamed",
            )
            for row in rows
        ]
    elif form in formats.FORMATS:
        read = formats.load(form, path)
        prompts = [one for one in read if isinstance(one, TextPrompt) and one.reference and one.other]
    else:
        raise ConfigError(f"--format is {form}; allowed: {', '.join(formats.FORMATS)}")
    pairs = [_pair(one, str(path), config, tokenizer) for one in prompts]
    found = [pair for pair in pairs if pair is not None]
    if not found:
        raise DataError(f"{path} has no record with a good and a bad continuation that differ; {_FETCH}")
    return found


def pairs_of_world(
    folder: Path,
    config: Config,
    tokenizer: PolicyTokenizer,
    plan: PairPlan,
    texts: Sequence[str] | None = None,
) -> list[LabelledPair]:
    """Corrupt documents of a world in every way of ``world_kinds``.

    Args:
        folder: of the world (``rlpt world make``).
        config: gives ``data.max_prefix`` and lengths.
        tokenizer: of the policy.
        plan: how many of which.
        texts: clean documents; None: the held-out ones of the folder.

    Raises:
        ConfigError: an unknown kind, or lengths that no document has.
        DataError: the world cannot be read.
    """
    world, path = World.load(folder), folder / f"{HELDOUT}.jsonl"
    if texts is None:
        texts = [row.text("text") for row in read_rows(path, "Make the world anew with rlpt world make.")]
    documents = [words_of(text) for text in texts]

    def make(kind: str, document: int, length: int, part: int, rng: random.Random) -> TextPrompt | None:
        words = documents[document]
        if len(words) < _LEAST_PREFIX + length:
            return None
        cut = rng.randint(_LEAST_PREFIX, len(words) - length)
        before, good = words[:cut], words[cut : cut + length]
        kept = length * part // PARTS
        bad: Sequence[str] | Failed
        if kind in OF_WORDS:
            bad = OF_WORDS[kind](good[kept:], [], rng)
        else:
            bad = corrupt(world, Corruption(kind), [*before, *good[:kept]], good[kept:], rng.getrandbits(32))
        if isinstance(bad, Failed):
            return None
        both = [text_of([*before, *good]), text_of([*before, *good[:kept], *bad])]
        start = len(text_of(before))
        name = f"{kind}-{document}-{cut}-{length}"
        return TextPrompt(name, both[0][:start], both[0][start:], both[1][start:], kind)

    return _made(plan.of(world_kinds()), len(documents), str(path), config, tokenizer, plan, make)


def world_kinds() -> tuple[str, ...]:
    """Return the ways to spoil a document of a world: its own, and those that only move words."""
    return (*(kind.value for kind in Corruption), *OF_WORDS)


def pairs_of_documents(config: Config, tokenizer: PolicyTokenizer, plan: PairPlan) -> list[LabelledPair]:
    """Corrupt the suffixes of ``data.heldout``, whatever they are about.

    Raises:
        ConfigError: ``data.heldout`` is empty, or a kind is unknown.
        DataError: it cannot be read, or has fewer than two documents.
    """
    episodes = heldout_episodes(
        config.data,
        plan.pairs,
        tokenizer.encode,
        bos_id=tokenizer.bos_id,
        starts_character=tokenizer.starts_character,
        vocabulary=tokenizer.vocabulary,
    )
    return pairs_of_episodes(episodes, "data.heldout", config, tokenizer, plan)


def pairs_of_episodes(
    episodes: Sequence[Episode], path: str, config: Config, tokenizer: PolicyTokenizer, plan: PairPlan
) -> list[LabelledPair]:
    """Corrupt the suffixes of ``episodes`` in every way of ``CORRUPTIONS``.

    Args:
        episodes: at least two, of several documents.
        path: where they are from, for errors.
        config: gives ``data.max_prefix`` and lengths.
        tokenizer: of the policy.
        plan: how many of which.

    Raises:
        ConfigError: a kind is unknown.
        DataError: no pair can be made.
    """

    def make(kind: str, document: int, length: int, part: int, rng: random.Random) -> TextPrompt | None:
        episode = episodes[document]
        other = next(
            (one for one in (rng.choice(episodes) for _ in range(_TRIES)) if one.document != episode.document), None
        )
        if other is None:
            return None
        whole = tokenizer.whole_characters(episode.suffix[:length], episode.prefix)
        good = tokenizer.text_of(episode.suffix[:whole], episode.prefix)
        pieces = _PIECES.findall(good)
        kept = len(pieces) * part // PARTS
        spoiled = CORRUPTIONS[kind](pieces[kept:], _PIECES.findall(tokenizer.text_of(other.suffix, other.prefix)), rng)
        bad = "".join([*pieces[:kept], *spoiled])
        return TextPrompt(f"{kind}-{episode.id}-{length}", tokenizer.text_of(episode.prefix), good, bad, kind)

    return _made(plan.of(list(CORRUPTIONS)), len(episodes), path, config, tokenizer, plan, make)


Make = Callable[[str, int, int, int, random.Random], TextPrompt | None]


def _made(
    kinds: Sequence[str],
    documents: int,
    path: str,
    config: Config,
    tokenizer: PolicyTokenizer,
    plan: PairPlan,
    make: Make,
) -> list[LabelledPair]:
    """Make pairs of every kind, length and part in turn, each from the next document that can be corrupted so."""
    lengths, found = plan.sized(config), []
    document = 0
    for number in range(plan.pairs):
        kind = kinds[number % len(kinds)]
        turn = number // len(kinds)
        part, length = turn % PARTS, lengths[turn // PARTS % len(lengths)]
        for _ in range(_TRIES):
            rng = random.Random(derive_seed(plan.seed, "pair", number, document))
            prompt = make(kind, document % documents, length, part, rng)
            document += 1
            pair = prompt and _pair(prompt, path, config, tokenizer, cut=True)
            if pair:
                found.append(pair)
                break
    if not found:
        raise DataError(
            f"{path} has no document that gives a pair of {min(lengths)} tokens or more; give longer documents, or "
            "choose a smaller --length"
        )
    return found


def _pair(
    prompt: TextPrompt, path: str, config: Config, tokenizer: PolicyTokenizer, *, cut: bool = False
) -> LabelledPair | None:
    """Return the pair; None if nothing differs. ``cut`` the bad one to the length of the good one."""
    episode = text_episode(prompt, path, config, tokenizer)
    bad = tuple(tokenizer.continue_with(episode.prefix, prompt.other))
    if cut:
        bad = bad[: len(episode.suffix)]
        bad = bad[: tokenizer.whole_characters(bad, episode.prefix) or len(bad)]
    if bad == episode.suffix or tokenizer.is_blank(bad) or tokenizer.is_blank(episode.suffix):
        return None
    return LabelledPair(episode, bad, prompt.label or "unnamed")


_PIECES = re.compile(r"\s*\S+|\s+$")
"""Words, each with the white space before it."""
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*$")

Pieces = list[str]


def _shuffled(pieces: Pieces, other: Pieces, rng: random.Random) -> Pieces:
    words = [piece.strip() for piece in pieces]
    rng.shuffle(words)
    return [_with(piece, word) for piece, word in zip(pieces, words, strict=True)]


def _spoiled(pieces: Pieces, other: Pieces, rng: random.Random) -> Pieces:
    words, pool = list(pieces), [piece.strip() for piece in other if piece.strip()]
    for index in rng.sample(range(len(words)), max(1, math.ceil(len(words) / 5)) if words and pool else 0):
        words[index] = _with(words[index], rng.choice(pool))
    return words


def _looped(pieces: Pieces, other: Pieces, rng: random.Random) -> Pieces:
    if len(pieces) < 2:
        return pieces
    size = rng.randint(1, max(1, min(6, len(pieces) // 2)))
    loop = [pieces[0] if pieces[0][:1].isspace() else f" {pieces[0]}", *pieces[1:size]]
    return [*pieces[:size], *(loop * (len(pieces) // size))][: len(pieces)]


def _foreign(pieces: Pieces, other: Pieces, rng: random.Random) -> Pieces:
    if not other:
        return pieces
    start = rng.randrange(len(other))
    tail = (other[start:] + other[:start])[: len(pieces)]
    return [_with(pieces[0], tail[0].strip()), *tail[1:]] if pieces else pieces


def _clipped(pieces: Pieces, other: Pieces, rng: random.Random) -> Pieces:
    words: Pieces = []
    sentence: Pieces = []
    for piece in pieces:
        sentence.append(piece)
        if _SENTENCE_END.search(piece):
            kept = sentence[: max(1, len(sentence) - rng.randint(1, 3))]
            words += [_SENTENCE_END.sub("", one) for one in kept[-1:]] if len(kept) == 1 else kept
            sentence = []
    return words + sentence


def _dropped(pieces: Pieces, other: Pieces, rng: random.Random) -> Pieces:
    return [piece for piece in pieces if rng.random() >= 1 / 3]


def _transposed(pieces: Pieces, other: Pieces, rng: random.Random) -> Pieces:
    words = list(pieces)
    for index in range(0, len(words) - 1, 3):
        first, second = words[index], words[index + 1]
        words[index], words[index + 1] = _with(first, second.strip()), _with(second, first.strip())
    return words


def _misspelled(pieces: Pieces, other: Pieces, rng: random.Random) -> Pieces:
    return ["".join(_other_letter(one, rng) if rng.random() < 1 / 12 else one for one in piece) for piece in pieces]


def _other_letter(character: str, rng: random.Random) -> str:
    return rng.choice(string.ascii_lowercase) if character.isalpha() else character


def _with(piece: str, word: str) -> str:
    """Return ``word`` with the white space before ``piece``."""
    return piece[: len(piece) - len(piece.lstrip())] + word


CORRUPTIONS: Mapping[str, Callable[[Pieces, Pieces, random.Random], Pieces]] = {
    "shuffled": _shuffled,
    "spoiled": _spoiled,
    "looped": _looped,
    "foreign": _foreign,
    "clipped": _clipped,
    "dropped": _dropped,
    "transposed": _transposed,
    "misspelled": _misspelled,
}
"""Ways to spoil any text, by the names of ``world/corruptions.py``."""
OF_WORDS: Mapping[str, Callable[[Pieces, Pieces, random.Random], Pieces]] = {
    "dropped": _dropped,
    "transposed": _transposed,
}
"""Those of them that a world does not have, and whose words are words of the text."""


def as_json_lines(pairs: Sequence[LabelledPair], tokenizer: PolicyTokenizer) -> Iterator[str]:
    """Yield pairs as lines that ``pairs_of_file`` reads."""
    for pair in pairs:
        prefix = pair.episode.prefix
        texts = {"good": tokenizer.text_of(pair.good, prefix), "bad": tokenizer.text_of(pair.bad, prefix)}
        yield json.dumps({"prefix": tokenizer.text_of(prefix), **texts, "kind": pair.kind}) + "\n"
