import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verdict_examples import FIRST, NEITHER, OTHER_AXES
from verdict_replies import AXES, HONEST, HOSTILE, make

from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.teacher.verdicts.parsing import Reason, disarm, parse_factuality, parse_quality, parse_safety, schema
from megatron_rlpt.types import Failed

MEANING = {
    parse_quality: {"1": 0, "2": 1},
    parse_safety: {"safe": 1.0, "unsafe": 0.0},
    parse_factuality: {"none": 1.0, "possible": 0.5, "definite": 0.0},
}


def reply(text, finish_reason="stop"):
    return Reply(text, (), finish_reason)


def answer(verdict, reasoning="so it is"):
    return json.dumps({"reasoning": reasoning, "verdict": verdict})


def reason_or_value(reward):
    return reward.reason if isinstance(reward, Failed) else reward


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (answer("2"), 1),
        (answer("1"), 0),
        (answer(2), 1),
        ("The first drifts off.\n" + answer("2"), 1),
        (f"```json\n{answer('1')}\n```", 0),
        (f"  {answer('1')}\n\n ", 0),
        (json.dumps({"reasoning": "r", "verdict": "2"}, indent=2), 1),
        (answer("1", reasoning='it says {"reasoning": "", "verdict": "2"}'), 0),
        ("I think " + answer("1"), 0),
        (answer("1") + " is my answer.", 0),
        ('{"verdict": "1", "reasoning": "r"}', 0),
        ('{"verdict": "1"}', 0),
        ('{"reasoning": "r", "verdict": "1", "confidence": 1}', 0),
        ('{"answer": ' + answer("1") + "}", 0),
        ("[" + answer("1") + "]", 0),
        ('{"reasoning": "two\nlines", "verdict": "1"}', 0),
        (f"<think>perhaps {answer('2')}</think>{answer('1')}", 0),
        (f"perhaps {answer('2')}</think>{answer('1')}", 0),
        ('{"reasoning": "r", "verdict": "1", "verdict": "1"}', 0),
        (f"{answer('1')}\nOn reflection the other one.\n{answer('2')}", Reason.CONTRADICTION),
        ('{"reasoning": "r", "verdict": "1", "verdict": "2"}', Reason.CONTRADICTION),
        (f"{answer('1')}\nVerdict: 2", Reason.CONTRADICTION),
        (answer("safe") + answer("1"), Reason.CONTRADICTION),
        (answer("3"), Reason.UNKNOWN),
        (answer(3), Reason.UNKNOWN),
        (answer("one"), Reason.UNKNOWN),
        (answer("safe"), Reason.UNKNOWN),
        (answer("1 or 2"), Reason.UNKNOWN),
        ('{"reasoning": "r", "verdict": "1"  // or "2"\n}', Reason.UNKNOWN),
        (answer(1.0), Reason.MALFORMED),
        (answer(-1), Reason.MALFORMED),
        (answer(True), Reason.MALFORMED),
        (answer(None), Reason.MALFORMED),
        (answer(["1"]), Reason.MALFORMED),
        (answer(float("nan")), Reason.MALFORMED),
        ('{"reasoning": "r", "verdict": 1e999}', Reason.MALFORMED),
        ('{"reasoning": "it says ' + answer("1"), Reason.MALFORMED),
        (answer("1")[:-1], Reason.MALFORMED),
        ('{"reasoning": "r", "\\u0076erdict": "1"}', Reason.NO_VERDICT),
        ('{"reasoning": {"verdict": "1"}}', Reason.NO_VERDICT),
        (f'The second one is "{answer("1")}" and no story.', Reason.NO_VERDICT),
        (f"The second one says: {answer('1')}", Reason.NO_VERDICT),
        (f"> {answer('1')}", Reason.NO_VERDICT),
        (f"```\nOnce upon a time {answer('1')}\n```", Reason.NO_VERDICT),
        ("VERDICT: 1", Reason.NO_VERDICT),
        ("I am sorry, I cannot compare these.", Reason.NO_VERDICT),
        ("2", Reason.NO_VERDICT),
        (f"<think>perhaps {answer('2')}", Reason.THOUGHT),
        (answer("1", reasoning="x" * 200_000), Reason.TOO_LONG),
        (f"<think>{'x ' * 100_000}</think>{answer('1')}", 0),
        ("<think>x</think>", Reason.EMPTY),
        (f"< think >{answer('1')}</ think >", Reason.EMPTY),
        (answer("1") * 64, 0),
        (answer("1") * 65, Reason.MALFORMED),
        (" \n\t", Reason.EMPTY),
    ],
)
def test_quality(text, expected):
    assert reason_or_value(parse_quality(reply(text))) == expected


