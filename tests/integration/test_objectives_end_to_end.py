"""Every objective from corpus to exported policy: real teacher, real rollouts, real updates."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import finish, json_lines, save_model, start, start_engine, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.models.huggingface import WeightFolder
from megatron_rlpt.rollout.engine import RolloutPrompt

TEMPLATE = (
    "{% for message in messages %}<s> {{ message['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s> {% endif %}"
)
EVERY = {
    "loss", "grad_norm", "lr", "examples", "skipped", "duplicates", "failure_rate", "failed_rewrites", "rollouts",
    "seconds/generate", "seconds/judge", "seconds/update", "seconds/wait", "seconds/sync", "seconds/total",
}  # fmt: skip
OF_ROLLOUTS = {"logprob_gap", "rollout_chosen_rate", "original_chosen_rate"}
OF_JUDGE = {"reward/original", "reward/rollout", "reward_margin"}
OF_DPO = {"dpo/margin", "dpo/accuracy", "dpo/chosen_logratio", "dpo/rejected_logratio"}
OF_GRPO = {"grpo/ratio", "grpo/clip_fraction", "grpo/kl", "grpo/reference_kl"}
OBJECTIVES = {
    "ntp": ({"rollouts": 0}, {"original_chosen_rate"}),
    "sft_rewrite": ({"rollouts": 0, "rewrite": True}, {"original_chosen_rate"}),
    "sft_rollout": ({"rollouts": 1}, OF_ROLLOUTS),
    "rf_nll": ({"rollouts": 3}, OF_ROLLOUTS | OF_JUDGE),
    "online_dpo": ({"rollouts": 3}, OF_ROLLOUTS | OF_JUDGE | OF_DPO),
    "grpo": (
        {"original": False, "rollouts": 3},
        {"logprob_gap", "rollout_chosen_rate", "reward/rollout", "reward_margin"} | OF_GRPO,
    ),
}
"""Objective -> its candidates section and the metrics that it adds."""
SETTINGS = {"grpo": {"normalize_advantage": False, "length_norm": "constant", "kl": 0.05}}
"""Objective -> its settings besides its name."""


@pytest.fixture(scope="module")
def policy(tiny_model, tmp_path_factory) -> Path:
    """A model with a chat template, for the export to copy."""
    folder = save_model(tmp_path_factory.mktemp("models") / "chat", tiny_model, seed=0)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def writer(policy, tmp_path_factory) -> Path:
    """A teacher with enough context for the rewriter's prompt, which writes random words and rarely ends."""
    folder = tmp_path_factory.mktemp("models") / "writer"
    return save_model(folder, policy, seed=0, scale=1.0, vocab_size=24, max_position_embeddings=2048)


@pytest.fixture(scope="module", params=OBJECTIVES)
def run(request, policy, writer, corpus, tmp_path_factory):
    """Two steps with one objective; yields its name and the run folder."""
    base = tmp_path_factory.mktemp(request.param)
    teacher = {"kv_cache_gib": 0.05, "max_context": 1024}
    if request.param == "sft_rewrite":
        teacher["path"] = str(writer)
        teacher["max_failure_rate"] = 1.0  # a random one rarely writes enough
    config = write_config(
        base / "run.yaml",
        policy,
        corpus,
        base / "run",
        objective={"name": request.param} | SETTINGS.get(request.param, {}),
        candidates=OBJECTIVES[request.param][0],
        teacher=teacher,
        data={"suffix_length": 4},
    )
    code, _, err = finish(start(config))
    assert code == 0, err
    return request.param, base / "run"


def test_metrics_have_the_documented_names_and_are_finite(run):
    name, folder = run
    rows = json_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert "nonfinite" not in row
        assert row["examples"] + row["skipped"] == 4
        if row["examples"]:
            assert row.keys() >= EVERY | OBJECTIVES[name][1]
            assert math.isfinite(row["loss"])
            assert row["grad_norm"] > 0
        assert row["failure_rate"] == 0
    assert rows[-1]["version"] == sum(bool(row["examples"]) for row in rows)


def test_samples_show_what_was_offered_and_what_was_chosen(run):
    name, folder = run
    rows = json_lines(folder / "samples.jsonl")
    assert len(rows) == 4
    for row in rows:
        sources = [candidate["source"] for candidate in row["candidates"]]
        assert (sources[0] == "original") == OBJECTIVES[name][0].get("original", True)
        assert sources.count("rollout") == OBJECTIVES[name][0]["rollouts"]
        assert (row["chosen"] is None) == (row["skipped"] is not None)
        assert (row["rejected"] is not None) == (name in ("online_dpo", "grpo") and row["chosen"] is not None)
        if name.startswith("sft") and row["chosen"] is not None:
            assert sources[row["chosen"]] == name.removeprefix("sft_")
        rewards = {index: one["value"] for index, one in enumerate(row["candidates"]) if "value" in one}
        # A random policy may write unreadable text, which is not judged.
        empty = [one for one in row["candidates"] if one.get("failed") == "empty candidate"]
        assert len(rewards) + len(empty) == (len(sources) if name in ("rf_nll", "online_dpo", "grpo") else 0)
        if row["rejected"] is not None:
            assert (rewards[row["chosen"]], rewards[row["rejected"]]) == (max(rewards.values()), min(rewards.values()))


def test_rewrites_are_of_exact_length_or_counted_as_failed(run):
    name, folder = run
    rows = json_lines(folder / "metrics.jsonl")
    if name != "sft_rewrite":
        assert all(row["failed_rewrites"] == 0 for row in rows)
        return
    assert all(row["failed_rewrites"] == row["skipped"] for row in rows)
    assert sum(row["examples"] for row in rows) > 0, "no rewrite was usable, so nothing was tested"
    assert all(row.get("skipped/no_rewrite", 0) == row["skipped"] for row in rows)


def test_the_exported_folder_loads_in_transformers_with_changed_weights(run, policy):
    _, folder = run
    export = folder / "export"
    model, info = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    start = AutoModelForCausalLM.from_pretrained(policy, dtype=model.dtype)
    changed = [
        name
        for (name, one), two in zip(model.named_parameters(), start.parameters(), strict=True)
        if not torch.equal(one, two)
    ]
    assert any("q_proj" in name for name in changed)
    assert any("embed" in name for name in changed)
    text = "the cat sat on the mat"
    assert AutoTokenizer.from_pretrained(export)(text) == AutoTokenizer.from_pretrained(policy)(text)


def greedy(engine, version):
    return engine.generate([RolloutPrompt(tuple(range(3, 20)), seed=1, greedy=True)], 8, version)


def test_the_exported_folder_is_served_by_vllm(run, engine, served_model):
    """By an engine updated to its weights and, for one objective, by an engine started with it."""
    name, folder = run
    weights = WeightFolder(folder / "export").stream(read_architecture(folder / "export"))
    engine.update_weights(weights, 1)
    taken_over = greedy(engine, 1)
    engine.update_weights(WeightFolder(served_model).stream(read_architecture(served_model)), 0)
    assert greedy(engine, 0) != taken_over
    if name == "online_dpo":
        assert greedy(start_engine(folder / "export"), 0) == taken_over


def test_the_export_is_self_contained(run, policy, tmp_path):
    _, folder = run
    moved = shutil.copytree(folder / "export", tmp_path / "elsewhere")
    assert json.loads((moved / "config.json").read_text())["model_type"] == "llama"
    assert (moved / "chat_template.jinja").read_text() == TEMPLATE
    assert str(policy) not in (moved / "config.json").read_text()
