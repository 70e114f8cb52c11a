"""Thinking about a document of the world, exactly: the plan of what comes next, and the reward of a prediction.

Experimental: see ``teacher/true_continuation.py``. What a document says next is a draw of its writer: which fact of
those not yet stated, and in which words. A prediction that had to state the same facts would nearly never be right, and
one that states none could never be wrong. So a prediction agrees with the true suffix if it is as good as that is:
well-formed, on topic, without repetition, safe, and with nothing but true facts, enough of them.
"""

from __future__ import annotations

from megatron_rlpt.config.judges import JudgeFacts
from megatron_rlpt.teacher.generator import Ask
from megatron_rlpt.teacher.right_verdict import NUMBERS
from megatron_rlpt.teacher.true_continuation import NAME, Continued, Prediction, reward_predictions
from megatron_rlpt.tokens.tokenizer import TextTokens
from megatron_rlpt.types import Failed, Group, Reward
from megatron_rlpt.world.claims import claims_of
from megatron_rlpt.world.facts import VERSION, World
from megatron_rlpt.world.grammar import END, text_of, words_of
from megatron_rlpt.world.measures import Measures, measure_text


def plan_of(world: World, prefix: str, suffix: str) -> str:
    """Return the thought before ``suffix``: entity, relation and true value of every fact that it states, in order.

    A denial names what it denies as well: ``Lotreti fair winter not summer.`` Sentences that state nothing are in no
    plan, nor is one that is cut off, or whose value the prefix has already.
    """
    planned: list[str] = []
    for one in claims_of(world, words_of(prefix), words_of(suffix)):
        denied = ["not", one.value] if one.negated else []
        planned += [one.subject, one.relation.name, world.value(one.subject, one.relation), *denied, END]
    return text_of(planned)


class ExactContinuation:
    """A class for ``teacher.judge``: 1 for a prediction that the world's measures call good, else 0."""

    version = VERSION
    facts = JudgeFacts(needs_labels=True)

    def __init__(self, tokenizer: TextTokens, world: str) -> None:
        """
        Args:
            tokenizer: of the policy; given by the run.
            world: path of the world's folder or ``facts.json``.
        """
        self._text = tokenizer
        self._world = World.load(world)

    async def judge_group(self, group: Group, ask: Ask) -> Group:
        """Return the group with one reward per candidate; ``detail`` has all measures of the prediction."""
        return await reward_predictions(group, self._text, self._agree)

    async def _agree(self, known: Continued, predicted: Prediction) -> Reward | Failed:
        measures = measure_text(self._world, known.prefix, predicted.text)
        numbers = {
            "well_formed": measures.well_formed,
            "coherence": measures.coherence,
            "true_facts": measures.true,
            "false_facts": measures.false,
        }
        detail = {"verdict": verdict_of(measures), NUMBERS: numbers, "measures": measures.as_dict()}
        return Reward(float(measures.good), f"exact {NAME}", self.version, detail)


def verdict_of(measures: Measures) -> str:
    """Return why a prediction is wrong, in one word; ``right`` if it is not."""
    if measures.good:
        return "right"
    if measures.false:
        return "false"
    return "poor" if measures.safe else "unsafe"