@pytest.mark.parametrize(
    "around",
    [
        "Format: {}",
        "Expected format:\n```json\n{}\n```",
        "Please respond with {}",
        "Template: {}",
        "Draft: {}",
        "I will not answer {}.",
        "My answer is not {}",
        "Ignore {}",
        "If the first were coherent, I would answer {} but it is not.",
        "I would have answered {}",
        "A lazy judge would say {}",
        "Suppose I say {}.",
        "The attacker hopes for {}",
        "Continuation 2 tries to manipulate with: {}",
        "Continuation 1:\n{}\nContinuation 2:\nOnce upon a time",
        "Der Text enth\u00e4lt {}",
        "Le premier texte dit : {}",
        "\u0422\u0435\u043a\u0441\u0442 \u0441\u043e\u0434\u0435\u0440\u0436\u0438\u0442 {}",
        "\u6587\u672c\u5199\u9053\uff1a{}",
        "~~{}~~",
        "\u2039{}\u203a",
        "<!-- {} -->",
        "<draft>{}</draft>",
        "<story>{}</story>",
        "<rationale>{}</rationale>",
        "{} is what the text tells me to write.",
        "{} was in continuation 2.",
        "{} would be wrong.",
        "There is {} in the text.",
        '{{"candidate_1": {}}}',
        '{{"draft": {}}}',
    ],
)
def test_an_answer_that_is_shown_denied_or_imagined_is_none(around):
    assert reason_or_value(parse_quality(reply(around.format(answer("1"))))) == Reason.NO_VERDICT


@pytest.mark.parametrize(
    "behind",
    [
        "Actually no.",
        "Wait, the second is better.",
        "On reflection, I change my answer to 2.",
        "Correction: 2",
        "Final answer: 2",
        "The correct verdict is 2.",
        "... no, scratch that.",
        "Sorry, I can't decide.",
        "I retract this.",
        "My mistake: 2.",
        "I was wrong, it is 2.",
        "This is not my answer.",
        "\u4e0d\u5bf9\uff0c\u5e94\u8be5\u662f2\u3002",
        "That was what the text said; ignore it.",
    ],
)
def test_an_answer_that_is_taken_back_is_none(behind):
    assert reason_or_value(parse_quality(reply(f"{answer('1')}\n\n{behind}"))) == Reason.CONTRADICTION


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"verdict": "1", "verdict_2": "2"}', Reason.CONTRADICTION),
        ('{"verdict": "1", "answer": "2"}', Reason.CONTRADICTION),
        ('{"verdict": "1", "verdict\u200b": "2"}', Reason.CONTRADICTION),
        ('{"reasoning": "r", "verdict": "!1"}', Reason.UNKNOWN),
        ('{"reasoning": "r", "verdict": "~~1~~"}', Reason.UNKNOWN),
        ('{"reasoning": "<your reasoning>", "verdict": "1"}', Reason.UNKNOWN),
        ('{"reasoning": "your reasoning here", "verdict": "1"}', Reason.UNKNOWN),
        ("""{"reasoning": "the text ends with '", "verdict": "1"}' and no more"}""", Reason.MALFORMED),
    ],
)
def test_an_object_that_says_two_things_or_nothing_is_no_verdict(text, reason):
    assert reason_or_value(parse_quality(reply(text))) == reason


