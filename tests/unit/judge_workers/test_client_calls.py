"""The HTTP call for a request."""

import json
import subprocess
import sys

import pytest

from megatron_rlpt.judge_workers.client.calls import Call, logprobs_call, reply_call, with_schema
from megatron_rlpt.judge_workers.client.faults import Fault, ServerProblem
from megatron_rlpt.teacher.generator import Message, Request

CHAT = (Message("system", "Be fair."), Message("user", "Which?"))


def call(prompt=CHAT, **more) -> Call:
    made = reply_call(Request(prompt, seed=7, max_tokens=5, temperature=0.5, top_p=0.25, **more))
    assert isinstance(made, Call)
    return made


def test_a_chat():
    made = call()
    assert made.path == "chat/completions"
    assert made.body == {
        "messages": [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "Which?"}],
        "seed": 7,
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.25,
    }


def test_the_most_probable_first_tokens():
    made = call(alternatives=20)
    assert (made.body["logprobs"], made.body["top_logprobs"]) == (True, 20)
    refused = reply_call(Request((1, 2), 7, 5, alternatives=20))
    assert isinstance(refused, ServerProblem)
    assert refused.fault is Fault.REJECTED


def test_the_start_of_an_answer_is_a_turn_that_goes_on():
    body = call(answer_start="The first").body
    assert body["messages"][-1] == {"role": "assistant", "content": "The first"}
    assert body["continue_final_message"] is True
    assert body["add_generation_prompt"] is False


def test_token_ids_are_sent_as_they_are():
    made = call((5, 0, 9))
    assert made.path == "completions"
    assert made.body["prompt"] == [5, 0, 9]
    assert made.vllm["return_token_ids"] is True


def test_nothing_of_the_models_own_sampling_settings_is_left_to_vllm():
    assert call().vllm == {
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def test_a_document_cannot_end_a_turn():
    made = reply_call(
        Request((Message("user", "a<|im_end|>b"),), seed=0, max_tokens=1, answer_start="c<|im_end|>@@"), ["@@"]
    )
    assert isinstance(made, Call)
    assert [message["content"] for message in made.body["messages"]] == ["a< |im_end|>b", "c< |im_end|>@ @"]


def test_a_schema():
    schema = '{"type": "object", "required": ["label"]}'
    assert call(json_schema=schema).schema == schema
    assert with_schema({"model": "m"}, schema) == {
        "model": "m",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": {"type": "object", "required": ["label"]}},
        },
    }


@pytest.mark.parametrize("schema", ["{", "[1]", "[" * 100_000])
def test_a_schema_that_is_none_fails_without_a_server(schema):
    made = reply_call(Request(CHAT, seed=0, max_tokens=1, json_schema=schema))
    assert isinstance(made, ServerProblem)
    assert made.fault == Fault.REJECTED


def test_an_empty_prompt_fails_without_a_server():
    assert reply_call(Request((), seed=0, max_tokens=1)) == ServerProblem(Fault.EMPTY)


def test_half_characters_can_be_sent():
    body = call((Message("user", "\ud800"),)).body
    assert json.loads(json.dumps(body).encode("ascii"))["messages"][0]["content"] == "\ud800"


def test_log_probabilities_of_a_prompt():
    made = logprobs_call([3, 4, 5], 1)
    assert made.path == "completions"
    assert made.body == {"prompt": [3, 4, 5], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}


@pytest.mark.parametrize("first", [0, 3, -1])
def test_no_log_probability_without_a_token_before_or_a_token_at_all(first):
    with pytest.raises(ValueError, match=f"first is {first}"):
        logprobs_call([3, 4, 5], first)


def test_the_client_imports_nothing_heavy():
    code = (
        "import sys, megatron_rlpt.judge_workers.client.pool, megatron_rlpt.judge_workers.discovery; "
        "print([m for m in ('torch', 'vllm', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
