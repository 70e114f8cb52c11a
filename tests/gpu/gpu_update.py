"""Updates: speed and memory of next-token and online DPO steps, shared prefixes, FP8 against bf16."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_figures import (
    FAIL,
    PASS,
    SHARING_TOLERANCE,
    SIZES,
    SKIPPED,
    Row,
    flops_per_token,
    gib,
    judge_memory,
    judge_training,
    largest_difference,
    mfu,
    peak_flops,
)
from gpu_models import (
    ON_GPU,
    case_of,
    configuration,
    forget_peak,
    gpu_name,
    make_policy,
    model_folder,
    peak_bytes,
    timed,
    used_bytes,
)

from megatron_rlpt.config import Config, Dtype, Fp8
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.objectives import Example
from megatron_rlpt.planner.memory import Device, moments_of
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.policy.precision import find_engine, require
from megatron_rlpt.types import Candidate, Episode, Source

from frame import in_turns, ratio_of  # isort: skip # found by gpu_models
from shared_prefix import updates_of  # isort: skip

WARM_UP = 3
"""Steps whose time does not count: they select kernels and map memory."""
_UPDATING = ("backward", "gradient exchange", "optimizer step", "weight gather", "reference pass")
"""Moments of the planner that belong to an update."""

Series = dict[str, list[float]]


def update(options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Measure updates in bf16: loss, speed, and peak memory against the planner's prediction."""
    config = configuration(options, model_folder(options, scratch))
    base = used_bytes()
    policy = make_policy(config)
    forget_peak()
    series = train(options, policy, "off")
    peak = peak_bytes()
    _kept(scratch).write_text(json.dumps(series), encoding="utf-8")
    yield training_row(options, "off", series, None)
    yield memory_row("peak memory of an update", config, policy, peak, base)


def fp8(options: argparse.Namespace, scratch: Path, recipe: str) -> Iterator[Row]:
    """Train in FP8 on the same data and compare with bf16."""
    check = f"training, FP8 {recipe}"
    try:
        require(Fp8(recipe), Dtype.bf16)
    except ConfigError as error:
        # Installed and not importable is a failure; a recipe that this GPU cannot run is not.
        broken = isinstance(find_engine(), str) and ON_GPU
        yield Row(check, FAIL if broken else SKIPPED, "", str(error))
        return
    folder = model_folder(options, scratch)
    if not _kept(scratch).is_file():
        series = train(options, make_policy(configuration(options, folder)), "off")
        _kept(scratch).write_text(json.dumps(series), encoding="utf-8")
    reference = json.loads(_kept(scratch).read_text(encoding="utf-8"))
    series = train(options, make_policy(configuration(options, folder, fp8=recipe)), recipe)
    yield training_row(options, recipe, series, reference)


fp8_delayed = partial(fp8, recipe="delayed")
fp8_current = partial(fp8, recipe="current")
fp8_blockwise = partial(fp8, recipe="blockwise")
fp8_mxfp8 = partial(fp8, recipe="mxfp8")


