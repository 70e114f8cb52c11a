"""Prompts with answers as a source: one whole episode each, by the chat template, with its label; resumed exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlpt.buffer.codec import decode_group, encode_group
from megatron_rlpt.config import DataConfig, HeldOutOverlap, SourceConfig
from megatron_rlpt.data import EpisodeStream
from megatron_rlpt.data.episodes import heldout_episodes
from megatron_rlpt.data.overlap import HeldOut
from megatron_rlpt.errors import DataError, ModelError
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Group


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return PolicyTokenizer(smollm2)


def record(number: int, **changes) -> dict:
    text = f"Say {number} now." + " Please do." * (number % 3)
    return {"prompt": text, "answer": f"It is {number}.", "label": {"verdict": str(number)}} | changes


def write(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def settings(path: Path, **changes) -> DataConfig:
    data = {"sources": [SourceConfig(path=str(path), prompts=True)], "max_prefix": 80, "suffix_length": 16}
    return DataConfig(**data | {"min_prefix": 8, "shuffle_buffer": 8, "max_bad_fraction": 1.0} | changes)


def stream(config, tokenizer, **changes) -> EpisodeStream:
    return EpisodeStream(config, tokenizer.encode, seed=1, vocabulary=tokenizer.vocabulary, **changes)


def test_a_prompt_is_one_episode_with_its_answer_and_label(tmp_path, tokenizer):
    path = write(tmp_path / "prompts.jsonl", map(record, range(20)))
    episodes = stream(settings(path, shuffle_buffer=1), tokenizer).take(20)
    assert len({episode.id for episode in episodes}) == 20
    for episode in episodes:
        number = json.loads(episode.label)["verdict"]
        text = tokenizer.text_of(episode.prefix)
        assert f"user\nSay {number} now." in text
        assert text.endswith("<|im_start|>assistant\n")
        assert tokenizer.text_of(episode.suffix, episode.prefix) == f"It is {number}.<|im_end|>"
        assert decode_group(encode_group(Group(episode, ()))).episode == episode


def test_messages_an_answer_that_is_begun_and_one_that_nobody_knows(tmp_path, tokenizer):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Count <|im_end|> to 3."}]
    path = write(tmp_path / "prompts.jsonl", [{"prompt": turns, "answer_start": "One,", "label": {"n": 3}}])
    [episode] = stream(settings(path), tokenizer).take(1)
    text = tokenizer.text_of(episode.prefix)
    assert "Be brief." in text
    assert text.endswith("assistant\nOne,")
    assert text.count("<|im_end|>") == 2, "the one in the text is no control token"
    assert episode.suffix == ()


def test_the_stream_resumes_at_the_next_prompt(tmp_path, tokenizer):
    path = write(tmp_path / "prompts.jsonl", map(record, range(30)))
    whole = stream(settings(path), tokenizer).take(25)
    first = stream(settings(path), tokenizer)
    assert first.take(10) == whole[:10]
    second = stream(settings(path), tokenizer)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.take(15) == whole[10:]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"prompt": " "}, "'prompt' is empty"),
        ({"prompt": 3}, "no 'prompt' that is a string or a list of messages"),
        ({"prompt": [{"role": "user"}]}, "no 'content' that is a string"),
        ({"answer": 1}, "'answer' or 'answer_start' is not a string"),
        ({"label": "1"}, "'label' is str, not an object"),
        ({"anser": "x"}, "unknown field 'anser'"),
    ],
)
def test_what_is_no_prompt_is_malformed_with_the_reason(tmp_path, tokenizer, wrong, reason):
    path = write(tmp_path / "prompts.jsonl", [record(1), record(2, **wrong)])
    one = stream(settings(path), tokenizer, quarantine=tmp_path / "quarantine.jsonl")
    assert len({episode.id for episode in one.take(3)}) == 1
    assert reason in (tmp_path / "quarantine.jsonl").read_text()


def test_prompts_and_answers_that_are_too_long_are_counted_and_never_cut(tmp_path, tokenizer):
    long = [record(1, prompt="word " * 100), record(2, answer="word " * 100)]
    path = write(tmp_path / "prompts.jsonl", [*long, record(3)])
    one = stream(settings(path), tokenizer)
    assert {json.loads(episode.label)["verdict"] for episode in one.take(4)} == {"3"}
    assert one.metrics()["data/too_long"] >= 2
    only = write(tmp_path / "long.jsonl", long)
    with pytest.raises(DataError, match=r"2 prompts too long\); raise data\.max_prefix and data\.suffix_length"):
        stream(settings(only), tokenizer).take(1)
    heldout = settings(path, heldout=[SourceConfig(path=str(only), prompts=True)])
    with pytest.raises(
        DataError, match=r"0 malformed, 2 prompts too long; raise data\.max_prefix and data\.suffix_length"
    ):
        heldout_episodes(heldout, 4, tokenizer.encode, vocabulary=tokenizer.vocabulary)


def test_a_held_out_prompt_is_kept_out_though_all_share_their_instructions(tmp_path, tokenizer):
    instructions = " ".join(f"Rule {number} holds." for number in range(12))
    path = write(tmp_path / "a.jsonl", [record(n, prompt=f"{instructions} Say {n}.") for n in range(10)])
    kept = write(tmp_path / "b.jsonl", [record(n, prompt=f"{instructions} Say {n}.") for n in (3, 11)])
    config = settings(path, max_prefix=200, heldout_overlap=HeldOutOverlap.skip)
    held_out = HeldOut({"data.heldout": [SourceConfig(path=str(kept), prompts=True)]}, tokenizer.vocabulary)
    served = stream(config, tokenizer, held_out=held_out).take(30)
    assert {json.loads(episode.label)["verdict"] for episode in served} == {str(n) for n in range(10) if n != 3}
    with pytest.raises(DataError, match="is also held out"):
        held_out.scan(replace(config).sources)


def test_a_tokenizer_without_a_chat_template_is_refused_with_the_fix(tmp_path, tiny_model):
    path = write(tmp_path / "prompts.jsonl", [record(1)])
    with pytest.raises(ModelError, match="has no chat template, so it cannot be given prompts; set"):
        stream(settings(path), PolicyTokenizer(tiny_model))
