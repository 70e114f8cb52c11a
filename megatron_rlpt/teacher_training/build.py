"""``rlpt teacher data``: from documents to prompts with right answers, in two parts that share no document."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_rlpt.config import AnswerForm, Config, Role
from megatron_rlpt.errors import DataError
from megatron_rlpt.evaluation.labelled_pairs import (
    LabelledPair,
    PairPlan,
    as_json_lines,
    pairs_of_episodes,
    pairs_of_world,
)
from megatron_rlpt.files import new_folder
from megatron_rlpt.observe import get_logger
from megatron_rlpt.teacher_training.corpus import Split, TeacherText, cut_episodes, split_documents
from megatron_rlpt.teacher_training.judge_examples import (
    QUALITY_AXIS,
    SAFETY_AXIS,
    quality_examples,
    safety_examples,
)
from megatron_rlpt.teacher_training.labelled_prompt import LabelledPrompt, require_usable
from megatron_rlpt.teacher_training.request import HELDOUT, TRAIN, DataRequest
from megatron_rlpt.teacher_training.rewriter_examples import rewriter_examples
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.measures import measure_text

_log = get_logger(__name__)

_VERSION = 1


def build_teacher_data(config: Config, asked: DataRequest) -> str:
    """Write ``train.jsonl``, ``heldout.jsonl``, ``card.json`` and for a judge ``heldout_pairs.jsonl``.

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
    plans = asked.plans(config)
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
        parts[name] = list(_examples(pairs[name], config, asked, tokenizer))
        require_usable(parts[name], name)
    with new_folder(asked.out) as folder:
        for name, examples in parts.items():
            (folder / f"{name}.jsonl").write_text("".join(one.line() for one in examples), encoding="utf-8")
        if asked.role is Role.judge:
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
    pairs: Sequence[LabelledPair], config: Config, asked: DataRequest, tokenizer: PolicyTokenizer
) -> Iterator[LabelledPrompt]:
    if asked.role is Role.rewriter:
        yield from rewriter_examples(pairs, config, asked, tokenizer)
        return
    axes, form = asked.axes or (QUALITY_AXIS,), asked.form or AnswerForm.reasoned
    if QUALITY_AXIS in axes:
        yield from quality_examples(pairs, tokenizer, form, asked.length, asked.seed)
    if SAFETY_AXIS in axes:
        assert asked.world is not None
        measured = _measured_safety(pairs, World.load(asked.world), tokenizer)
        yield from safety_examples(_balanced(measured), form, asked.length, asked.seed)


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


def _card(asked: DataRequest, split: Split, parts: dict[str, list[LabelledPrompt]]) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "role": asked.role.value,
        "request": asked.as_dict(),
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
                "tasks": dict(Counter(one.task for one in examples)),
                "kinds": dict(Counter(one.label["kind"] for one in examples)),
                "verdicts": dict(Counter(one.verdict for one in examples)),
            }
            for name, examples in parts.items()
        },
    }
