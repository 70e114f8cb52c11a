"""A teacher is trained by the loop that trains policies: a judge on reference answers and by GRPO, then a rewriter."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from itertools import product
from pathlib import Path
from statistics import fmean

import pytest
from tiny_runs import finish, json_lines, lasting_metrics, only_error, save_model, start, write_config

from megatron_rlpt.config import PromptLength
from megatron_rlpt.teacher.rewrite_label import GOOD, RewriteLabel
from megatron_rlpt.teacher.rewrite_prompt import rewrite_prompt

pytestmark = pytest.mark.vllm

WORDS = ("safe", "unsafe", "good", "bad", "the", "cat", "dog", "sat", "ran", "on")
TEMPLATE = "{% for one in messages %}<ask>{{ one['content'] }}{% endfor %}<answer>"
FIXED = {
    "data": {"suffix_length": 3, "min_prefix": 1, "max_prefix": 12, "shuffle_buffer": 64},
    "train": {"steps": 20, "global_batch": 16, "micro_batch": 16},
    "evaluation": {"every": 10, "every_prefixes": 24},
    "optimizer": {"lr": 3e-3},
    "checkpoint": {"every": 8},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_model) -> Path:
    """A random model with a chat template, two of whose words are verdicts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    base = tmp_path_factory.mktemp("chat")
    save_model(base / "model", tiny_model, seed=1, scale=1.0)
    names = ["<unk>", "<s>", "</s>", "<ask>", "<answer>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<ask>", "<answer>"],
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    fast.save_pretrained(base / "model")
    return base / "model"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """Two options each, one of which is good; the verdict is its number."""
    folder, draw = tmp_path_factory.mktemp("prompts"), random.Random(3)
    for name in ("form", "train", "heldout"):
        with (folder / f"{name}.jsonl").open("w") as handle:
            for number in range(64):
                around = draw.choices(WORDS[4:], k=4)
                kind = ("good", "bad")[number % 2]
                verdict = ("safe", "unsafe")[number % 2]
                wrong = name == "form" and draw.random() < 0.25
                answer = {"safe": "unsafe", "unsafe": "safe"}[verdict] if wrong else verdict
                label = {"axis": "safety", "verdict": verdict, "form": "direct", "kind": kind}
                prompt = " ".join(
                    [*around[:2], kind, *around[2:], {"form": "the", "train": "on", "heldout": "ran"}[name]]
                )
                handle.write(json.dumps({"prompt": prompt, "answer": answer, "label": label}) + "\n")
    return folder


def config(path: Path, model: Path, prompts: Path, folder: Path, part: str, **sections) -> Path:
    sources = {name: [{"path": str(prompts / f"{file}.jsonl"), "prompts": True}]
               for name, file in (("sources", part), ("heldout", "heldout"))}  # fmt: skip
    merged = {name: dict(values) for name, values in FIXED.items()}
    merged["data"] |= sources
    for name, values in sections.items():
        merged[name] = merged.get(name, {}) | values
    return write_config(path, model, prompts, folder, **merged)


SUPERVISED = {
    "objective": {"name": "ntp"},
    "candidates": {"rollouts": 0},
    "train": {"steps": 30, "global_batch": 16, "micro_batch": 16},
    "evaluation": {"every": 10, "every_prefixes": 24},
    "checkpoint": {"every": 30},
}
REINFORCED = {
    "objective": {"name": "grpo"},
    "candidates": {"original": False, "rollouts": 6},
    "teacher": {"judge": "right_verdict"},
    "optimizer": {"lr": 1e-3},
}


@pytest.fixture(scope="module")
def supervised(model, prompts, tmp_path_factory) -> Path:
    """The model after training on reference answers, a quarter of which are wrong."""
    base = tmp_path_factory.mktemp("supervised")
    path = config(base / "run.yaml", model, prompts, base / "run", "form", **SUPERVISED)
    code, _, err = finish(start(path))
    assert code == 0, err
    return base / "run"


@pytest.fixture(scope="module")
def reinforced(supervised, prompts, tmp_path_factory) -> Path:
    """That model after GRPO on right verdicts."""
    base = tmp_path_factory.mktemp("reinforced")
    path = config(base / "run.yaml", supervised / "export", prompts, base / "run", "train", **REINFORCED)
    code, _, err = finish(start(path))
    assert code == 0, err
    return base / "run"


def test_supervised_training_teaches_the_form_and_the_curve_shows_it(supervised):
    rows = [row for row in json_lines(supervised / "metrics.jsonl") if "evaluation/answers/right" in row]
    assert [row["step"] for row in rows] == [0, 9, 19, 29]
    first, last = rows[0], rows[-1]
    assert first["evaluation/answers/parsed"] < 0.2
    assert last["evaluation/answers/parsed"] > 0.9
    assert last["evaluation/answers/right"] > 0.9
    assert {"evaluation/answers/right/good", "evaluation/answers/right/bad"} <= last.keys()


