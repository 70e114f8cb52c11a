"""Thoughts are separated from answers."""

import pytest

from megatron_rlpt.teacher.thinking import split_thought, without_opened_thought, without_thought


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a cat sat", "a cat sat"),
        ("<think>hm</think>\na cat sat", "a cat sat"),
        ("<think></think><think>hm</think> a", "a"),
        ("hm, perhaps</think>\n\na cat sat", "a cat sat"),
        ("[THINK]hm[/THINK]a", "a"),
        ("\u25c1think\u25b7hm\u25c1/think\u25b7a", "a"),
        ("<think>hm", None),
        ("< think >hm</ think >a", "a"),
        ("[THINKING]hm[/THINKING]a", "a"),
        ('<analysis id="3">text', '<analysis id="3">text'),
        ("<reason>text</reason>", "<reason>text</reason>"),
        ("<thinking>one </think> two</thinking>a", "a"),
    ],
)
def test_an_answer_is_what_follows_the_thought(text, answer):
    assert without_thought(text) == answer


def test_what_has_no_beginning_is_left_where_quotations_matter():
    assert without_opened_thought("it says </think> here") == "it says </think> here"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think> a plan </think> and on", ("a plan", " and on")),
        ("<think></think>ly it goes", ("", "ly it goes")),
        ("a plan</think> and on", ("a plan", " and on")),
        ("<thinking>one </think> two</thinking> on", ("one </think> two", " on")),
        ("<think>a plan", None),
        ("and on", None),
    ],
)
def test_a_thought_is_taken_from_what_follows_it_to_the_letter(text, parts):
    assert split_thought(text) == parts
