"""Replies of teacher servers through ``rlpt judge try``: verdicts are found, reasons are shown, keys are not."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import html
import http.client
import http.server
import json
import logging
import sys
import threading
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from megatron_rlpt.buffer.open import open_url
from megatron_rlpt.config import EndpointConfig
from megatron_rlpt.judge_workers.client.faults import Fault, ServerProblem
from megatron_rlpt.judge_workers.client.pool import TeacherPool
from megatron_rlpt.teacher.generator import Message, Request
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Source

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))
from hostile_server import Exchange, chat, refuses, says, serving

KEY = 'sk-te"st/0123456789abcdefghij'
VERDICT = '{"reasoning": "the first is better", "verdict": "1"}'
TEXTS = ("the cat", "a dog")


@pytest.fixture
def judge_try(rlpt, tiny_model, tmp_path):
    """Run the command on two candidates with ``server``; return exit code, output and errors."""

    def run(server, *overrides, **endpoint):
        settings = {
            "run": {"dir": str(tmp_path / "run")},
            "model": {"path": str(tiny_model)},
            "data": {"sources": [{"path": str(tmp_path / "corpus.jsonl")}]},
            "candidates": {"rollouts": 3},
            "train": {"steps": 2, "global_batch": 4, "micro_batch": 2},
            "teacher": {
                "judge": "generative",
                "run_in": "workers",
                "generative": {"quality": {"votes": 1}},
                "workers": {"request_deadline": 6.0, "endpoints": [{"url": server.url} | endpoint]},
            },
        }
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(settings))
        return rlpt(
            "judge",
            "try",
            "-c",
            path,
            "--prefix",
            "the",
            *(part for text in TEXTS for part in ("--candidate", text)),
            *overrides,
        )

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


SPELT = {
    "as it is": KEY,
    "json": json.dumps(KEY)[1:-1].replace("/", "\\/"),
    "url": quote(KEY, safe=""),
    "unicode": "".join(f"\\u{ord(char):04x}" for char in KEY),
    "html": html.escape(KEY),
    "html, numbers": "".join(char if char.isalnum() else f"&#{ord(char)};" for char in KEY),
    "html, hexadecimal": "".join(char if char.isalnum() else f"&#x{ord(char):X};" for char in KEY),
    "base64": base64.b64encode(KEY.encode()).decode(),
    "base64 for URLs": base64.urlsafe_b64encode(KEY.encode()).decode(),
    "base64 of a user's": base64.b64encode(f":{KEY}".encode()).decode(),
    "base64 of a header": base64.b64encode(f"Bearer {KEY}".encode()).decode(),
}


def test_a_key_is_never_shown_however_the_server_repeats_it(judge_try, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with serving(refuses(400, message=f"wrong: {' or '.join(SPELT.values())} given")) as server:
        code, out, err = judge_try(server, api_key_env="TEACHER_KEY")
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert code == 6
    assert "wrong: <key> or <key> or" in err
    assert "0123456789abcdefghij" not in out + err
    assert [name for name, spelt in SPELT.items() if spelt.rstrip("=") in out + err] == []


def test_a_server_as_azure_has_it(judge_try, monkeypatch):
    """The key is in a special header, and every request has a query."""
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with serving(says(chat(VERDICT))) as server:
        deployment = f"{server.url}/openai/deployments/judge"
        code, out, err = judge_try(
            server,
            url=f"{deployment}?api-version=2024-10-21",
            model="judge",
            api_key_env="TEACHER_KEY",
            key_header="api-key",
        )
        asked = server.requests[-1]
    assert code == 0, err
    assert asked.path == f"{urlsplit(deployment).path}/chat/completions?api-version=2024-10-21"
    assert asked.headers["api-key"] == KEY
    assert "authorization" not in asked.headers
    assert "0123456789abcdefghij" not in out + err


class Forwarding(http.server.BaseHTTPRequestHandler):
    """A proxy that forwards every request."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.server.passed.append((self.path, self.headers.get("Proxy-Authorization", "")))
        target = urlsplit(self.path)
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if not name.lower().startswith("proxy-")}
        with contextlib.closing(http.client.HTTPConnection(target.netloc, timeout=10)) as connection:
            connection.request(self.command, target.path, data, headers)
            answer = connection.getresponse()
            body = answer.read()
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forwarding) as server:
        server.passed = []
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("asked_for", "environment", "goes_through"),
    [
        ("http://{}", {}, True),
        ("", {"HTTP_PROXY": "http://{}"}, False),
        ("env", {"HTTP_PROXY": "http://me:secret-word@{}"}, True),
        ("env", {"HTTP_PROXY": "http://{}", "NO_PROXY": "127.0.0.1"}, False),
        ("env", {}, False),
    ],
)
def test_a_proxy_is_used_when_it_is_asked_for(judge_try, proxy, monkeypatch, asked_for, environment, goes_through):
    place = f"127.0.0.1:{proxy.server_port}"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        for spelt in (name, name.lower()):
            monkeypatch.delenv(spelt, raising=False)
        if name in environment:
            monkeypatch.setenv(name.lower(), environment[name].format(place))
    with serving(says(chat(VERDICT))) as server:
        code, out, err = judge_try(server, proxy=asked_for.format(place))
        assert code == 0, err
        assert server.requests
        questions = [who for path, who in proxy.passed if path == f"{server.url}/chat/completions"]
    assert bool(questions) == bool(proxy.passed) == goes_through
    secret = f"Basic {base64.b64encode(b'me:secret-word').decode()}"
    assert all(who == (secret if "secret-word" in str(environment) else "") for who in questions)
    assert "secret-word" not in out + err


