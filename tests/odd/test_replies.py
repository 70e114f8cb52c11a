"""What teacher servers send, driven through ``rlpt judge try``: verdicts are found, reasons shown, keys not."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))
from hostile_server import Exchange, HostileServer, chat, refuses, says

KEY = 'sk-te"st/0123456789abcdefghij'
VERDICT = '{"reasoning": "the first is better", "verdict": "1"}'
TEXTS = ("the cat", "a dog")


@contextmanager
def serving(*script, probe=None, **settings):
    """A hostile server in a thread of its own: the command has an event loop of its own as well."""
    server = HostileServer(list(script), **({"probe": probe} if probe else {}), **settings)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
        yield server
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def judge_try(rlpt, tiny_model, tmp_path):
    """Exit code, output and errors of the command on two candidates, asking ``server``."""

    def run(server, *overrides, **endpoint):
        settings = {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"path": str(tiny_model)},
            "data": {"sources": [{"path": str(tmp_path / "corpus.jsonl")}]},
            "candidates": {"rollouts": 3},
            "train": {"steps": 2, "global_batch": 4, "micro_batch": 2},
            "teacher": {
                "judge": "generative",
                "place": "workers",
                "generative": {"quality": {"votes": 1}},
                "workers": {"request_deadline": 6.0, "endpoints": [{"url": server.url} | endpoint]},
            },
        }
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(settings))
        more = [part for text in overrides for part in ("--set", text)]
        return rlpt("judge", "try", "-c", path, "--prefix", "the", "--candidates", *TEXTS, *more)

    return run


def first(**choice) -> dict:
    return {"choices": [{"index": 0} | choice], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}


def message(**parts) -> dict:
    return {"message": {"role": "assistant"} | parts}


GOOD = {
    "SGLang": first(**message(content=VERDICT, reasoning_content=None), finish_reason="stop", matched_stop=2),
    "TGI": first(**message(content=VERDICT), finish_reason="eos_token", logprobs=None),
    "llama.cpp": first(**message(content=VERDICT), finish_reason="stop") | {"timings": {"predicted_ms": 1.5}},
    "SGLang's object": first(**message(content=VERDICT), finish_reason={"type": "stop", "matched": 2}),
    "tools": first(**message(content=VERDICT, tool_calls=[]), finish_reason="tool_calls"),
    "list of texts": first(**message(content=[VERDICT[:30], VERDICT[30:]]), finish_reason="stop"),
    "thought beside it": first(**message(content=VERDICT, reasoning_content="2?"), finish_reason="stop"),
    "thought in it": first(**message(content=f"<think>2?</think>{VERDICT}"), finish_reason="stop"),
    "list of parts": first(
        **message(
            content=[
                {"type": "thinking", "thinking": [{"type": "text", "text": "2?"}]},
                {"type": "text", "text": VERDICT},
            ]
        ),
        finish_reason="stop",
    ),
    "Anthropic's words": first(**message(content=VERDICT), finish_reason="end_turn"),
    "Gemini's words": first(**message(content=VERDICT), finish_reason="STOP"),
    "no reason": first(**message(content=VERDICT)),
    "reason null": first(**message(content=VERDICT), finish_reason=None),
    "no usage": {"choices": [message(content=VERDICT) | {"finish_reason": "stop"}], "usage": None},
    "counts as floats": chat(VERDICT) | {"usage": {"prompt_tokens": 7.0, "completion_tokens": None}},
    "answer of a completion": first(text=VERDICT, finish_reason="stop"),
}


@pytest.mark.parametrize("body", GOOD.values(), ids=GOOD)
def test_answers_as_servers_send_them(judge_try, body):
    with serving(says(body)) as server:
        code, out, err = judge_try(server)
    assert code == 0, err
    assert "verdict of [0] and [1]: 0" in out or "verdict of [1] and [0]: 1" in out


NO_ROOM = first(**message(content=None, reasoning_content="so"), finish_reason="length")
ONLY_THOUGHT = first(**message(content=None, reasoning_content=VERDICT), finish_reason="stop")
MISSING = {"detail": [{"loc": ["body", "messages"], "msg": "Field required", "type": "missing"}]}
AZURE = {"error": {"code": "content_filter", "message": "The prompt was filtered"}}
TOP_P = "Unsupported parameter: 'top_p' is not supported"
BAD = {
    "thought used up the budget": (says(NO_ROOM), "reply truncated"),
    "cut": (says(first(**message(content=VERDICT[:20]), finish_reason="max_tokens")), "reply truncated"),
    "thought without an end": (says(chat(f"<think>{VERDICT}")), "reply is a thought without an end"),
    "nothing but a thought": (says(ONLY_THOUGHT), "thought without an answer"),
    "filtered": (says(first(**message(content=None), finish_reason="content_filter")), "refused"),
    "filtered, as Azure": (says(AZURE, 400), "refused: 400: The prompt was filtered"),
    "error with 200": (says({"error": {"code": 400, "message": "Not so"}}), "request rejected: 400: Not so"),
    "error as text": (says({"error": "context is too long"}, 400), "request rejected: 400: context is too long"),
    "half of it a code": (
        says({"error": "invalid_request", "error_description": "seed is not for you"}, 400),
        "request rejected: 400: invalid_request: seed is not for you",
    ),
    "FastAPI": (says(MISSING, 422), "422: body.messages: Field required"),
    "HTML": (says(b"<html><title>413 Too Large</title></html>", 413), "request rejected: 413: 413 Too Large"),
    "escapes": (refuses(400, message="\x1b[31mred\nsecond line"), "request rejected: 400: \\x1b[31mred second line"),
    "wrong parameter": (refuses(400, message=TOP_P), f"400: {TOP_P}"),
    "a model's name": (refuses(404, message="No model `x`"), "model or address not found: 404: No model `x`"),
}


@pytest.mark.parametrize(("behaviour", "said"), BAD.values(), ids=BAD)
def test_the_first_cause_is_what_the_user_reads(judge_try, behaviour, said):
    with serving(behaviour) as server:
        code, out, err = judge_try(server)
    assert code == 6, err
    assert said in err.splitlines()[-1]
    assert said in out
    assert "\x1b" not in out + err


def unless(accepts, otherwise):
    """A server that answers requests which it accepts and ``otherwise`` refuses them."""

    async def behave(exchange: Exchange) -> bool:
        return bool(await (says(chat(VERDICT)) if accepts(exchange.body) else otherwise)(exchange))

    return behave


ASKED_OTHERWISE = {
    "max_tokens": (
        lambda body: "max_tokens" not in body and "max_completion_tokens" in body,
        refuses(400, message="Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
    ),
    "seed": (lambda body: "seed" not in body, refuses(400, message="Unrecognized request argument supplied: seed")),
    "schema, 400": (lambda body: "response_format" not in body, refuses(400, message="response_format is unknown")),
    "schema, 422": (lambda body: "response_format" not in body, says({"detail": "no"}, 422)),
    "schema, 500": (lambda body: "response_format" not in body, refuses(500, message="Internal Server Error")),
    "schema, 501": (lambda body: "response_format" not in body, says(b"not implemented", 501)),
}


@pytest.mark.parametrize(("accepts", "refusal"), ASKED_OTHERWISE.values(), ids=ASKED_OTHERWISE)
def test_what_a_server_does_not_take_is_left_out(judge_try, accepts, refusal):
    with serving(unless(accepts, refusal)) as server:
        code, _, err = judge_try(server)
    assert code == 0, err


def test_the_configuration_says_how_a_server_is_asked(judge_try):
    with serving(says(chat(VERDICT))) as server:
        code, _, err = judge_try(
            server,
            rename={"max_tokens": "max_completion_tokens"},
            drop=["seed", "top_p", "response_format"],
            add={"chat_template_kwargs": {"enable_thinking": False}},
        )
        assert code == 0, err
        body = server.requests[-1].body
    assert body["max_completion_tokens"] == 512
    assert not {"max_tokens", "seed", "top_p", "response_format"} & body.keys()
    assert body["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    "endpoint",
    [{"add": {"model": "x"}}, {"add": {"messages": []}}, {"add": {"stream": True}},
     {"drop": ["messages"]}, {"rename": {"model": "m"}},
     {"rename": {"a": "stream"}}, {"proxy": "socks9"}, {"proxy": "http://me:secret-word@proxy:1"}],
)  # fmt: skip
def test_what_is_asked_cannot_be_changed(judge_try, endpoint):
    with serving() as server:
        code, _, err = judge_try(server, **endpoint)
    assert code == 2
    assert "teacher.workers.endpoints[0]" in err
    assert "secret-word" not in err


@pytest.mark.parametrize("form", ["{}", "json", "unicode", "url"])
def test_a_key_is_never_shown_however_the_server_repeats_it(judge_try, monkeypatch, form):
    from urllib.parse import quote

    monkeypatch.setenv("TEACHER_KEY", KEY)
    spelt = {
        "json": json.dumps(KEY)[1:-1].replace("/", "\\/"),
        "url": quote(KEY, safe=""),
        "unicode": "".join(f"\\u{ord(char):04x}" for char in KEY),
    }.get(form, KEY)
    with serving(refuses(400, message=f"wrong key {spelt} given")) as server:
        code, out, err = judge_try(server, api_key_env="TEACHER_KEY")
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert code == 6
    assert "wrong key <key> given" in err
    assert "0123456789abcdefghij" not in out + err


@pytest.mark.parametrize(
    "key", ["sk-proj-abcdef0123456789", "gsk_abcdefghij0123456789klmn", "0123456789abcdef0123", "a b"]
)
@pytest.mark.parametrize("place", ["file", "override", "broken override"])
def test_a_key_in_place_of_its_name_is_refused_and_not_shown(judge_try, key, place):
    with serving() as server:
        if place == "file":
            code, out, err = judge_try(server, api_key_env=key)
        else:
            index = 0 if place == "override" else 7
            code, out, err = judge_try(server, f"teacher.workers.endpoints[{index}].api_key_env={key}")
    assert code == 2
    assert key not in out + err
