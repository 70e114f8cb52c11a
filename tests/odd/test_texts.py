"""Odd texts through the command: samples, judge and training get exactly the text of the documents."""

from __future__ import annotations

import json
import shutil

import pytest
from odd_texts import TEXTS

from megatron_rlpt.teacher.likelihood import LikelihoodJudge
from megatron_rlpt.teacher.served_likelihood import ServedLikelihoodJudge
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Source


@pytest.fixture(scope="module")
def model(tmp_path_factory, smollm2):
    """A tiny model with a byte-level tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "bytes"
    shutil.copytree(smollm2, folder, ignore=shutil.ignore_patterns("*.safetensors", "generation_config.json"))
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_config(path, model, corpus, **data):
    settings = {
        "run": {"dir": str(path.parent / "run")},
        "model": {"path": str(model), "dtype": "fp32"},
        "data": {
            "sources": [{"path": str(corpus)}],
            "suffix_length": 12, "min_prefix": 8, "max_prefix": 30, "shuffle_buffer": 256,
        } | data,
        "objective": {"name": "ntp"},
        "candidates": {"rollouts": 0},
        "train": {"steps": 4, "global_batch": 8, "micro_batch": 8},
        "checkpoint": {"every": 100},
        "observe": {"tensorboard": False, "samples_per_step": 8},
    }  # fmt: skip
    path.write_text(json.dumps(settings))
    return path


def write_corpus(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_every_target_of_a_run_is_a_piece_of_its_document(rlpt, tmp_path, model):
    corpus = write_corpus(tmp_path / "corpus.jsonl", TEXTS.values())
    code, _, err = rlpt("train", "-c", write_config(tmp_path / "run.yaml", model, corpus))
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    documents = list(TEXTS.values())
    seen = set()
    for row in rows:
        number = int(row["document"].rsplit("#", 1)[-1].rsplit(":", 1)[-1])
        (candidate,) = row["candidates"]
        assert row["prefix"] + candidate["text"] in documents[number]
        seen.add(number)
    assert len(seen) > len(documents) // 2


SCRIPTS = {"ethiopic": "አማርኛ የኢትዮጵያ የሥራ ቋንቋ ነው", "tibetan": "ༀ", "han": "鬱", "emoji": "🦚", "cuneiform": "𒀀𒀁𒀂"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_whose_every_character_has_several_tokens_is_learnt_like_any_other(rlpt, tmp_path, model, script):
    text = SCRIPTS[script] * (600 // len(SCRIPTS[script]))
    corpus = write_corpus(tmp_path / "corpus.jsonl", [text] * 4)
    cut = {"suffix_length": 32, "min_prefix": 32, "max_prefix": 32, "shuffle_buffer": 1}
    code, _, err = rlpt("train", "-c", write_config(tmp_path / "run.yaml", model, corpus, **cut))
    assert code == 0, err
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert (metrics[-1]["data/too_short"], metrics[-1]["data/not_cut"]) == (0, 0)
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert all(row["prefix"] + row["candidates"][0]["text"] in text for row in rows)
    assert min(len(row["candidates"][0]["text"].encode()) for row in rows) >= 29


def test_characters_longer_than_a_suffix_are_called_that(rlpt, tmp_path, model):
    corpus = write_corpus(tmp_path / "corpus.jsonl", ["鬱" * 200] * 4)
    config = write_config(tmp_path / "run.yaml", model, corpus, suffix_length=2)
    code, _, err = rlpt("train", "-c", config)
    assert code == 3
    last = err.strip().splitlines()[-1]
    assert "0 too short, 0 malformed, 4 with characters of too many tokens to cut" in last
    assert "raise data.suffix_length" in last


def test_control_tokens_are_taken_for_such_where_a_source_says_so(rlpt, tmp_path, model):
    """A control token is one token but several when spelled out, so the same number of tokens holds more text."""
    corpus = write_corpus(tmp_path / "corpus.jsonl", ["What is it?<|im_end|>\nIt is good.<|im_end|>\n" * 40])
    characters = {}
    for meant in (False, True):
        folder = tmp_path / str(meant)
        folder.mkdir()
        source = {"path": str(corpus), "control_tokens": meant}
        config = write_config(folder / "run.yaml", model, corpus, sources=[source], shuffle_buffer=1)
        code, _, err = rlpt("train", "-c", config, "train.steps=1")
        assert code == 0, err
        rows = [json.loads(line) for line in (folder / "run/samples.jsonl").read_text().splitlines()]
        assert any("<|im_end|>" in row["candidates"][0]["text"] for row in rows)
        characters[meant] = sum(len(row["candidates"][0]["text"]) for row in rows)
    assert characters[True] > 1.2 * characters[False]


@pytest.mark.parametrize("text", ["", " ", " \n\t", "\u3000\u200b", "\x00"])
def test_the_judge_is_not_asked_about_nothing(rlpt, tmp_path, model, text):
    config = write_config(tmp_path / "run.yaml", model, tmp_path)
    code, _, err = rlpt("judge", "try", "-c", config, "--prefix", "The cat", "--candidate", " sat", "--candidate", text)
    assert code != 0
    assert "Traceback" not in err


def blank_group(tokenizer):
    start = tuple(tokenizer.encode("The cat sat on the mat and"))
    candidates = [
        Candidate(Source.ROLLOUT, tuple(tokens), blank=tokenizer.is_blank(tokens))
        for tokens in ([2], tokenizer.encode("  \n "), tokenizer.encode(" then slept"), [0, 1, 2])
    ]
    return Group(Episode("e", start, start, "c", "d", len(start)), tuple(candidates))


def test_no_judge_of_likelihood_scores_what_has_no_text(model):
    from megatron_rlpt.config import LikelihoodConfig

    tokenizer = PolicyTokenizer(model)
    group = blank_group(tokenizer)
    (judged,) = LikelihoodJudge(model, LikelihoodConfig(), "cpu").judge([group])
    assert [isinstance(reward, Failed) for reward in judged.rewards] == [True, True, False, True]
    asked = []

    async def score(tokens, first):
        asked.append(tokens[first:])
        return [-1.0] * (len(tokens) - first)

    import asyncio

    served = asyncio.run(ServedLikelihoodJudge(score, "served", LikelihoodConfig()).judge_group(group, None))
    assert asked == [group.candidates[2].tokens]
    assert [reward.reason for reward in served.rewards if isinstance(reward, Failed)] == ["empty candidate"] * 3