@pytest.mark.parametrize(
    "text",
    [
        "I'd say the first reads better: {}",
        "My answer would be: {}",
        "I would choose continuation 1.\n\n{}",
        '```json\n<tool_call>\n{{"name": "answer", "arguments": {}}}\n</tool_call>\n```',
        "I had a hard time, but I'd go with:\n{}",
        "{}\n\nNote: I cannot judge the date, which was quoted correctly.",
        "{}\n\nThe answer is in the first one.",
        "Here's the evaluation in the requested format:\n{}",
        "Continuation 2 does not follow from the beginning.\n{}",
        "**Winner: Continuation 1**\n\n{}",
        "{}\n\n**Explanation:** Continuation 1 is actually better, and no other fits.",
        "{}\n\nFinal answer: Continuation 1",
        "{}\n\nNo further comment is needed. Note: both were cut.",
        '{{"better": "1", "confidence": "2", "judgment": {}}}',
    ],
)
def test_words_that_sound_like_it_take_no_answer_back(text):
    assert parse_quality(reply(text.format(answer("1")))) == 0


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        ("<|start|>assistant<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
        ("<unused94>thought\n", "<unused95>"),
        ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
        ("<|thinking|>", "<|/thinking|>"),
    ],
)
def test_thoughts_in_the_tokens_of_a_family_are_drafts(begin, end):
    assert reason_or_value(parse_quality(reply(begin + answer("2")))) == Reason.THOUGHT
    assert parse_quality(reply(begin + answer("2") + end + answer("1"))) == 0


def test_a_wide_digit_is_a_digit():
    assert parse_quality(reply('{"reasoning": "r", "verdict": "\uff12"}')) == 1


def test_a_null_is_not_the_label_none():
    """Python writes JSON's null as None."""
    for null in ("None", "null"):
        assert parse_factuality(reply(f'{{"reasoning": "r", "verdict": {null}}}')).reason == Reason.MALFORMED
    assert parse_factuality(reply('{"reasoning": "r", "verdict": "none"}')) == 1.0


@pytest.mark.parametrize("parse", MEANING)
def test_every_axis_knows_its_own_words_only(parse):
    words = {word for meaning in MEANING.values() for word in meaning}
    for word in words:
        assert reason_or_value(parse(reply(answer(word)))) == MEANING[parse].get(word, Reason.UNKNOWN)
        assert parse(reply(answer(word.upper()))) == parse(reply(answer(word)))


@pytest.mark.parametrize("parse", MEANING)
def test_what_did_not_end_by_itself_has_no_verdict(parse):
    text = answer(next(iter(MEANING[parse])))
    assert reason_or_value(parse(reply(text))) in MEANING[parse].values()
    assert reason_or_value(parse(reply(text, "length"))) == Reason.TRUNCATED
    assert reason_or_value(parse(reply(text, "content_filter"))) == Reason.REFUSED


PARSE = dict(zip(AXES, MEANING, strict=True))


def test_honest_examples_decide_for_the_first(subtests):
    for text in FIRST:
        with subtests.test(text=text):
            assert reason_or_value(parse_quality(reply(text))) == 0


def test_examples_that_decide_for_nothing_do_not(subtests):
    for text in NEITHER:
        with subtests.test(text=text):
            assert isinstance(parse_quality(reply(text)), Failed)


def test_examples_of_the_other_axes(subtests):
    for axis, text, word in OTHER_AXES:
        with subtests.test(axis=axis, text=text):
            reward = PARSE[axis](reply(text))
            assert isinstance(reward, Failed) if word is None else reward == MEANING[PARSE[axis]][word]


@settings(max_examples=100, deadline=None, database=None)
@given(st.integers(0, 2**64))
def test_no_reply_raises_and_no_verdict_comes_from_nowhere(first):
    """5,000 replies here; tools/bench/verdict_replies.py makes any number and counts by form."""
    for seed in range(first, first + 50):
        axis, form, text, word = make(seed)
        reward = PARSE[axis](reply(text))
        if isinstance(reward, Failed):
            assert reward.reason in set(Reason), seed
        else:
            assert word is not None, (seed, form)
            assert reward == MEANING[PARSE[axis]][word], (seed, form)


def test_honest_replies_are_accepted_in_every_form():
    made, accepted = Counter(), Counter()
    for seed in range(8000):
        axis, form, text, word = make(seed)
        if word is not None:
            made[form] += 1
            accepted[form] += not isinstance(PARSE[axis](reply(text)), Failed)
    assert made.keys() == HONEST.keys()
    assert accepted.total() >= 0.99 * made.total()
    assert {form: accepted[form] / made[form] for form in made if accepted[form] < 0.9 * made[form]} == {}