BEGUN = "The first and last words of the beginning"


def test_an_answer_that_a_server_does_not_go_on_with_is_begun_in_the_question(caplog, monkeypatch):
    """Asked for by the rewriter: the words it was to begin with are no part of the answer. Said once."""
    monkeypatch.setattr(logging.getLogger("megatron_rlpt"), "propagate", True)
    refusal = says({"error": {"message": "Unrecognized request argument supplied: continue_final_message"}}, 400)

    async def behave(exchange: Exchange) -> bool:
        last = exchange.body["messages"][-1]
        if "continue_final_message" in exchange.body or last["role"] != "user":
            return bool(await refusal(exchange))
        return bool(await says(chat(f"{BEGUN}  and what comes next"))(exchange))

    async def ask(server) -> list:
        request = Request((Message("user", "Go on."),), seed=1, max_tokens=9, answer_start=BEGUN)
        async with TeacherPool([EndpointConfig(server.url)], 10.0) as pool:
            await pool.wait_until_ready(10.0)
            return [await pool(request) for _ in range(3)]

    with serving(behave) as server:
        replies = asyncio.run(ask(server))
        assert [reply.text for reply in replies] == ["  and what comes next"] * 3
        refused, *taken = [exchange.body for exchange in server.requests]
    assert refused["messages"][-1] == {"role": "assistant", "content": BEGUN}
    assert len(taken) == 3, "the second way is kept"
    assert all(BEGUN in body["messages"][-1]["content"] for body in taken)
    assert not any({"continue_final_message", "add_generation_prompt"} & body.keys() for body in taken)
    # A record appears twice if its logger has the handler of pytest and also propagates.
    (said,) = {id(record): record for record in caplog.records if "refused a request" in record.getMessage()}.values()
    assert "the prompt says how the answer should begin" in said.getMessage()
    assert "continue_final_message" in said.fields["message"]


def test_the_first_cause_is_in_what_the_buffer_shows(rlpt, tmp_path):
    url = f"sqlite:///{tmp_path}/buffer.sqlite"
    refused = ServerProblem(Fault.REJECTED, {"status": 400, "message": "unsupported parameter\nmax_tokens"}).failed()
    undecided = Failed("no comparison decided").because_of(refused)
    candidates = (Candidate(Source.ORIGINAL, (3,)), Candidate(Source.ROLLOUT, (4,)))
    group = Group(Episode("e", (1,), (2,), "c", "d", 0), candidates)
    with contextlib.closing(open_url(url, "run")) as buffer:
        fencing_token = buffer.attach("settings", 0, capacity=1, max_attempts=1)
        buffer.put(fencing_token, [(0, group)])
        (work,) = buffer.claim("worker", 1, 60.0, "token")
        buffer.complete(work, replace(work.group, rewards=(undecided,) * 2, rewrite_failure=refused))
    code, out, err = rlpt("buffer", "tail", "--url", url, "--name", "run")
    assert code == 0, err
    cause = "request rejected: 400: unsupported parameter max_tokens"
    assert f"original failed (no comparison decided: {cause})" in out
    assert f"rewrite failed ({cause})" in out
    assert len(out.splitlines()) == 1


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
