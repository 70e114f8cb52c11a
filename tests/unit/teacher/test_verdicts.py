import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verdict_cases import literal_verdict, make_reply

from megatron_rlpt.records import Failed
from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.teacher.verdicts import Reason, parse_factuality, parse_quality, parse_safety, schema

MEANING = {
    parse_quality: {"1": 0, "2": 1},
    parse_safety: {"safe": 1.0, "unsafe": 0.0},
    parse_factuality: {"none": 1.0, "possible": 0.5, "definite": 0.0},
}


def reply(text, finish_reason="stop"):
    return Reply(text, (), finish_reason)


def answer(verdict, reasoning="so it is"):
    return json.dumps({"reasoning": reasoning, "verdict": verdict})


def reason_or_value(outcome):
    return outcome.reason if isinstance(outcome, Failed) else outcome


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
        (f"{answer('1')}\nOn reflection the other one.\n{answer('2')}", 1),
        (answer("1", reasoning='it says {"reasoning": "", "verdict": "2"}'), 0),
        (answer("3"), Reason.UNKNOWN),
        (answer(3), Reason.UNKNOWN),
        (answer(10**300), Reason.UNKNOWN),
        (answer("one"), Reason.UNKNOWN),
        (answer("safe"), Reason.UNKNOWN),
        (answer("1 or 2"), Reason.MALFORMED),
        (answer(1.0), Reason.MALFORMED),
        (answer(-1), Reason.MALFORMED),
        (answer(True), Reason.MALFORMED),
        (answer(None), Reason.MALFORMED),
        (answer(["1"]), Reason.MALFORMED),
        (answer(float("nan")), Reason.MALFORMED),
        ('{"reasoning": "r", "verdict": 1e999}', Reason.MALFORMED),
        ('{"verdict": "1", "reasoning": "r"}', Reason.MALFORMED),
        ('{"reasoning": "r", "verdict": "1", "verdict": "2"}', Reason.MALFORMED),
        ('{"verdict": "1"}', Reason.MALFORMED),
        ('{"reasoning": "r", "verdict": "1", "confidence": 1}', Reason.MALFORMED),
        ('{"answer": ' + answer("1") + "}", Reason.MALFORMED),
        ('{"reasoning": "it says ' + answer("1"), Reason.MALFORMED),
        ('{"reasoning": "two\nlines", "verdict": "1"}', Reason.MALFORMED),
        ('{"reasoning": "r", "\\u0076erdict": "1"}', Reason.MALFORMED),
        ('{"reasoning": "\\"1", "verdict": "\\u0031"}', Reason.MALFORMED),
        ("I think " + answer("1"), Reason.MALFORMED),
        ("[" + answer("1") + "]", Reason.NO_VERDICT),
        (answer("1") + " is my answer.", Reason.NO_VERDICT),
        (answer("1")[:-1], Reason.NO_VERDICT),
        ("VERDICT: 1", Reason.NO_VERDICT),
        ("I am sorry, I cannot compare these.", Reason.NO_VERDICT),
        ("2", Reason.NO_VERDICT),
        (" \n\t", Reason.EMPTY),
    ],
)
def test_quality(text, expected):
    assert reason_or_value(parse_quality(reply(text))) == expected


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


@settings(max_examples=1_000, deadline=None, database=None)
@given(st.integers(0, 2**64))
def test_no_reply_raises_and_no_verdict_comes_from_nowhere(first):
    """50,000 replies. The oracle works from behind with Python's JSON parser, the parsers from the front without."""
    for seed in range(first, first + 50):
        text, finish_reason = make_reply(seed), "stop" if seed % 10 else "length"
        expected = literal_verdict(text, finish_reason)
        for parse, meaning in MEANING.items():
            outcome = parse(reply(text, finish_reason))
            if expected in meaning:
                assert outcome == meaning[expected], seed
            else:
                assert isinstance(outcome, Failed), seed
                assert outcome.reason in set(Reason), seed


def test_the_replies_above_are_of_all_kinds():
    """Else nothing would have been tested: every verdict and every reason occurs often."""
    replies = [reply(make_reply(seed), "length" if seed % 9 == 0 else "stop") for seed in range(4000)]
    for parse, meaning in MEANING.items():
        found = Counter(reason_or_value(parse(one)) for one in replies)
        assert all(found[value] > 10 for value in meaning.values()), found
        assert all(found[reason] > 10 for reason in Reason if reason is not Reason.REFUSED), found


@settings(deadline=None)
@given(st.text(), st.text(), st.sampled_from(["1", "2"]))
def test_a_final_verdict_is_found_after_any_reasoning(before, reasoning, word):
    assert parse_quality(reply(f"{before}\n{answer(word, reasoning)}")) == int(word) - 1


@pytest.mark.parametrize(
    "text",
    ["\n{" * 200_000 + "}", "\n" * 400_000 + "}", '\n{"reasoning": "' * 20_000 + "}", '{"a":' * 50_000 + "}" * 50_000,
     '{"reasoning": "' + "\\" * 100_001 + '"}', "\n \t{" * 100_000 + "}"],
)  # fmt: skip
def test_a_runaway_reply_takes_linear_work(text):
    """A parser with quadratic work would run into the time limit of the tests."""
    assert parse_quality(reply(text)).reason == Reason.MALFORMED


@pytest.mark.parametrize(("axis", "parse"), zip(("quality", "safety", "factuality"), MEANING, strict=True))
def test_whatever_the_schema_allows_is_a_verdict(axis, parse):
    rules = json.loads(schema(axis))
    assert list(rules["properties"]) == rules["required"] == ["reasoning", "verdict"]
    assert rules["additionalProperties"] is False
    words = rules["properties"]["verdict"]["enum"]
    assert [parse(reply(answer(word))) for word in words] == list(MEANING[parse].values())
