"""What the parts of ``check_gpu.py`` share: a random model, the project's policy on it, a clock and memory."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gpu_figures import SIZES
from safetensors.torch import save_file

from megatron_rlpt.config import (
    CandidatesConfig,
    Config,
    DataConfig,
    Dtype,
    EngineName,
    Fp8,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.models.families import Shape, expected_shapes
from megatron_rlpt.objectives import build_objective
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.policy import Policy

BENCHES = Path(__file__).resolve().parents[2] / "tools/bench"
sys.path.insert(0, str(BENCHES))

from frame import memory_of  # noqa: E402
from shared_prefix import Case  # noqa: E402

ON_GPU = torch.cuda.is_available()


def model_folder(options: argparse.Namespace, scratch: Path) -> Path:
    """Return the folder of the random model, which the first part that asks for it makes."""
    folder = scratch / f"model-{options.size}"
    if not folder.is_dir():
        partial = folder.with_suffix(".partial")
        make_model(partial, SIZES[options.size], options.sequence)
        partial.rename(folder)
    return folder


def make_model(folder: Path, size: Mapping[str, Any], positions: int) -> Path:
    """Save a random Llama of ``size`` as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**size, "max_position_embeddings": positions}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    shapes = expected_shapes(read_architecture(folder))
    with ThreadPoolExecutor() as pool:  # NumPy draws without the interpreter lock
        tensors = list(pool.map(_random_weight, range(len(shapes)), shapes.values()))
    weights = dict(zip(shapes, tensors, strict=True))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _random_weight(seed: int, shape: Shape) -> torch.Tensor:
    import numpy

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    values = numpy.random.default_rng(seed).standard_normal(shape, dtype=numpy.float32)
    return torch.from_numpy(values).mul_(0.02).to(torch.bfloat16)


def case_of(options: argparse.Namespace, candidates: int) -> Case:
    """Return the lengths of an update: a prefix, and completions of an eighth of the sequence."""
    suffix = max(1, options.sequence // 8)
    vocab = SIZES[options.size]["vocab_size"]
    return Case(options.sequence - suffix, suffix, candidates, options.rows // candidates, vocab)


def configuration(
    options: argparse.Namespace,
    folder: Path,
    *,
    objective: str = "ntp",
    fp8: str = "off",
    rollouts: int = 0,
    eager: bool = False,
    engine: EngineName = EngineName.vllm,
) -> Config:
    """Return the configuration of a run with the model in ``folder``.

    With next-token prediction an example is one row of ``--sequence`` tokens, and nearly all of them are predicted;
    else an example has two candidates and the lengths of ``case_of``. The engine's cache holds all rollouts of an
    update, ``rollouts`` of each example.
    """
    pairs = objective != "ntp"
    prefix = case_of(options, 2).prefix if pairs else 1
    examples = options.rows // 2 if pairs else options.rows
    micro_batch = max(1, options.micro_batch // 2) if pairs else options.micro_batch
    sequences = examples * max(rollouts, 1)
    arch = read_architecture(folder)
    dtype = Dtype.bf16 if ON_GPU else Dtype.fp32
    per_token = 2 * arch.layers * arch.kv_heads * arch.head_dim * (2 if ON_GPU else 4)
    return Config(
        run=RunConfig(dir=str(folder.parent)),
        model=ModelConfig(path=str(folder), dtype=dtype, fp8=Fp8(fp8)),
        data=DataConfig(max_prefix=prefix, suffix_length=options.sequence - prefix),
        candidates=CandidatesConfig(rollouts=rollouts),
        # A tenth more, for blocks that are not full.
        rollout=RolloutConfig(
            engine=engine,
            kv_cache_gib=1.1 * sequences * options.sequence * per_token / 2**30,
            max_batch=sequences,
            eager=eager,
        ),
        objective=ObjectiveConfig(name=objective),
        optimizer=OptimizerConfig(lr=1e-4),
        train=TrainConfig(steps=options.steps, global_batch=examples, micro_batch=micro_batch, logprob_chunk=4096),
    )


def make_policy(config: Config) -> Policy:
    """Build the project's policy in a world of one process."""
    return Policy(config, build_objective(config.objective), DeviceRuntime())


def synchronize() -> None:
    """Wait for the GPU; on a CPU there is nothing to wait for."""
    if ON_GPU:
        torch.cuda.synchronize()


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds of ``work``, the GPU's included."""
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def forget_peak() -> None:
    """Begin to measure ``peak_bytes`` anew."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Return the most memory in use since ``forget_peak``: tensors on the GPU, or the process on a CPU."""
    return torch.cuda.max_memory_allocated() if ON_GPU else memory_of("self", "VmHWM")


def used_bytes() -> int:
    """Return the memory in use now, measured like ``peak_bytes``."""
    return torch.cuda.memory_allocated() if ON_GPU else memory_of("self", "VmRSS")


def gpu_name() -> str:
    """Return the name of the device."""
    return torch.cuda.get_device_name() if ON_GPU else "CPU"