def dpo(options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Measure online DPO updates with reference and shared prefix, then against separate prefixes, in turns."""
    config = configuration(options, model_folder(options, scratch), objective="online_dpo")
    base = used_bytes()
    policy = make_policy(config)
    case = case_of(options, 2)
    examples = case.batch(0)
    forget_peak()
    policy.update(examples)
    peak = peak_bytes()
    for _ in range(min(WARM_UP, options.steps) - 1):
        policy.update(examples)
    seconds = statistics.median(timed(lambda: policy.update(examples)) for _ in range(options.steps))
    metrics = policy.update(examples)
    tokens = case.examples * 2 * (case.prefix + case.suffix)
    yield Row(
        "online DPO update, with reference",
        PASS,
        f"{seconds * 1e3:.0f} ms for {case.examples} pairs of {case.prefix} + {case.suffix} tokens, "
        f"{tokens / seconds:,.0f} tokens/s ({metrics['executed_tokens']:,.0f} of {tokens:,} computed)",
        "prefixes are shared; tokens count those of both completions with their prefix",
        {"dpo_s": seconds, "tokens_per_s": tokens / seconds, "executed_tokens": metrics["executed_tokens"]},
    )
    yield memory_row("peak memory of a DPO update", config, policy, peak, base)
    yield _sharing_row(options, policy, {name: _and_wait(work) for name, work in updates_of(policy, case).items()})


def _sharing_row(options: argparse.Namespace, policy: Policy, works: dict[str, Callable[[], Any]]) -> Row:
    """Compare updates with and without shared prefixes: speed in turns, log-probabilities on the same weights."""
    seconds = in_turns(works, options.steps)
    faster = ratio_of(seconds, "separate", "shared")
    examples = case_of(options, 2).batch(0)[:1]
    policy.packed = False
    separate = policy.logprobs(examples)
    policy.packed = True
    apart = float((separate - policy.logprobs(examples)).abs().mean())
    medians = {name: statistics.median(row) for name, row in seconds.items()}
    return Row(
        "shared prefix",
        PASS if apart <= SHARING_TOLERANCE else FAIL,
        f"{faster['ratio']:.2f} times as fast ({faster['lowest']:.2f} to {faster['highest']:.2f}): "
        f"{medians['shared'] * 1e3:.0f} against {medians['separate'] * 1e3:.0f} ms",
        f"log-probabilities differ by {apart:.2g} nats on average; allowed {SHARING_TOLERANCE:g}",
        {**faster, **{f"{name}_s": value for name, value in medians.items()}, "logprob_difference": apart},
    )


def _and_wait(work: Callable[[], Any]) -> Callable[[], float]:
    return lambda: timed(work)


def train(options: argparse.Namespace, policy: Policy, recipe: str) -> Series:
    """Train on the same rows at every step; return loss, grad_norm and seconds per step."""
    in_force = policy._model_chunks[0].config.fp8
    if bool(in_force) != (recipe != "off"):
        raise RuntimeError(f"model.fp8={recipe} was asked for, and the layers have fp8={in_force}")
    examples = make_rows(options)
    series: Series = {"loss": [], "grad_norm": [], "seconds": []}
    figures: dict[str, float] = {}
    for _ in range(options.steps):
        series["seconds"].append(timed(lambda: figures.update(policy.update(examples))))
        for name in ("loss", "grad_norm"):
            series[name].append(figures[name])
    return series


def make_rows(options: argparse.Namespace) -> list[Example]:
    """Return the same random rows at every call, each an example of its own."""
    draw = torch.Generator().manual_seed(1)
    vocab = SIZES[options.size]["vocab_size"]
    examples = []
    for index, row in enumerate(torch.randint(vocab, (options.rows, options.sequence), generator=draw).tolist()):
        episode = Episode(f"e{index}", (row[0],), tuple(row[1:]), "corpus", "document", 0)
        examples.append(Example(episode, (Candidate(Source.ORIGINAL, tuple(row[1:])),), (0,)))
    return examples


def training_row(options: argparse.Namespace, recipe: str, series: Series, reference: Series | None) -> Row:
    """Summarize the result of ``train`` in words."""
    result, why = judge_training(series, reference)
    seconds = statistics.median(series["seconds"][min(WARM_UP, options.steps - 1) :])
    speed = options.rows * options.sequence / seconds
    peak = peak_flops(gpu_name(), recipe != "off")
    share = mfu(speed, flops_per_token(SIZES[options.size], options.sequence), peak) if peak else None
    parts = [
        f"loss {' '.join(f'{loss:.4f}' for loss in series['loss'])}",
        f"gradient norm {series['grad_norm'][0]:.3f} to {series['grad_norm'][-1]:.3f}",
        f"{seconds * 1e3:.0f} ms a step",
        f"{speed:,.0f} tokens/s",
        "MFU unknown, no peak is listed for this device"
        if peak is None
        else f"MFU {share:.1%} of {peak / 1e12:,.0f} TFLOP/s",
    ]
    figures = {"step_s": seconds, "tokens_per_s": speed, "last_loss": series["loss"][-1]}
    if share is not None:
        figures["mfu"] = share
    if reference:
        first, later = (
            largest_difference(series["loss"][part], reference["loss"][part]) for part in (slice(0, 1), slice(1, None))
        )
        parts.insert(1, f"difference to bf16 {first:.2%} at step 1, at most {later:.2%} from step 2 on")
        figures |= {"first_difference": first, "largest_difference": later}
    plain = "bf16" if ON_GPU else "fp32"
    return Row(f"training, {plain if recipe == 'off' else f'FP8 {recipe}'}", result, ", ".join(parts), why, figures)


def memory_row(check: str, config: Config, policy: Policy, peak: int, base: int) -> Row:
    """Compare the peak of an update with the planner's prediction; on a CPU the libraries' memory is subtracted."""
    device = Device.gpu if ON_GPU else Device.cpu
    moments = moments_of(policy.arch, policy.layout, config, 0, device)
    predicted = max(memory.total for moment, memory in moments.items() if moment in _UPDATING)
    measured = peak if ON_GPU else max(0, peak - base)
    result, why = judge_memory(measured, predicted)
    if not ON_GPU:
        result, why = PASS, f"{why}, not judged in a rehearsal: a tiny model is smaller than its libraries"
    figures = {"peak_bytes": measured, "predicted_bytes": predicted, "off": measured / predicted - 1.0}
    return Row(check, result, gib(measured), why, figures)


def _kept(scratch: Path) -> Path:
    return scratch / "bf16.json"
