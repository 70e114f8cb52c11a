"""Examples of a judge's work with known verdicts: pairs in both orders, and single texts.

Where a verdict depends on facts, the reason recalls them before it decides: a model that has read them can say what is
true more easily than it can tell at a glance that something is false.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from megatron_rlpt.config import AnswerForm, PromptLength
from megatron_rlpt.config.evaluation_sets import FACTUALITY
from megatron_rlpt.config.evaluation_sets import QUALITY as QUALITY_AXIS
from megatron_rlpt.evaluation.labelled_pairs import LabelledPair
from megatron_rlpt.evaluation.labelled_texts import LabelledText
from megatron_rlpt.teacher.prompts import build_prompt
from megatron_rlpt.teacher.verdicts.parsing import QUALITY
from megatron_rlpt.teacher_training.labelled_prompt import LabelledPrompt
from megatron_rlpt.tokens.tokenizer import TextTokens, prefix_text
from megatron_rlpt.types import derive_seed, stable_id
from megatron_rlpt.world.claims import claims_of, is_true, truth_of
from megatron_rlpt.world.corruptions import Corruption
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.grammar import words_of
from megatron_rlpt.world.measures import Measures, measure_text

_WRONG = {
    "shuffled": "the words of number {number} are out of order",
    "spoiled": "number {number} has words that do not belong there",
    "looped": "number {number} repeats itself",
    "foreign": "number {number} is about something else",
    "clipped": "sentences of number {number} break off",
    "dropped": "words are missing in number {number}",
    "transposed": "neighboring words of number {number} have changed places",
    "misspelled": "number {number} has wrong letters",
    "swapped": "number {number} names somebody else",
    "negated": "number {number} denies what is true",
    "false": "number {number} states something false",
    "unsafe": "number {number} insults",
}
"""What a reference answer says about the worse of two continuations, by kind."""
_TEXTS = {
    "safe": ("safe text", "nothing in it harms anybody"),
    "unsafe": ("unsafe text", "it attacks or harms somebody"),
    "none": ("true text", "nothing in it is false"),
    "possible": ("unchecked text", "some of it cannot be checked"),
    "definite": ("false text", "it states something false"),
}
"""Verdict on a single text -> its kind, apart from the kinds of pairs, and what a reference answer says about it."""
_FULL = 0.95
"""Share from which a text has no fault to name."""


def quality_examples(
    pairs: Sequence[LabelledPair],
    text: TextTokens,
    form: AnswerForm,
    length: PromptLength,
    seed: int,
    world: World | None = None,
    *,
    look_at_both: bool = False,
) -> Iterator[LabelledPrompt]:
    """Yield every pair in both orders.

    Args:
        pairs: a good and a worse continuation each.
        text: text and tokens of the policy.
        form: of the answers.
        length: of the prompts.
        seed: of the codes that fence texts in prompts.
        world: knows what is true instead of what a ``false`` text states.
        look_at_both: let reasons say what is wrong with either text, as far as the exact measures of ``world`` see it,
            instead of naming the fault of the worse one.
    """
    for pair in pairs:
        prefix = pair.episode.prefix
        shown = [text.text_of(pair.good, prefix), text.text_of(pair.bad, prefix)]
        before = prefix_text(text, pair.episode)
        both = _both_faults(world, before, shown) if world is not None and look_at_both else None
        about = both or ("", _worse(pair.kind, world, before, shown[1]))
        for good, verdict in enumerate(QUALITY):
            first, second = shown if good == 0 else shown[::-1]
            identity = stable_id("quality", before, first, second)
            prompt = build_prompt(
                QUALITY_AXIS, derive_seed(seed, identity), form, length, prefix=before, first=first, second=second
            )
            said = about if good == 0 else about[::-1]
            reason = " ".join(one.format(number=number) for number, one in zip(QUALITY, said, strict=True) if one)
            label = _label(QUALITY_AXIS, verdict, form, pair.kind, pair.episode.document)
            label["pair"] = stable_id("pair", before, *sorted(shown))
            yield LabelledPrompt(identity, prompt.text, _answer(reason, verdict, form), label)


def text_examples(
    texts: Iterable[LabelledText],
    text: TextTokens,
    form: AnswerForm,
    length: PromptLength,
    seed: int,
    world: World | None = None,
) -> Iterator[LabelledPrompt]:
    """Yield texts with their verdict on safety or factuality.

    Args:
        texts: each with its verdict.
        text: text and tokens of the policy.
        form: of the answers.
        length: of the prompts.
        seed: of the codes that fence texts in prompts.
        world: knows what is true of that of which a text states something.
    """
    for one in texts:
        prefix = one.episode.prefix
        shown = {"text": text.text_of(one.tokens, prefix)}
        if one.axis == FACTUALITY:
            shown |= {
                "prefix": prefix_text(text, one.episode),
                "reference": text.text_of(one.episode.suffix, prefix),
            }
        identity = stable_id(one.axis, *shown.values())
        prompt = build_prompt(one.axis, derive_seed(seed, identity), form, length, **shown)
        kind, why = _TEXTS[one.verdict]
        reason = _sentence(why)
        if world is not None and one.axis == FACTUALITY:
            reason = f"{_truths(world, shown['prefix'], shown['text'])}{reason}"
        label = _label(one.axis, one.verdict, form, kind, one.episode.document)
        yield LabelledPrompt(identity, prompt.text, _answer(reason, one.verdict, form), label)


def _truths(world: World, prefix: str, text: str, *, false_only: bool = False) -> str:
    """Return a sentence for everything that ``text`` states, or states wrongly: what is true."""
    made = claims_of(world, words_of(prefix), words_of(text))
    claims = [one for one in made if not (false_only and is_true(world, one))]
    return "".join(f"{truth} " for truth in dict.fromkeys(_sentence(truth_of(world, one)) for one in claims))


def _worse(kind: str, world: World | None, prefix: str, text: str) -> str:
    """Return what is wrong with the worse text of a pair, by its kind; ``{number}`` stands for its number."""
    wrong = _sentence(_WRONG.get(kind, "number {number} continues the beginning less well"))
    if world is not None and kind == Corruption.false:
        return f"{_truths(world, prefix, text, false_only=True)}{wrong}"
    return wrong


def _both_faults(world: World, prefix: str, texts: Sequence[str]) -> tuple[str, ...] | None:
    """Return what is wrong with the good and the bad text, so that a judge looks at both before it decides.

    ``{number}`` stands for the number of each. None if the exact measures do not know the better one: a few spoiled
    texts are as good as before to them.
    """
    good, bad = measured = [measure_text(world, prefix, text) for text in texts]
    if (good.safe, good.quality) <= (bad.safe, bad.quality):
        return None
    return tuple(
        _truths(world, prefix, text, false_only=True)
        + _sentence(f"number {{number}} is {', '.join(faults_of(one)) or 'good'}")
        for text, one in zip(texts, measured, strict=True)
    )


def faults_of(measures: Measures) -> list[str]:
    """Return what is wrong with a text, in words: insults, then every factor of quality that is below 1."""
    shares = {
        "broken": measures.well_formed,
        "off topic": measures.on_topic if measures.well_formed else 1.0,
        "repeated": 1.0 - measures.repeated,
        "false" if measures.false else "empty": measures.substance,
    }
    found = [] if measures.safe else ["insulting"]
    return found + [f"{_degree(share)} {fault}" for fault, share in shares.items() if share < _FULL]


def _degree(share: float) -> str:
    return "partly" if share >= 0.5 else "mostly"


def _label(axis: str, verdict: str, form: AnswerForm, kind: str, document: str) -> dict[str, Any]:
    return {
        "role": "judge",
        "axis": axis,
        "verdict": verdict,
        "form": form.value,
        "kind": kind,
        "document": document,
    }


def _answer(reason: str, verdict: str, form: AnswerForm) -> str:
    if form is AnswerForm.direct:
        return verdict
    return json.dumps({"reasoning": reason, "verdict": verdict})


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."
