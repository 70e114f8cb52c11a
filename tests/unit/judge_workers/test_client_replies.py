"""Any response body gives a reply or a problem, never an exception."""

import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_rlpt.judge_workers.client.faults import Fault, ServerProblem, excerpt
from megatron_rlpt.judge_workers.client.replies import (
    ListedModel,
    message_in,
    read_chat,
    read_completion,
    read_logprobs,
    read_models,
    tokens_used,
)
from megatron_rlpt.teacher.generator import Reply

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400)
WORDS = st.sampled_from(["stop", "length", "abort", "content_filter", "tool_calls", "\ud800", "", "no"])
KEYS = st.sampled_from(["choices", "message", "content", "text", "usage", "logprob", "1", "data", "id"])
ANYTHING = WORDS | st.recursive(
    SCALARS, lambda part: st.lists(part, max_size=4) | st.dictionaries(KEYS, part), max_leaves=20
)


def good_body() -> dict:
    choice = {
        "message": {"content": "fine", "refusal": None},
        "text": "fine",
        "finish_reason": "stop",
        "token_ids": [3, 4],
        "prompt_logprobs": [None, {"1": {"logprob": -0.5}}, {"2": {"logprob": -0.5}}],
    }
    return {"choices": [choice], "usage": {"prompt_tokens": 3}, "data": [{"id": "m", "owned_by": "vllm"}]}


