"""Rollouts and the way of new weights to the engine: Megatron's engine, vLLM's, CUDA IPC between two processes."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gpu_ipc
from gpu_figures import FAIL, PASS, SKIPPED, Row, gib
from gpu_models import ON_GPU, case_of, configuration, make_policy, model_folder, timed

from megatron_rlpt.config import Config, EngineName
from megatron_rlpt.objectives import Example
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.rollout.engine import RolloutEngine, RolloutPrompt, sample_rollouts
from megatron_rlpt.rollout.placement import EngineMode, EnginePlace

ROLLOUTS = 4
"""Rollouts of an episode; an update trains on two of them."""
REPEATS = 3


def megatron(options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Measure Megatron's engine: tokens per second, distance to the trainer, seconds to reshard new weights."""
    from megatron_rlpt.rollout.megatron.engine import start_policy_engine

    config = _config(options, scratch, engine=EngineName.megatron)
    runtime = DeviceRuntime()
    policy = make_policy(config)
    ranks = runtime.init_distributed(policy.layout, config.parallel.timeout)
    engine = start_policy_engine(config, runtime, ranks)
    yield from _generate(options, config, policy, engine, "Megatron")
    yield _sync(policy, engine, "by resharding")


def ipc(options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Measure the weights' way to a second process through memory that both have mapped."""
    policy = make_policy(configuration(options, model_folder(options, scratch)))
    bucket = RolloutBucket(policy)
    with gpu_ipc.Receiver(bucket.nbytes) as receiver:
        seconds = [timed(lambda: receiver.send(policy.weights())) for _ in range(REPEATS)]
        same = receiver.digests() == gpu_ipc.digests(policy.weights())
    nbytes = _nbytes(policy)
    way = "CUDA IPC" if ON_GPU else "shared memory"
    best = min(seconds)
    yield Row(
        f"weights to a second process, {way}",
        PASS if same else FAIL,
        f"{best * 1e3:.0f} ms for {nbytes / 1e9:.2f} GB ({nbytes / best / 1e9:.1f} GB/s)",
        "every tensor bit for bit, by its SHA-256" if same else "tensors arrived changed",
        {"sync_s": best, "bytes": nbytes},
    )


class RolloutBucket:
    """The size of one bucket of weights: ``rollout.sync_bucket_mib``, or the largest tensor."""

    def __init__(self, policy: Policy) -> None:
        largest = max(math.prod(shape) for shape in policy.weight_shapes.values()) * _width(policy)
        self.nbytes = max(Config().rollout.sync_bucket_mib << 20, largest)


def vllm(options: argparse.Namespace, scratch: Path, mode: EngineMode, eager: bool) -> Iterator[Row]:
    """Measure vLLM's engine: weights checked by the engine, tokens per second, sleep and wake-up.

    Args:
        options: the command line.
        scratch: folder of the model.
        mode: where it runs: in this process, which passes its tensors, or in its own, which gets them by CUDA IPC.
        eager: launch kernels one by one, or replay CUDA graphs.
    """
    from megatron_rlpt.rollout.vllm.engine import VllmEngine

    config = _config(options, scratch, eager=eager)
    policy = make_policy(config)
    engine = VllmEngine(
        Path(config.model.path), policy.weight_shapes, config.rollout, dtype=config.model.dtype,
        max_sequence=config.max_sequence, seed=1, place=EnginePlace(mode),
    )  # fmt: skip
    name = f"vLLM {'eager' if eager else 'with CUDA graphs'}{'' if mode.in_process else ', own process'}"
    engine.self_check(policy.weights, 0)
    yield from _generate(options, config, policy, engine, name)
    yield _sync(policy, engine, f"to {name}")
    yield _sleep(policy, engine, name)


vllm_eager = partial(vllm, mode=EngineMode.IN_PROCESS, eager=True)
vllm_graphs = partial(vllm, mode=EngineMode.IN_PROCESS, eager=False)
vllm_ipc = partial(vllm, mode=EngineMode.SHARED_GPU, eager=False)


def _config(options: argparse.Namespace, scratch: Path, **settings: Any) -> Config:
    folder = model_folder(options, scratch)
    return configuration(options, folder, objective="online_dpo", rollouts=ROLLOUTS, **settings)


def _generate(
    options: argparse.Namespace, config: Config, policy: Policy, engine: RolloutEngine, name: str
) -> Iterator[Row]:
    """Sample the rollouts of one update twice; the policy compares the engine's log-probabilities with its own."""
    case = case_of(options, 2)
    episodes = [example.episode for example in case.batch(0)]
    seconds, candidates = [], []
    for seed in (1, 2):  # the first maps memory and chooses kernels
        began = time.perf_counter()
        candidates = sample_rollouts(engine, episodes, [ROLLOUTS] * len(episodes), case.suffix, 0, seed)
        seconds.append(time.perf_counter() - began)
    tokens = sum(len(one.tokens) for own in candidates for one in own)
    yield Row(
        f"rollouts, {name}",
        PASS,
        f"{tokens / seconds[1]:,.0f} tokens/s: {len(episodes)} prompts of {case.prefix} tokens, {ROLLOUTS} rollouts of "
        f"{case.suffix} each, in {seconds[1]:.2f} s",
        f"the first call took {seconds[0]:.2f} s",
        {"tokens_per_s": tokens / seconds[1], "seconds": seconds[1], "first_s": seconds[0]},
    )
    examples = [Example(episode, tuple(own[:2]), (0, 1)) for episode, own in zip(episodes, candidates, strict=True)]
    with_gap = policy.update(examples)
    gap, allowed = with_gap["logprob_gap"], config.rollout.max_logprob_gap
    yield Row(
        f"logprob_gap, {name}",
        PASS if gap <= allowed else FAIL,
        f"{gap:.2g} nats, ratio {with_gap['engine_ratio']:.4f}",
        f"allowed {allowed:g} (rollout.max_logprob_gap)",
        {"logprob_gap": gap, "engine_ratio": with_gap["engine_ratio"]},
    )


def _sync(policy: Policy, engine: RolloutEngine, way: str) -> Row:
    """Replace the engine's weights some times; the policy has been updated, so that they are new."""
    seconds = [timed(lambda: engine.update_weights(policy.weights(), policy.version)) for _ in range(REPEATS)]
    nbytes, middle = _nbytes(policy), statistics.median(seconds)
    return Row(
        f"weight sync {way}",
        PASS,
        f"{middle * 1e3:.0f} ms for {nbytes / 1e9:.2f} GB ({nbytes / middle / 1e9:.1f} GB/s); the first time "
        f"{seconds[0]:.2f} s",
        "at its start the engine compared every tensor bit for bit",
        {"sync_s": middle, "first_s": seconds[0], "bytes": nbytes},
    )


def _sleep(policy: Policy, engine: Any, name: str) -> Row:
    """Let the engine release its memory, wake it with the policy's weights, and ask the same prompts again."""
    if not ON_GPU:
        return Row(f"sleep and wake, {name}", SKIPPED, "", "an engine without a GPU never sleeps")
    from megatron_rlpt.trainer.gpu_memory import free_gpu_memory

    prompts = [RolloutPrompt(tuple(range(first, first + 7)), seed=1, greedy=True) for first in (3, 11)]
    before = engine.generate(prompts, 16, policy.version)
    awake, promised = free_gpu_memory(), engine.sleep_frees_bytes
    down = timed(engine.sleep)
    asleep = free_gpu_memory()
    up = timed(lambda: engine.update_weights(policy.weights(), policy.version))
    again = free_gpu_memory()
    after = engine.generate(prompts, 16, policy.version)
    same = [one.tokens for one in after] == [one.tokens for one in before]
    freed = asleep - awake >= 0.9 * promised
    why = "the same tokens from the same prompts, and the engine's canary"
    if not freed:
        why = f"sleeping freed {gib(asleep - awake)} of the promised {gib(promised)}"
    elif not same:
        why = "after waking the same prompts gave other tokens"
    return Row(
        f"sleep and wake, {name}",
        PASS if same and freed else FAIL,
        f"free {gib(awake)} awake, {gib(asleep)} asleep, {gib(again)} awake again; {down:.2f} s and {up:.2f} s",
        why,
        {"sleep_s": down, "wake_s": up, "freed_bytes": asleep - awake},
    )


def _width(policy: Policy) -> int:
    return next(policy._model_chunks[0].parameters()).element_size()


def _nbytes(policy: Policy) -> int:
    return sum(math.prod(shape) for shape in policy.weight_shapes.values()) * _width(policy)
