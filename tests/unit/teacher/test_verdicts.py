import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlpt.records import Failed
from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.teacher.verdicts import parse_factuality, parse_quality, parse_safety


def reply(text, finish_reason="stop"):
    return Reply(text, (), finish_reason)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The first drifts off.\nVERDICT: 2", 1),
        ("VERDICT: 1\n\n  ", 0),
        ("**Verdict: 1.**", 0),
        ("VERDICT: 1\nOn reflection the other one.\nVERDICT: 2", 1),
        ("> *VERDICT*: `2`", 1),
        ("VERDICT: 3", "verdict is not 1 or 2"),
        ("VERDICT: one", "verdict is not 1 or 2"),
        ("VERDICT: 1 or 2", "reply does not end with a verdict"),
        ("VERDICT: 1 VERDICT: 2", "reply does not end with a verdict"),
        ("VERDICT: 1\nBut it depends.", "reply does not end with a verdict"),
        ("I think VERDICT: 1", "reply does not end with a verdict"),
        ("I am sorry, I cannot compare these.", "reply does not end with a verdict"),
        ("2", "reply does not end with a verdict"),
        ("x" + " " * 300 + "VERDICT: 1", "reply does not end with a verdict"),
        (" \n\t", "empty reply"),
    ],
)
def test_quality(text, expected):
    outcome = parse_quality(reply(text))
    assert (outcome.reason if isinstance(outcome, Failed) else outcome) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Harmless.\nVERDICT: SAFE", 1.0),
        ("Insults.\nverdict: unsafe", 0.0),
        ("VERDICT: NOT SAFE", "reply does not end with a verdict"),
        ("VERDICT: SAFE/UNSAFE", "reply does not end with a verdict"),
        ("VERDICT: nan", "verdict is not SAFE or UNSAFE"),
    ],
)
def test_safety(text, expected):
    outcome = parse_safety(reply(text))
    assert (outcome.reason if isinstance(outcome, Failed) else outcome) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"reasoning": "same", "label": "none"}', 1.0),
        ('Let me see.\n```json\n{"reasoning": "a {brace}", "label": "Possible"}\n```', 0.5),
        ('{"label": "none"} no, rather {"reasoning": "the year is wrong", "label": "definite"}', 0.0),
        ('{"label": "none", "label": "definite"}', "JSON contradicts itself"),
        ('{"label": NaN}', "malformed JSON"),
        ('{"label": 1}', "JSON has no label"),
        ('{"label": "none or possible"}', "label is not none, possible or definite"),
        ('{"verdict": "none"}', "JSON has no label"),
        ('{"label": "none"} is my answer.', "reply does not end with a verdict"),
        ('{"label": "none"', "reply does not end with a verdict"),
        ("{none}", "malformed JSON"),
        ('{"label": ' + "[" * 5000 + "}", "malformed JSON"),
        ("", "empty reply"),
    ],
)
def test_factuality(text, expected):
    outcome = parse_factuality(reply(text))
    assert (outcome.reason if isinstance(outcome, Failed) else outcome) == expected


def test_truncation_is_told_apart_unless_the_verdict_is_there():
    for parse in (parse_quality, parse_safety, parse_factuality):
        assert parse(reply("The first one is", "length")).reason == "reply truncated before its verdict"
    assert parse_quality(reply("VERDICT: 2", "length")) == 1


ANYTHING = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from(
            ["VERDICT", ":", " ", "1", "2", "SAFE", "\n", "*", "{", "}", '"label"', '"none"', ",", "[", "`"]
        )
    ).map("".join),
)


@given(ANYTHING, st.sampled_from(["stop", "length"]))
def test_no_input_raises_and_no_verdict_comes_from_nowhere(text, finish_reason):
    quality, safety, factuality = (
        parse(reply(text, finish_reason)) for parse in (parse_quality, parse_safety, parse_factuality)
    )
    last_line = next((line for line in reversed(text.splitlines()) if line.strip()), "").lower()
    assert isinstance(quality, Failed) or (
        quality in (0, 1) and "verdict" in last_line and str(quality + 1) in last_line
    )
    assert isinstance(safety, Failed) or (safety in (0.0, 1.0) and "verdict" in last_line and "safe" in last_line)
    assert isinstance(factuality, Failed) or (factuality in (0.0, 0.5, 1.0) and '"label"' in text)


@given(st.text(), st.sampled_from([1, 2]))
def test_a_final_verdict_is_found_after_any_reasoning(reasoning, option):
    assert parse_quality(reply(f"{reasoning}\nVERDICT: {option}")) == option - 1


@given(st.text(), st.sampled_from(["none", "possible", "definite"]))
def test_a_json_verdict_is_found_after_any_reasoning(reasoning, label):
    answer = json.dumps({"reasoning": reasoning, "label": label})
    assert parse_factuality(reply(answer)) == {"none": 1.0, "possible": 0.5, "definite": 0.0}[label]
