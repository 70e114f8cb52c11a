"""A judge of the world, made from scratch and taught to answer, in vLLM: prompts fit, and calibration measures it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rlpt.cli.judge_calibrate import Asked, calibrate_judges
from megatron_rlpt.config import AnswerForm, GenerativeConfig, PromptLength, QualityConfig, RewriterConfig, load_config
from megatron_rlpt.convert.fresh import init
from megatron_rlpt.evaluation.labelled_pairs import PairPlan, pairs_of_world
from megatron_rlpt.teacher.batched import BatchedJudge, BatchedRewriter
from megatron_rlpt.teacher.generative import GenerativeJudge
from megatron_rlpt.teacher.prompts import build_prompt
from megatron_rlpt.teacher.rewriter import Rewriter
from megatron_rlpt.teacher.verdicts.parsing import Reason
from megatron_rlpt.teacher.vllm_generator import VllmGenerator
from megatron_rlpt.tokens.chat_tokenizer import ChatTokenizer
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Failed, derive_seed
from megatron_rlpt.world.make import WorldSettings, make_world

PREFIX, SUFFIX, CONTEXT = 64, 48, 512
KINDS = ("shuffled", "foreign")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "world"
    make_world(folder, WorldSettings(documents=40, heldout=12, entities=60))
    init(folder / "judge", folder / "fresh", None, seed=1, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def config(world):
    """A run with the judge that answers, and its file."""
    settings = {
        "run": {"dir": str(world / "run")},
        "model": {"path": str(world / "policy"), "dtype": "fp32"},
        "data": {
            "sources": [{"path": str(world / "train.jsonl")}],
            "heldout": [{"path": str(world / "heldout.jsonl")}],
            "suffix_length": SUFFIX, "min_prefix": 24, "max_prefix": PREFIX,
        },
        "train": {"steps": 1},
        "teacher": {
            "path": str(world / "answers"), "judge": "generative", "dtype": "fp32", "max_context": CONTEXT,
            "kv_cache_gib": 0.1, "generative": {"prompt": "brief", "answer": "direct"},
        },
    }  # fmt: skip
    path = world / "run.yaml"
    path.write_text(json.dumps(settings))
    return load_config(path)


@pytest.fixture(scope="module")
def pairs(config, world):
    return pairs_of_world(world, config, PolicyTokenizer(world / "policy"), PairPlan(8, KINDS, (SUFFIX,)))


@pytest.fixture(scope="module")
def fresh(world):
    return VllmGenerator(world / "fresh", CONTEXT, kv_cache_gib=0.1)


def judged(generator, pairs, world, form):
    asked = GenerativeConfig(QualityConfig(1.0, votes=1), answer=form, prompt=PromptLength.brief, max_tokens=64)
    judge = BatchedJudge(GenerativeJudge(generator.name, PolicyTokenizer(world / "policy"), asked, 1), generator)
    return judge.judge([pair.group() for pair in pairs])


def test_prompts_and_answers_of_fresh_weights_fit(fresh, pairs, world):
    """Random weights seldom give a verdict, but they are asked and they answer."""
    for form, reasons in ((AnswerForm.direct, {"first token is no verdict"}), (AnswerForm.reasoned, set(Reason))):
        groups = judged(fresh, pairs, world, form)
        failed = [reward for group in groups for reward in group.rewards if isinstance(reward, Failed)]
        assert {reward.root for reward in failed} <= reasons
        assert len(failed) > len(groups), "of two rewards each"
        for group in groups:
            assert 2 * SUFFIX < group.cost.prompt_tokens / group.cost.calls < PREFIX + 2 * SUFFIX + 40


def test_a_fresh_rewriter_is_asked_too(fresh, pairs, world):
    rewriter = Rewriter(
        PolicyTokenizer(world / "policy"), RewriterConfig(prompt=PromptLength.brief), SUFFIX, 1, 4 * SUFFIX
    )
    for result in BatchedRewriter(rewriter, fresh).rewrite([pair.episode for pair in pairs]):
        assert not isinstance(result, Failed) or "reply" in result.detail, "a reply came"


def test_calibration_measures_a_judge_that_always_says_1(config, world):
    teach(world, "1")
    (found,) = calibrate_judges(config, Asked(PairPlan(12, KINDS, (SUFFIX,)), world=world))
    assert (found.answers, found.parsed) == (24, 24)
    assert found.total.accuracy == 0.5
    assert found.flips.accuracy == found.first_rate.accuracy == 1.0


def teach(world: Path, answer: str) -> None:
    """Write a judge that gives this answer to any brief comparison."""
    chat = ChatTokenizer(world / "fresh", "fails")
    model = AutoModelForCausalLM.from_pretrained(world / "fresh", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    texts = [json.loads(line)["text"] for line in (world / "train.jsonl").read_text().splitlines()]
    (right,) = chat._ids(answer)
    for number in range(25):
        shown = {name: texts[derive_seed(number, name) % len(texts)][:200] for name in ("prefix", "first", "second")}
        prompt = build_prompt("quality", number, AnswerForm.direct, PromptLength.brief, **shown).text
        tokens = chat.encode([("user", prompt)])
        logits = model(torch.tensor([tokens])).logits[0, -1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(right)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(world / "answers")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (world / "answers" / name).write_bytes((world / "fresh" / name).read_bytes())