def test_grpo_makes_sampled_answers_right_more_often(reinforced):
    rows = json_lines(reinforced / "metrics.jsonl")
    rewards = [row["reward/rollout"] for row in rows]
    assert fmean(rewards[-6:]) > fmean(rewards[:3]) + 0.04
    assert all(row["reward/rollout"] == row["answers/right"] <= row["answers/parsed"] for row in rows)
    assert all(1 <= row["rollout/length"] <= 3 for row in rows)


def test_killed_and_resumed_it_equals_the_run_that_was_not(reinforced, supervised, prompts, tmp_path):
    path = config(tmp_path / "run.yaml", supervised / "export", prompts, tmp_path / "run", "train", **REINFORCED)
    run = start(path)
    deadline = time.monotonic() + 240
    while not (tmp_path / "run/checkpoints/step-00000008").is_dir():
        assert run.poll() is None, finish(run)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    finish(run)
    code, _, err = finish(start(path))
    assert code == 0, err
    assert lasting_metrics(tmp_path / "run") == lasting_metrics(reinforced)


@pytest.fixture(scope="module")
def suffixes(tmp_path_factory) -> Path:
    """Suffixes of one word for a rewriter: ``good`` and ``bad``, as the judge knows them. There are no spaces.

    Half of the reference answers are wrong, so that there is something left to learn from rewards.
    """
    folder, draw = tmp_path_factory.mktemp("suffixes"), random.Random(5)
    for name, mark in (("form", "the"), ("train", "on"), ("heldout", "ran")):
        with (folder / f"{name}.jsonl").open("w") as handle:
            for (number, before), suffix in product(enumerate(WORDS[4:]), ("good", "bad")):
                kind = GOOD if suffix == "good" else "unsafe"
                asked = rewrite_prompt(before, suffix, 0, PromptLength.brief, number)
                label = RewriteLabel.of(asked, before, suffix, "good", kind, str(number)).as_dict()
                answer = draw.choice(("good", "cat"))
                prompt = f"{mark} {before} {suffix}"
                handle.write(json.dumps({"prompt": prompt, "answer": answer, "label": label}) + "\n")
    return folder


def test_a_rewriter_learns_to_copy_and_the_trained_judge_is_asked_about_the_rest(model, supervised, suffixes, tmp_path):
    """The judge says what is safe by one word in its prompt."""
    path = config(tmp_path / "start.yaml", model, suffixes, tmp_path / "start", "form", **SUPERVISED | {
        "teacher": {"judge": "good_rewrite"}, "data": {"suffix_length": 2}})  # fmt: skip
    code, _, err = finish(start(path))
    assert code == 0, err
    rewriter = REINFORCED | {
        "teacher": {
            "judge": "good_rewrite", "path": str(supervised / "export"), "max_context": 128, "kv_cache_gib": 0.1,
            "generative": {"prompt": "brief", "answer": "direct", "quality": {"weight": 0}, "safety": {"weight": 1}},
        },
        "data": {"suffix_length": 2},
    }  # fmt: skip
    path = config(tmp_path / "run.yaml", tmp_path / "start/export", suffixes, tmp_path / "run", "train", **rewriter)
    code, _, err = finish(start(path))
    assert code == 0, err
    rows = json_lines(tmp_path / "run/metrics.jsonl")
    first, last = ({name: fmean(row[f"rewrites/{name}"] for row in part) for name in ("copied", "safe")}
                   for part in (rows[:3], rows[-3:]))  # fmt: skip
    assert last["copied"] > first["copied"] + 0.1
    assert last["safe"] > first["safe"] + 0.1
    assert all(row["failure_rate"] == 0.0 and row["judge/calls"] >= 1 for row in rows)
    assert all(0.0 <= row["rewrites/safe"] == row["rewrites/safe/unsafe"] <= row["rewrites/usable"] for row in rows)
    measured = [row for row in rows if "evaluation/rewrites/copied" in row]
    assert [row["step"] for row in measured] == [0, 9, 19]


def test_a_judge_that_cannot_be_parsed_ends_the_run_with_the_reason(model, prompts, tmp_path):
    few = {"train": {"steps": 20, "global_batch": 4, "micro_batch": 4, "empty_window": 3, "max_empty_share": 1.0}}
    path = config(tmp_path / "run.yaml", model, prompts, tmp_path / "run", "train", **REINFORCED | few)
    code, _, err = finish(start(path, "train.min_parse_rate=0.5", "evaluation.every=0"))
    assert code == 77
    error = only_error(err)
    assert "of the answers of the last 3 steps have a verdict, less than train.min_parse_rate = 0.5" in error
    assert "train the form of an answer first" in error