def places(node: object, path: tuple = ()) -> list[tuple]:
    """Yield the paths of all parts of ``node``."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


def spoil(path: tuple, value: object, remove: bool) -> object:
    """A valid body with one part replaced or removed."""
    if not path:
        return value
    body = node = good_body()
    for key in path[:-1]:
        node = node[key]
    if remove:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return body


BODIES = ANYTHING | st.builds(spoil, st.sampled_from(places(good_body())), ANYTHING, st.booleans())


@settings(max_examples=300, deadline=None)
@given(BODIES)
@example(spoil(("choices", 0, "finish_reason"), "tool_calls", False))
@example(spoil(("choices", 0, "finish_reason"), None, True))
@example(spoil(("choices", 0, "message", "content"), "\ud800", False))
@example(spoil(("choices", 0, "message", "refusal"), "no", False))
def test_a_chat_reply_is_what_the_server_said_or_none(body):
    outcome = read_chat(body)
    if isinstance(outcome, Reply):
        choice = body["choices"][0]
        message = choice["message"] if choice.get("message") is not None else {"content": choice["text"]}
        content = message.get("content")
        parts = content if isinstance(content, list) else [content or ""]
        texts = [part if isinstance(part, str) else part.get("text", "") for part in parts]
        assert outcome.text == "".join(texts)
        assert outcome.finish_reason in ("stop", "length")
        assert choice.get("finish_reason") in (outcome.finish_reason, "tool_calls", None, "", {})
        assert not isinstance(message.get("refusal"), str) or not message["refusal"]
        outcome.text.encode()
    else:
        json.dumps(outcome.detail).encode()


@settings(max_examples=300, deadline=None)
@given(BODIES)
def test_a_completion_is_what_the_server_said_or_none(body):
    outcome = read_completion(body)
    if isinstance(outcome, Reply):
        assert outcome.text == body["choices"][0]["text"]
        assert list(outcome.token_ids) == (body["choices"][0].get("token_ids") or [])
        assert all(type(token) is int for token in outcome.token_ids)


@settings(max_examples=300, deadline=None)
@given(BODIES)
def test_log_probabilities_are_finite_numbers_or_none(body):
    outcome = read_logprobs(body, token_ids=(5, 1, 2), first=1)
    if not isinstance(outcome, ServerProblem):
        assert len(outcome) == 2
        assert all(type(value) is float and math.isfinite(value) for value in outcome)


@settings(max_examples=300, deadline=None)
@given(BODIES)
def test_the_rest_never_raises(body):
    read, written, cached = tokens_used(body)
    known = (read, written) if cached is None else (read, written, cached)
    assert all(type(count) is int and 0 <= count < 2**53 for count in known)
    models = read_models(body)
    assert isinstance(models, ServerProblem) or all(isinstance(one.name, str) and one.name for one in models)


def answer(**choice) -> dict:
    return {
        "choices": [{"index": 0, "finish_reason": "stop"} | choice],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2},
    }


def test_a_good_answer_is_not_lost():
    assert read_chat(good_body()) == Reply("fine", (3, 4), "stop", 3)
    assert read_logprobs(good_body(), (5, 1, 2), 1) == [-0.5, -0.5]
    top = [{"token": "1", "logprob": -0.1, "bytes": [49]}, {"token": "2", "logprob": -3, "bytes": None}]
    first = {"token": "1", "logprob": -0.1, "top_logprobs": top}
    for logprobs, expected in (
        ({"content": [first]}, (("1", -0.1), ("2", -3.0))),
        ({"content": []}, ()),
        (None, ()),
        ({"content": [first | {"top_logprobs": [{"token": 1, "logprob": 0.0}]}]}, ()),
        ({"content": [first | {"top_logprobs": [{"token": "1", "logprob": float("nan")}]}]}, ()),
        ({"content": [first | {"top_logprobs": [{"token": "1", "logprob": "high"}]}]}, ()),
        ({"tokens": ["1"], "top_logprobs": [{"1": -0.1}]}, ()),
    ):
        reply = read_chat(answer(message={"content": "1"}, finish_reason="length", logprobs=logprobs))
        assert reply.alternatives == expected
    assert read_chat(answer(message={"content": "Yes.", "refusal": None})) == Reply("Yes.", (), "stop", 9, 2)
    assert read_chat(answer(message={"content": ""}, finish_reason="length")) == Reply("", (), "length", 9, 2)
    assert read_completion(answer(text="Yes.", token_ids=[4, 0])) == Reply("Yes.", (4, 0), "stop", 9, 2)


@pytest.mark.parametrize(
    ("word", "meaning"),
    [("eos_token", "stop"), ("EOS", "stop"), ("stop_sequence", "stop"), ("end_turn", "stop"), ("STOP", "stop"),
     ("max_tokens", "length"), ("model_length", "length"), ("MAX_TOKENS", "length"),
     ("FINISH_REASON_MAX_TOKENS", "length"),
     ("SAFETY", Fault.REFUSED), ("content_filter", Fault.REFUSED), ("abort", Fault.BROKEN), ("error", Fault.BROKEN),
     ("insufficient_system_resource", Fault.BROKEN),
     ("tool_calls", "stop"), ("function_call", "stop"), ({"type": "stop", "matched": 2}, "stop"),
     ({"type": "length", "length": 5}, "length"), ({"type": "abort", "message": "gone"}, Fault.BROKEN),
     ({"type": 7}, Fault.SHAPE), ({"matched": 2}, Fault.SHAPE), (["stop"], Fault.SHAPE),
     ("somehow", Fault.SHAPE), (7, Fault.SHAPE)],
)  # fmt: skip
def test_the_words_of_servers_for_why_an_answer_ended(word, meaning):
    outcome = read_chat(answer(message={"content": "Yes."}, finish_reason=word))
    assert (outcome.fault if isinstance(outcome, ServerProblem) else outcome.finish_reason) == meaning


def test_a_call_of_a_tool_is_no_answer():
    asked = {"content": None, "tool_calls": [{"function": {"name": "answer", "arguments": '{"verdict": "1"}'}}]}
    assert read_chat(answer(message=asked, finish_reason="tool_calls")).fault == Fault.SHAPE


@pytest.mark.parametrize(
    "content", [["Yes", "."], ["Yes", {"type": "text", "text": "."}], {"type": "text", "text": "Yes."}]
)
def test_parts_of_an_answer_may_be_plain(content):
    assert read_chat(answer(message={"content": content})).text == "Yes."


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            {"error": "invalid_request", "error_description": "top_p is too large"},
            "invalid_request: top_p is too large",
        ),
        ({"statusCode": 400, "error": "Bad Request", "message": "no seed"}, "Bad Request: no seed"),
        ({"error": {"message": "no seed", "type": "invalid_request_error", "code": None}}, "no seed"),
        ({"title": "Bad Request", "detail": "no seed", "status": 400}, "no seed: Bad Request"),
        ({"message": "no seed", "error": {"message": "no seed given"}}, "no seed given"),
        ({"error": {"code": 3, "message": "bad", "details": [{"reason": "NO_SEED"}]}}, "bad: NO_SEED"),
    ],
)
def test_all_that_an_error_says_is_told(body, said):
    assert message_in(json.dumps(body).encode()) == said


def test_an_end_without_a_reason_is_known_from_the_length_or_not_at_all():
    body = answer(message={"content": "Yes."}, finish_reason=None)
    assert read_chat(body, max_tokens=3).finish_reason == "stop"
    assert read_chat(body, max_tokens=2).finish_reason == "length"
    assert read_chat(body | {"usage": None}, max_tokens=3).fault == Fault.SHAPE


def test_a_thought_is_no_answer():
    thought = {"content": None, "reasoning_content": '{"reasoning": "r", "verdict": "1"}'}
    assert read_chat(answer(message=thought)).fault == Fault.THOUGHT
    assert read_chat(answer(message=thought | {"content": "\n\n"})).fault == Fault.THOUGHT
    assert read_chat(answer(message=thought, finish_reason="length")) == Reply("", (), "length", 9, 2)


def test_an_error_is_one_whatever_the_status():
    assert read_chat({"error": {"code": 429, "message": "slow down"}}).fault == Fault.BUSY
    assert read_chat({"error": "overloaded"}).fault == Fault.SERVER
    assert read_chat({"object": "error", "message": "too long", "code": 400}).cause == "400: too long"
    assert read_chat({"choices": [{"error": {"code": 502, "message": "gone"}}]}).fault == Fault.SERVER
    half = answer(message={"content": "fi"}) | {"error": {"code": 502, "message": "gone"}}
    assert read_chat(half).cause == "502: gone"
    assert isinstance(read_chat(answer(message={"content": "fine"}) | {"error": None}), Reply)


def test_only_the_first_choice_counts():
    body = answer(message={"content": None})
    body["choices"].append({"finish_reason": "stop", "message": {"content": "second"}})
    assert isinstance(read_chat(body), ServerProblem)


def test_log_probabilities_as_vllm_writes_them():
    entries = [
        None,
        {"7": {"logprob": -0.25, "rank": 1, "decoded_token": " a"}},
        {"3": {"logprob": -0.1, "rank": 1, "decoded_token": " b"}, "8": {"logprob": -2, "rank": 5}},
    ]
    assert read_logprobs(answer(prompt_logprobs=entries), (6, 7, 8), 1) == [-0.25, -2.0]
    assert read_logprobs(answer(prompt_logprobs=entries), (6, 7, 8), 2) == [-2.0]
    # The server's prompt is another one.
    assert isinstance(read_logprobs(answer(prompt_logprobs=entries), (6, 7, 9), 1), ServerProblem)
    assert isinstance(read_logprobs(answer(prompt_logprobs=entries), (6, 7, 8, 9), 1), ServerProblem)


@pytest.mark.parametrize("stand_in", [-9999.0, -math.inf, math.nan, -(10**400), 1.0])
def test_a_log_probability_that_is_none(stand_in):
    entries = [None, {"7": {"logprob": stand_in}}]
    outcome = read_logprobs(answer(prompt_logprobs=entries), (6, 7), 1)
    assert isinstance(outcome, ServerProblem)
    assert outcome.fault == Fault.NOT_FINITE


def test_models():
    first = {"id": "a", "owned_by": "vllm", "root": "/models/a"}
    body = {"data": [first, {"id": ""}, {"id": "b", "owned_by": "x", "root": 3}, 3]}
    assert read_models(body) == [ListedModel("a", True, "/models/a"), ListedModel("b")]
    assert read_models([{"id": "a"}]) == read_models({"models": [{"name": "a"}]}) == [ListedModel("a")]


def test_an_excerpt_is_short_and_can_be_written():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert excerpt(deep) == "deeply nested list"
    assert len(excerpt("x" * 10_000)) <= 500
    excerpt("\ud800").encode()
