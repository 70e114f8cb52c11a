"""``rlpt teacher data``: from documents to prompts with right answers, in two parts that share no document."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from megatron_rlpt.config import AnswerForm, Config, Role
from megatron_rlpt.config.evaluation_sets import QUALITY
from megatron_rlpt.evaluation import labelled_texts
from megatron_rlpt.evaluation.labelled_pairs import HELDOUT_PAIRS, LabelledPair, as_json_lines
from megatron_rlpt.evaluation.labelled_texts import HELDOUT_TEXTS, LabelledText
from megatron_rlpt.files import new_folder
from megatron_rlpt.teacher_training.corpus import Split, split_documents
from megatron_rlpt.teacher_training.judge_examples import quality_examples, text_examples
from megatron_rlpt.teacher_training.labelled_prompt import LabelledPrompt, require_usable, write_parts
from megatron_rlpt.teacher_training.material import Material
from megatron_rlpt.teacher_training.request import HELDOUT, SAMPLED, TRAIN, DataRequest
from megatron_rlpt.teacher_training.rewriter_examples import rewriter_examples, voted_examples
from megatron_rlpt.teacher_training.teacher_answers import TeacherAnswers
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import derive_seed
from megatron_rlpt.world.facts import World

_VERSION = 1


def build_teacher_data(config: Config, asked: DataRequest) -> str:
    """Write ``train.jsonl``, ``heldout.jsonl``, ``card.json`` and for a judge what the held-out part is made of.

    Args:
        config: of the policy's run: its tokenizer, how its texts are cut, and its documents, which are left out.
        asked: what to make.

    Returns:
        A summary in one line.

    Raises:
        ConfigError: options contradict each other, or the folder is not empty.
        DataError: documents cannot be read or are too few, labels contradict each other, or there is one class only.
        TeacherError: a teacher is to spoil or to vote, and no server answers.
    """
    asked.check()
    config = asked.cut_for(config)
    tokenizer = PolicyTokenizer(config.model.path)
    split = split_documents(asked.sources(), config, tokenizer, asked.heldout_share, asked.seed)
    plans = asked.plans(config)
    teacher = TeacherAnswers(config, tokenizer, asked.answers, asked.seed)
    material = Material(config, asked, tokenizer, teacher)
    parts: dict[str, list[LabelledPrompt]] = {}
    pairs: dict[str, list[LabelledPair]] = {}
    texts: dict[str, list[LabelledText]] = {}
    for name, documents in ((TRAIN, split.train), (HELDOUT, split.heldout)):
        pairs[name] = material.pairs(name, documents, plans[name])
        texts[name] = material.texts(name, documents, pairs[name], plans[name])
        parts[name] = mixed(_examples(pairs[name], texts[name], config, asked, tokenizer), asked.seed)
        require_usable(parts[name], name)
    with new_folder(asked.out) as folder:
        write_parts(folder, parts, _card(asked, split, parts, teacher.facts()))
        if QUALITY in asked.judged():
            lines = "".join(as_json_lines(pairs[HELDOUT], tokenizer))
            (folder / HELDOUT_PAIRS).write_text(lines, encoding="utf-8")
        if texts[HELDOUT] and asked.role is Role.judge:
            lines = "".join(labelled_texts.as_json_lines(texts[HELDOUT], tokenizer))
            (folder / HELDOUT_TEXTS).write_text(lines, encoding="utf-8")
    counts = ", ".join(f"{len(examples)} {name}" for name, examples in parts.items())
    return f"wrote {asked.out}: {counts} examples of {len(split.train) + len(split.heldout)} documents"


def _examples(
    pairs: Sequence[LabelledPair],
    texts: Sequence[LabelledText],
    config: Config,
    asked: DataRequest,
    tokenizer: PolicyTokenizer,
) -> Iterator[LabelledPrompt]:
    if asked.role is Role.rewriter:
        yield from rewriter_examples(pairs, config, asked, tokenizer)
        yield from voted_examples(texts, config, asked, tokenizer)
        return
    form = asked.form or AnswerForm.reasoned
    world = World.load(asked.world) if asked.world is not None else None
    if QUALITY in asked.judged():
        both = SAMPLED in asked.trained_kinds()
        yield from quality_examples(pairs, tokenizer, form, asked.length, asked.seed, world, look_at_both=both)
    yield from text_examples(texts, tokenizer, form, asked.length, asked.seed, world)


def mixed(examples: Iterable[LabelledPrompt], seed: int) -> list[LabelledPrompt]:
    """Shuffle, so that the first of them have all axes and kinds; the two orders of a pair stay side by side.

    A run reads them from the beginning, and an evaluation takes the first.
    """
    groups: dict[str, list[LabelledPrompt]] = {}
    for one in examples:
        groups.setdefault(str(one.label.get("pair", one.id)), []).append(one)
    order = list(groups.values())
    random.Random(derive_seed(seed, "examples")).shuffle(order)
    return [one for group in order for one in group]


def _card(
    asked: DataRequest, split: Split, parts: dict[str, list[LabelledPrompt]], teacher: dict[str, Any]
) -> dict[str, Any]:
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
        **({"teacher": teacher} if teacher else {}),
    }
