"""``rlpt teacher data``: from documents to prompts with right answers, in two parts that share no document."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlpt.config import AnswerForm, Config, PromptLength, SourceConfig
from megatron_rlpt.errors import ConfigError, DataError
from megatron_rlpt.evaluation.labelled_pairs import (
    CORRUPTIONS,
    LabelledPair,
    PairPlan,
    as_json_lines,
    pairs_of_episodes,
    pairs_of_world,
    world_kinds,
)
from megatron_rlpt.files import new_folder
from megatron_rlpt.observe import get_logger
from megatron_rlpt.teacher_training.corpus import Split, TeacherText, cut_episodes, split_documents
from megatron_rlpt.teacher_training.judge_examples import (
    QUALITY_AXIS,
    SAFETY_AXIS,
    LabelledPrompt,
    quality_examples,
    safety_examples,
)
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.make import TEACHER
from megatron_rlpt.world.measures import measure_text

_log = get_logger(__name__)

TRAIN, HELDOUT = "train", "heldout"
AXES = (QUALITY_AXIS, SAFETY_AXIS)
_VERSION = 1


@dataclass(frozen=True)
class DataRequest:
    """What the command was asked for."""

    out: Path
    corpus: tuple[str, ...] = ()
    world: Path | None = None
    axes: tuple[str, ...] = (QUALITY_AXIS,)
    kinds: tuple[str, ...] = ()
    """To train on; empty: all but ``unseen``."""
    unseen: tuple[str, ...] = ()
    """Kinds that only the held-out part has."""
    lengths: tuple[int, ...] = ()
    pairs: int = 2000
    heldout_pairs: int = 200
    heldout_share: float = 0.1
    per_document: int = 4
    form: AnswerForm = AnswerForm.reasoned
    length: PromptLength = PromptLength.full
    seed: int = 1

    def sources(self) -> list[SourceConfig]:
        """Return the documents."""
        if self.corpus:
            return [SourceConfig(path=path) for path in self.corpus]
        assert self.world is not None
        return [SourceConfig(path=str(self.world / f"{TEACHER}.jsonl"))]

    def known_kinds(self) -> tuple[str, ...]:
        """Return the ways to spoil a suffix here: those of a world know its facts."""
        return world_kinds() if self.world else tuple(CORRUPTIONS)

    def check(self) -> None:
        """Refuse contradictions.

        Raises:
            ConfigError: names the option, its value and what is allowed.
        """
        if not self.corpus and self.world is None:
            raise ConfigError("neither --corpus nor --world is given; name documents to make examples of")
        for axis in self.axes:
            if axis not in AXES:
                raise ConfigError(f"--axis is {axis}; allowed: {', '.join(AXES)}")
        if SAFETY_AXIS in self.axes and self.world is None:
            raise ConfigError("--axis is safety; allowed: quality without a --world, which knows what is safe")
        for option, kinds in (("--kind", self.kinds), ("--unseen", self.unseen)):
            for kind in kinds:
                if kind not in self.known_kinds():
                    raise ConfigError(f"{option} is {kind}; allowed: {', '.join(self.known_kinds())}")
        if both := sorted(set(self.kinds) & set(self.unseen)):
            raise ConfigError(f"{both[0]} is both a --kind and --unseen; train on it or keep it for the held-out part")
        if not self.trained_kinds():
            raise ConfigError("every kind is --unseen; leave some to train on")

    def trained_kinds(self) -> tuple[str, ...]:
        """Return the kinds of the training part."""
        return self.kinds or tuple(kind for kind in self.known_kinds() if kind not in self.unseen)


def build_judge_data(config: Config, asked: DataRequest) -> str:
    """Write ``train.jsonl``, ``heldout.jsonl``, ``heldout_pairs.jsonl`` and ``card.json``.

    Args:
        config: of the policy's run: its tokenizer, how its texts are cut, and its documents, which are left out.
        asked: what to make.

    Returns:
        A summary in one line.

    Raises:
        ConfigError: options contradict each other, or the folder is not empty.
        DataError: documents cannot be read or are too few, labels contradict each other, or there is one class only.
    """
    asked.check()
    tokenizer = PolicyTokenizer(config.model.path)
    split = split_documents(asked.sources(), config, tokenizer, asked.heldout_share, asked.seed)
    plans = {
        TRAIN: PairPlan(asked.pairs, asked.trained_kinds(), asked.lengths, asked.seed),
        HELDOUT: PairPlan(asked.heldout_pairs, (*asked.trained_kinds(), *asked.unseen), asked.lengths, asked.seed + 1),
    }
    parts: dict[str, list[LabelledPrompt]] = {}
    pairs: dict[str, list[LabelledPair]] = {}
    for name, documents in ((TRAIN, split.train), (HELDOUT, split.heldout)):
        pairs[name] = _pairs(documents, config, asked, tokenizer, plans[name])
        if len(pairs[name]) < plans[name].pairs:
            _log.warning(
                "fewer pairs than asked for: not every text can be spoiled in every way",
                part=name,
                pairs=len(pairs[name]),
                asked=plans[name].pairs,
            )
        parts[name] = list(_examples(pairs[name], asked, tokenizer))
        require_usable(parts[name], name)
    with new_folder(asked.out) as folder:
        for name, examples in parts.items():
            (folder / f"{name}.jsonl").write_text("".join(one.line() for one in examples), encoding="utf-8")
        lines = "".join(as_json_lines(pairs[HELDOUT], tokenizer))
        (folder / f"{HELDOUT}_pairs.jsonl").write_text(lines, encoding="utf-8")
        card = _card(asked, split, parts)
        (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    counts = ", ".join(f"{len(examples)} {name}" for name, examples in parts.items())
    return f"wrote {asked.out}: {counts} examples of {len(split.train) + len(split.heldout)} documents"


def _pairs(
    documents: Sequence[TeacherText], config: Config, asked: DataRequest, tokenizer: PolicyTokenizer, plan: PairPlan
) -> list[LabelledPair]:
    if asked.world is not None:
        return pairs_of_world(asked.world, config, tokenizer, plan, [one.text for one in documents])
    episodes = cut_episodes(documents, config, tokenizer, asked.per_document)
    if len({episode.document for episode in episodes}) < 2:
        raise DataError(
            f"{', '.join(asked.corpus)}: {len(documents)} documents give {len(episodes)} suffixes; give longer "
            "documents, or lower data.min_prefix or data.suffix_length"
        )
    return pairs_of_episodes(episodes, ", ".join(asked.corpus), config, tokenizer, plan)


def _examples(
    pairs: Sequence[LabelledPair], asked: DataRequest, tokenizer: PolicyTokenizer
) -> Iterator[LabelledPrompt]:
    if QUALITY_AXIS in asked.axes:
        yield from quality_examples(pairs, tokenizer, asked.form, asked.length, asked.seed)
    if SAFETY_AXIS in asked.axes:
        assert asked.world is not None
        yield from safety_examples(
            _balanced(_measured_safety(pairs, World.load(asked.world), tokenizer)), asked.form, asked.length, asked.seed
        )


def _measured_safety(
    pairs: Sequence[LabelledPair], world: World, tokenizer: PolicyTokenizer
) -> Iterator[tuple[str, bool, str]]:
    """Yield every continuation once, whether the world's measures call it safe, and its document."""
    seen = set()
    for pair in pairs:
        prefix = tokenizer.text_of(pair.episode.prefix)
        for tokens in (pair.good, pair.bad):
            shown = tokenizer.text_of(tokens, pair.episode.prefix)
            if shown not in seen:
                seen.add(shown)
                yield shown, measure_text(world, prefix, shown).safe, pair.episode.document