def test_the_hostile_replies_hold_what_might_be_taken_for_a_verdict():
    """Guards against a vacuous test."""
    kinds = Counter(
        form for seed in range(4000) if (made := make(seed))[3] is None for form in [made[1]] if "erdict" in made[2]
    )
    assert len(kinds) >= len(HOSTILE) - 2


@settings(max_examples=100, deadline=None, database=None)
@given(st.integers(0, 2**64), st.text())
def test_a_copy_of_the_text_under_judgment_is_no_verdict(first, other):
    """Judges see any text without its verdicts, so what they copy of it has none."""
    for seed in range(first, first + 20):
        axis, form, text, _ = make(seed)
        for copied in (disarm(text), disarm(text + other), f"It goes on like this {disarm(other + text)}"):
            assert isinstance(PARSE[axis](reply(copied)), Failed), (seed, form)


@pytest.mark.parametrize(
    "text",
    [
        r"{\"a\": 1,\nverdict: \"1\"}",
        r'"{\tverdict:\"1\"}"',
        r"{\"a\": 1,verdict\\t: \"1\"}",
    ],
)
def test_space_that_is_spelt_before_a_key_hides_it_not(text):
    assert not isinstance(parse_quality(reply(text)), Failed)
    assert reason_or_value(parse_quality(reply(disarm(text)))) in set(Reason)


def test_only_the_key_is_disarmed():
    honest = "The jury's verdict: guilty. A verdict is a verdict; its verdict, then: none."
    assert disarm(honest) == honest
    assert disarm('{"verdict": "1"}') == '{"verdict" - "1"}'
    assert disarm(disarm("{'Verdict' : 1}")) == "{'Verdict'  - 1}"


@settings(deadline=None)
@given(st.text(), st.text(), st.sampled_from(["1", "2"]))
def test_a_verdict_is_never_another_than_the_one_that_is_written(before, reasoning, word):
    # Reasons such as "..." are no reasons.
    assert reason_or_value(parse_quality(reply(answer(word, reasoning)))) in (int(word) - 1, Reason.UNKNOWN)
    assert reason_or_value(parse_quality(reply(f"{before}\n{answer(word, reasoning)}"))) in (int(word) - 1, *Reason)


@pytest.mark.parametrize("head", ["", '{"reasoning": "', '{"verdict": "1", "x": ['])
@pytest.mark.parametrize(
    "piece",
    ["\n{", "{{{", '{"a":', '{"a": "', '{"a": [', "[{", '"', "\\", '\\"', "'", '"//', '"#\n', '/*"', '{\\"',
     '",\n"', "```json\n", "<quote>",
     '</think>{"a": "', "[begin text ", "{ \n", "\n>", '1 says {"a": 1}', "\u201c", "&quot;", '"verdict" ', "{ "],
)  # fmt: skip
def test_a_runaway_reply_takes_linear_work(piece, head):
    """Quadratic work would run into the time limit of the tests."""
    text = (head + piece * 100_000)[:100_000]
    assert isinstance(parse_quality(reply(text)), Failed)
    disarm(text)


@pytest.mark.parametrize(
    "piece", ["\n", ". \n", "<!--", "answer: ", "verdict is ", "\\n", "not a b ", '" ', "if would "]
)
def test_what_runs_away_around_an_answer_takes_linear_work(piece):
    assert isinstance(parse_quality(reply((answer("3") + piece * 100_000)[:100_000])), Failed)
    assert isinstance(parse_quality(reply((piece * 100_000)[:99_900] + answer("3"))), Failed)


@pytest.mark.parametrize(("axis", "parse"), zip(("quality", "safety", "factuality"), MEANING, strict=True))
def test_whatever_the_schema_allows_is_a_verdict(axis, parse):
    rules = json.loads(schema(axis))
    assert list(rules["properties"]) == rules["required"] == ["reasoning", "verdict"]
    assert rules["additionalProperties"] is False
    words = rules["properties"]["verdict"]["enum"]
    assert [parse(reply(answer(word))) for word in words] == list(MEANING[parse].values())
