"""Complete runs of a model that trains and serves in milliseconds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from prefork import MEGATRON, VLLM, Forked, forked

from megatron_rlpt.config import Config, Dtype, RolloutConfig, load_config
from megatron_rlpt.distributed.addresses import free_port
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.models.families import expected_shapes
from megatron_rlpt.rollout.placement import IN_THIS_PROCESS, EnginePlace
from megatron_rlpt.rollout.vllm.engine import VllmEngine

EXCLUDED = ("seconds/", "background/", "time", "judge/seconds")
"""Metrics that differ between two equal runs."""


def write_config(path: Path, model: Path, corpus: Path, folder: Path, /, **sections: dict[str, Any]) -> Path:
    """Write a configuration of online DPO on the tiny model; ``sections`` override it."""
    settings: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder)},
        "model": {"path": str(model)},
        "data": {
            "sources": [{"path": str(corpus)}],
            "suffix_length": 8,
            "min_prefix": 8,
            "max_prefix": 16,
            "shuffle_buffer": 16,
        },
        "candidates": {"rollouts": 3},
        "rollout": {"kv_cache_gib": 0.02, "max_batch": 16},
        "teacher": {"kv_cache_gib": 0.02},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 2, "global_batch": 4, "micro_batch": 2},
        "checkpoint": {"every": 1},
        "observe": {"tensorboard": False},
    }
    for name, values in sections.items():
        settings[name] = settings.get(name, {}) | values
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


def tiny_config(path: Path, model: Path, corpus: Path, folder: Path, /, **sections: dict[str, Any]) -> Config:
    """Return the same configuration, loaded and checked."""
    return load_config(write_config(path, model, corpus, folder, **sections))


def evaluated_while_training(folder: Path, corpus: Path, every: int) -> dict[str, dict[str, Any]]:
    """Return the sections of a run that evaluates itself every so many steps, on documents written to ``folder``."""
    heldout = folder / "heldout.jsonl"
    texts = [" ".join(json.loads(line)["text"].split()[::-1]) for line in corpus.read_text().splitlines()[:8]]
    heldout.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"data": {"heldout": [{"path": str(heldout)}]}, "evaluation": {"every": every, "every_prefixes": 4}}


NEXT_TOKEN = {"objective": {"name": "ntp"}, "candidates": {"rollouts": 0}}
"""Sections of a run that starts no vLLM engine."""


def save_model(folder: Path, tokenizer: Path, seed: int, scale: float = 4.0, **overrides: object) -> Path:
    """Save a random model with configuration and tokenizer of ``tokenizer``, with heads that vLLM supports."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "generation_config.json"))
    settings = json.loads((tokenizer / "config.json").read_text())
    settings |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32} | overrides
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:  # not uniform, so that rounding does not decide greedy choices
                weight *= scale
    model.save_pretrained(folder)
    return folder


def start_engine(model: Path, place: EnginePlace = IN_THIS_PROCESS, **overrides: object) -> VllmEngine:
    """Start the rollout engine in fp32 with ``model``; ``overrides`` change its ``rollout`` section."""
    config = RolloutConfig(**{"kv_cache_gib": 0.02, "max_batch": 32} | overrides)
    shapes = expected_shapes(read_architecture(model))
    return VllmEngine(model, shapes, config, dtype=Dtype.fp32, max_sequence=64, seed=1, place=place)


def start(config: Path, *arguments: str) -> Forked:
    """Start ``rlpt train`` in a new process group, so that a kill reaches its children too."""
    return rlpt_process("train", "-c", str(config), *arguments)


def start_ranks(config: Path, ranks: int, *arguments: str) -> list[Forked]:
    """Start ``rlpt train`` on ``ranks`` ranks, with the variables that torchrun sets."""
    return [rlpt_process("train", "-c", str(config), *arguments, **place) for place in torchrun_variables(ranks)]


def torchrun_variables(ranks: int) -> list[dict[str, str]]:
    """Return the variables that torchrun sets for each rank of a world on this machine, at a free port."""
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(free_port())}  # fmt: skip
    return [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def rlpt_process(*arguments: str, **variables: object) -> Forked:
    """Start ``rlpt`` with these arguments and variables in a new process group."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in variables.items()}}
    modules = MEGATRON if "rollout.engine=megatron" in arguments else VLLM
    return forked(modules, [sys.executable, "-m", "megatron_rlpt", *arguments], env=env)


def finish(process: Forked | subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the process to end; return exit code, standard output and standard error."""
    out, err = process.communicate(timeout=300)
    assert process.returncode is not None
    return process.returncode, out, err


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines that are whole: a run may be writing the next one."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def lasting_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return ``metrics.jsonl`` without the metrics that may differ between equal runs."""
    return [
        {name: value for name, value in row.items() if not name.startswith(EXCLUDED)}
        for row in json_lines(folder / "metrics.jsonl")
    ]


def only_error(err: str) -> str:
    """Return the only error line; fail if a traceback or anything else follows."""
    lines = err.strip().splitlines()
    assert "Traceback" not in err, err
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], err
    return lines[-1]