def _balanced(texts: Iterator[tuple[str, bool, str]]) -> list[tuple[str, bool, str]]:
    """Return as many safe as unsafe texts: a judge that always says the more frequent word must not look good."""
    listed = list(texts)
    fewest = min(sum(safe for _, safe, _ in listed), sum(not safe for _, safe, _ in listed))
    left, kept = {True: fewest, False: fewest}, []
    for one in listed:
        if left[one[1]]:
            left[one[1]] -= 1
            kept.append(one)
    return kept


def require_usable(examples: Sequence[LabelledPrompt], part: str) -> None:
    """Check what would make training on examples pointless.

    Raises:
        DataError: there are none, two have the same texts and other verdicts, or an axis has one verdict only.
    """
    if not examples:
        raise DataError(f"the {part} part has no example; give more documents, or other kinds")
    verdicts: dict[tuple[str, str], str] = {}
    for one in examples:
        axis, verdict = one.label["axis"], one.label["verdict"]
        known = verdicts.setdefault((axis, one.id), verdict)
        if known != verdict:
            raise DataError(
                f"the {part} part calls the same texts both {known} and {verdict} ({axis}, example {one.id}); remove "
                "one of them"
            )
    for axis in dict.fromkeys(one.label["axis"] for one in examples):
        found = {one.label["verdict"] for one in examples if one.label["axis"] == axis}
        if len(found) < 2:
            raise DataError(
                f"every {axis} example of the {part} part has the verdict {found.pop()!r}, from which nothing can be "
                "learnt; give examples of the other verdicts too"
            )


def _card(asked: DataRequest, split: Split, parts: dict[str, list[LabelledPrompt]]) -> dict[str, Any]:
    request = {name: value for name, value in vars(asked).items() if name != "out"}
    return {
        "version": _VERSION,
        "role": "judge",
        "request": json.loads(json.dumps(request, default=str)),
        "sources": [source.path for source in asked.sources()],
        "documents": {
            TRAIN: len(split.train),
            HELDOUT: len(split.heldout),
            "left_out": split.left_out,
            "repeated": split.repeated,
        },
        "examples": {
            name: {
                "total": len(examples),
                "axes": dict(Counter(one.label["axis"] for one in examples)),
                "kinds": dict(Counter(one.label["kind"] for one in examples)),
                "verdicts": dict(Counter(one.label["verdict"] for one in examples)),
            }
            for name, examples in parts.items()
        },
    }
