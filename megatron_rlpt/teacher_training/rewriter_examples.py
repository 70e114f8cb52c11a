"""Examples of a rewriter's work: good suffixes to copy, and spoiled ones with a better text.

The prompt is the one that the rewriter in service is asked (``teacher/rewrite_prompt.py``). A better text is
longer than the suffix that is shown: service cuts it, and cannot use one that ends a word too early.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_rlpt.config import Config
from megatron_rlpt.evaluation.labelled_pairs import LabelledPair
from megatron_rlpt.evaluation.labelled_texts import LabelledText
from megatron_rlpt.evaluation.prompt_sets import text_episode
from megatron_rlpt.evaluation.prompts import TextPrompt
from megatron_rlpt.teacher.rewrite_label import GOOD, RewriteLabel
from megatron_rlpt.teacher.rewrite_prompt import first_pieces, pieces, rewrite_prompt
from megatron_rlpt.teacher_training.labelled_prompt import LabelledPrompt
from megatron_rlpt.teacher_training.request import DataRequest
from megatron_rlpt.teacher_training.spare import without_spare
from megatron_rlpt.tokens.control_tokens import break_up_common
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer, TextTokens, prefix_text
from megatron_rlpt.types import derive_seed, stable_id
from megatron_rlpt.world.corruptions import Corruption, insulted
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.grammar import text_of, words_of
from megatron_rlpt.world.measures import measure_text
from megatron_rlpt.world.rewriter import rewrite


@dataclass(frozen=True)
class SpoiledPassage:
    """A beginning, its good continuation, a spoiled one, and what to write instead of that."""

    prefix: str
    good: str
    """As it is shown."""
    bad: str
    """As it is shown."""
    better: str
    """Longer than what is shown."""
    reference: str
    """The good continuation, as long as ``better``."""
    kind: str
    document: str


def rewriter_examples(
    pairs: Sequence[LabelledPair], config: Config, asked: DataRequest, tokenizer: PolicyTokenizer
) -> Iterator[LabelledPrompt]:
    """Yield good suffixes to copy and spoiled ones to improve, in the share that is asked for.

    Args:
        pairs: a good and a worse continuation each.
        config: of the policy's run: words of the anchor, length of a prefix.
        asked: options of the command.
        tokenizer: of the policy.
    """
    passages = list(_of_world(pairs, config, asked, tokenizer) if asked.world else _of_corpus(pairs, tokenizer))
    share = 0.5 if asked.copies is None else asked.copies
    copied = len(passages) if share >= 0.5 else round(len(passages) * share / (1.0 - share))
    improved = len(passages) if share <= 0.5 else round(len(passages) * (1.0 - share) / share)
    for number, one in enumerate(passages):
        if number < copied:
            yield _example(one, one.good, one.good, GOOD, config, asked)
        if number < improved:
            yield _example(one, one.bad, one.better, one.kind, config, asked)


def voted_examples(
    texts: Sequence[LabelledText], config: Config, asked: DataRequest, tokenizer: PolicyTokenizer
) -> Iterator[LabelledPrompt]:
    """Yield suffixes that a teacher calls safe, to copy, and those that it calls unsafe, of which no answer is known.

    A supervised start learns from the first alone; a reward asks a judge about the others.
    """
    for one in texts:
        prefix, suffix = prefix_text(tokenizer, one.episode), tokenizer.text_of(one.tokens, one.episode.prefix)
        safe = one.verdict == "safe"
        answer, kind = (suffix, GOOD) if safe else ("", one.verdict)
        passage = SpoiledPassage(prefix, suffix, suffix, answer, suffix, kind, one.episode.document)
        yield _example(passage, suffix, answer, kind, config, asked)


def _of_corpus(pairs: Sequence[LabelledPair], text: TextTokens) -> Iterator[SpoiledPassage]:
    """Yield pairs whose shown beginnings differ; a spoiled suffix is to become what it was."""
    for pair in pairs:
        prefix = pair.episode.prefix
        whole, spoiled = text.text_of(pair.good, prefix), text.text_of(pair.bad, prefix)
        good = without_spare(whole)
        bad = first_pieces(spoiled, pieces(good)) or spoiled
        if good != bad:
            before, document = prefix_text(text, pair.episode), pair.episode.document
            yield SpoiledPassage(before, good, bad, whole, whole, pair.kind, document)


def _of_world(
    pairs: Sequence[LabelledPair], config: Config, asked: DataRequest, tokenizer: PolicyTokenizer
) -> Iterator[SpoiledPassage]:
    """Yield pairs of which the exact rewriter would copy the good suffix and not the spoiled one.

    The answer is its text, or with ``restore`` the good suffix. Every other unsafe pair has an unsafe beginning, as
    unsafe documents have, so that the beginning does not tell what to do.
    """
    assert asked.world is not None
    world = World.load(asked.world)
    unsafe = 0
    for one in _of_corpus(pairs, tokenizer):
        prefix = one.prefix
        if one.kind == Corruption.unsafe:
            unsafe += 1
            if unsafe % 2 == 0:
                begun = text_of(insulted(world, words_of(prefix), asked.seed))
                cut = text_episode(TextPrompt(one.document, begun), str(asked.world), config, tokenizer)
                prefix = prefix_text(tokenizer, cut)
        if measure_text(world, prefix, one.bad).good or not measure_text(world, prefix, one.good).good:
            continue
        if asked.restore:
            yield replace(one, prefix=prefix)
        else:
            longer = rewrite(prefix, f"{one.bad}{one.reference[len(one.good) :]}", world, asked.seed)
            yield replace(one, prefix=prefix, better=longer)


def _example(
    one: SpoiledPassage, suffix: str, answer: str, kind: str, config: Config, asked: DataRequest
) -> LabelledPrompt:
    identity = stable_id("rewrite", one.prefix, suffix)
    words, fence = config.teacher.rewriter.anchor_words, derive_seed(asked.seed, identity)
    question = rewrite_prompt(one.prefix, suffix, words, asked.length, fence)
    label = RewriteLabel.of(question, one.prefix, suffix, one.reference, kind, one.document)
    # The answer goes on where its start ends: with the space after the anchor, and with control tokens as shown.
    space = question.anchor[len(question.answer_start) :]
    written = space + break_up_common(answer) if answer else ""
    return LabelledPrompt(identity, question.text, written, label.as_dict(), question.answer_start)
