"""Checks that need a GPU, on one GPU: FP8 against bf16, speed, weights to vLLM, sleep, offload.

    python tests/gpu/check_gpu.py [--size 1b] [--sequence 2048] [--rows 8] [--steps 10] [--only PART ...]

Creates a random Llama, downloads nothing, and prints one Markdown table. Every part runs in a separate process, so that
a failure neither keeps memory nor affects other parts. Exit codes: 0 if nothing failed, 1 if something did, 2 without a
GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_figures import (
    FAIL,
    PASS,
    SIZES,
    SKIPPED,
    Row,
    exit_code,
    flops_per_token,
    judge_training,
    largest_difference,
    mfu,
    peak_flops,
    table,
)

WARM_UP = 3
"""Warm-up steps, whose time does not count: they select kernels and map memory."""


def make_model(folder: Path, size: dict[str, int], positions: int) -> Path:
    """Save a random Llama of ``size`` as a Hugging Face folder."""
    import torch
    from safetensors.torch import save_file

    from megatron_rlpt.models.architecture import read_architecture
    from megatron_rlpt.models.families import expected_shapes

    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": size["hidden_size"],
        "intermediate_size": size["intermediate_size"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "head_dim": size["hidden_size"] // size["heads"],
        "vocab_size": size["vocab"],
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0.0, 0.02, generator=generator)).to(
            torch.bfloat16
        )
        for name, shape in expected_shapes(read_architecture(folder)).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def configuration(options: argparse.Namespace, folder: Path, fp8: str, objective: str) -> Any:
    """Return the configuration of a run with the model in ``folder``."""
    from megatron_rlpt.config import (
        Config,
        DataConfig,
        Dtype,
        Fp8,
        ModelConfig,
        ObjectiveConfig,
        OptimizerConfig,
        RolloutConfig,
        RunConfig,
        TrainConfig,
    )

    return Config(
        run=RunConfig(dir=str(folder.parent)),
        model=ModelConfig(path=str(folder), dtype=Dtype.bf16, fp8=Fp8(fp8)),
        data=DataConfig(max_prefix=1, suffix_length=options.sequence - 1),
        rollout=RolloutConfig(kv_cache_gib=2.0),
        objective=ObjectiveConfig(name=objective),
        optimizer=OptimizerConfig(lr=1e-4),
        train=TrainConfig(
            steps=options.steps, global_batch=options.rows, micro_batch=options.micro_batch, logprob_chunk=4096
        ),
    )


def make_policy(config: Any) -> Any:
    """Build the policy of the project in a world of one process."""
    from megatron_rlpt.objectives import build_objective
    from megatron_rlpt.policy.device_runtime import DeviceRuntime
    from megatron_rlpt.policy.policy import Policy

    return Policy(config, build_objective(config.objective), DeviceRuntime())


def make_examples(options: argparse.Namespace, width: int) -> list[Any]:
    """Return the same random examples at every call, with ``width`` sequences each."""
    import torch

    from megatron_rlpt.objectives import Example
    from megatron_rlpt.types import Candidate, Episode, Source

    draw = torch.Generator().manual_seed(1)
    vocab = SIZES[options.size]["vocab"]
    examples = []
    for index in range(options.rows):
        rows = torch.randint(vocab, (width, options.sequence), generator=draw).tolist()
        episode = Episode(f"e{index}", (rows[0][0],), tuple(rows[0][1:]), "corpus", "document", 0)
        candidates = tuple(Candidate(Source.ORIGINAL, tuple(row[1:])) for row in rows)
        examples.append(Example(episode, candidates, tuple(range(width))))
    return examples


def train(options: argparse.Namespace, folder: Path, fp8: str) -> dict[str, list[float]]:
    """Train, and return loss, grad_norm and seconds per step."""
    import torch

    policy = make_policy(configuration(options, folder, fp8, "ntp"))
    in_force = policy._model_chunks[0].config.fp8
    if bool(in_force) != (fp8 != "off"):
        raise RuntimeError(f"model.fp8={fp8} was asked for, and the layers have fp8={in_force}")
    examples = make_examples(options, 1)
    series: dict[str, list[float]] = {"loss": [], "grad_norm": [], "seconds": []}
    for _ in range(options.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        figures = policy.update(examples)
        torch.cuda.synchronize()
        series["seconds"].append(time.perf_counter() - start)
        for name in ("loss", "grad_norm"):
            series[name].append(figures[name])
    return series


def training_row(options: argparse.Namespace, fp8: str, series: dict[str, list[float]], reference: Any) -> Row:
    """Summarize the result of ``train`` in words."""
    import torch

    result, why = judge_training(series, reference)
    seconds = statistics.median(series["seconds"][min(WARM_UP, options.steps - 1) :])
    speed = options.rows * options.sequence / seconds
    gpu = torch.cuda.get_device_name()
    peak = peak_flops(gpu, fp8 != "off")
    flops = flops_per_token(SIZES[options.size], options.sequence)
    share = "MFU unknown, no peak is listed for this GPU" if peak is None else f"MFU {mfu(speed, flops, peak):.1%}"
    parts = [
        f"loss {' '.join(f'{loss:.4f}' for loss in series['loss'])}",
        f"gradient norm {series['grad_norm'][0]:.3f} to {series['grad_norm'][-1]:.3f}",
        f"{seconds * 1e3:.0f} ms a step",
        f"{speed:,.0f} tokens/s",
        share if peak is None else f"{share} of {peak / 1e12:,.0f} TFLOP/s",
    ]
    if reference:
        parts.insert(1, f"largest difference to bf16 {largest_difference(series['loss'], reference['loss']):.2%}")
    return Row(f"training, {'bf16' if fp8 == 'off' else f'FP8 {fp8}'}", result, ", ".join(parts), why)


def part_training(options: argparse.Namespace, folder: Path, fp8: str) -> list[Row]:
    """Run training steps in one precision; compare FP8 with the earlier bf16 run."""
    from megatron_rlpt.config import Dtype, Fp8
    from megatron_rlpt.errors import ConfigError
    from megatron_rlpt.policy.precision import require

    kept = folder.parent / "bf16.json"
    try:
        require(Fp8(fp8), Dtype.bf16)
    except ConfigError as error:
        return [Row(f"training, FP8 {fp8}", SKIPPED, "", str(error))]
    if fp8 != "off" and not kept.is_file():
        return [Row(f"training, FP8 {fp8}", SKIPPED, "", "there is no bf16 run to hold it against")]
    series = train(options, folder, fp8)
    if fp8 == "off":
        kept.write_text(json.dumps(series), encoding="utf-8")
    return [training_row(options, fp8, series, None if fp8 == "off" else json.loads(kept.read_text(encoding="utf-8")))]


def part_engine(options: argparse.Namespace, folder: Path, in_process: bool) -> list[Row]:
    """Run vLLM and the policy on one GPU: weights verified by the engine, sleep, wake-up.

    Args:
        options: the command line.
        folder: the model.
        in_process: use the engine of a single rank, which gets the tensors of the policy directly; False uses that of
            one rank among several, in a separate process that gets them by CUDA IPC.
    """
    from megatron_rlpt.rollout.engine import RolloutPrompt
    from megatron_rlpt.rollout.placement import EngineMode, EnginePlace
    from megatron_rlpt.rollout.vllm.engine import VllmEngine
    from megatron_rlpt.trainer.gpu_memory import free_gpu_memory

    way = "in process" if in_process else "by CUDA IPC"
    config = configuration(options, folder, "off", "ntp")
    policy = make_policy(config)
    engine = VllmEngine(
        folder, policy.weight_shapes, config.rollout, dtype=config.model.dtype, max_sequence=options.sequence, seed=1,
        place=EnginePlace(EngineMode.IN_PROCESS if in_process else EngineMode.SHARED_GPU),
    )  # fmt: skip
    engine.self_check(policy.weights, 0)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        engine.update_weights(policy.weights(), 0)
        seconds.append(time.perf_counter() - start)
    gigabytes = sum(math.prod(shape) for shape in policy.weight_shapes.values()) * 2 / 1e9
    best = min(seconds)
    rows = [
        Row(
            f"vLLM sync {way}",
            PASS,
            f"{best * 1e3:.0f} ms for {gigabytes:.2f} GB ({gigabytes / best:.1f} GB/s)",
            "every tensor bit for bit, by the engine's own check",
        )
    ]
    prompts = [
        RolloutPrompt((3, 4, 5, 6, 7, 8, 9), seed=1, greedy=True),
        RolloutPrompt((11, 12, 13), seed=2, greedy=True),
    ]
    before = engine.generate(prompts, 16, 0)
    awake, promised = free_gpu_memory(), engine.sleep_frees_bytes
    start = time.perf_counter()
    engine.sleep()
    down, asleep = time.perf_counter() - start, free_gpu_memory()
    start = time.perf_counter()
    engine.update_weights(policy.weights(), 0)
    up, again = time.perf_counter() - start, free_gpu_memory()
    same = [one.tokens for one in engine.generate(prompts, 16, 0)] == [one.tokens for one in before]
    why = "the same tokens from the same prompts, and the engine's canary"
    if asleep - awake < 0.9 * promised:
        why = f"sleeping freed {gib(asleep - awake)} of the promised {gib(promised)}"
    elif not same:
        why = "after waking the same prompts gave other tokens"
    measured = f"free {gib(awake)} awake, {gib(asleep)} asleep, {gib(again)} awake again; {down:.2f} s and {up:.2f} s"
    rows.append(
        Row(f"vLLM sleep and wake, {way}", PASS if same and asleep - awake >= 0.9 * promised else FAIL, measured, why)
    )
    return rows


def part_offload(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Offload the weights of the reference policy and the state of the optimizer from GPU memory."""
    import torch

    from megatron_rlpt.policy.reference import ReferenceWeights

    policy = make_policy(configuration(options, folder, "off", "online_dpo"))
    examples = make_examples(options, 2)[: options.micro_batch]
    expected = policy.logprobs(examples)
    reference = ReferenceWeights(policy._model_chunks, version=0)
    held = torch.cuda.memory_allocated()
    start = time.perf_counter()
    with reference.active():
        torch.cuda.synchronize()
        swap, inside = time.perf_counter() - start, torch.cuda.memory_allocated()
        same = torch.equal(policy.logprobs(examples), expected)
    gc.collect()
    left = torch.cuda.memory_allocated() - held
    hosted = all(tensor.device.type == "cpu" for tensor in reference.weights())
    good = same and hosted and left <= 2**20
    rows = [
        Row(
            "reference offload",
            PASS if good else FAIL,
            f"{gib(inside - held)} on the GPU in use, {gib(max(left, 0))} afterwards; {swap * 1e3:.0f} ms to swap in",
            f"log-probabilities as with the policy's own weights: {same}; weights in host memory: {hosted}",
        )
    ]
    policy.update(make_examples(options, 2))
    torch.cuda.empty_cache()
    resident = torch.cuda.memory_allocated()
    start = time.perf_counter()
    policy.offload_optimizer()
    torch.cuda.synchronize()
    out, freed = time.perf_counter() - start, resident - torch.cuda.memory_allocated()
    start = time.perf_counter()
    policy.restore_optimizer()
    torch.cuda.synchronize()
    back = time.perf_counter() - start
    figures = policy.update(make_examples(options, 2))
    # Two moments in fp32 per weight; what else leaves with them counts for more.
    moments = 8 * sum(parameter.numel() for chunk in policy._model_chunks for parameter in chunk.parameters())
    good = freed >= 0.9 * moments and math.isfinite(figures["loss"])
    rows.append(
        Row(
            "optimizer offload",
            PASS if good else FAIL,
            f"{gib(freed)} freed in {out:.2f} s, back in {back:.2f} s",
            f"the two moments alone are {gib(moments)}; the next update's loss is {figures['loss']:.4f}",
        )
    )
    return rows


def gib(count: float) -> str:
    """Format bytes as GiB."""
    return f"{count / 2**30:.2f} GiB"


def parts() -> dict[str, Callable[[argparse.Namespace, Path], list[Row]]]:
    """Return name -> part, in order: bf16 runs before the parts that are compared with it."""
    recipes = ("off", "delayed", "current", "blockwise", "mxfp8")
    named: dict[str, Callable[[argparse.Namespace, Path], list[Row]]] = {
        ("bf16" if fp8 == "off" else f"fp8-{fp8}"): lambda options, folder, fp8=fp8: part_training(options, folder, fp8)
        for fp8 in recipes
    }
    return named | {
        "engine-in-process": lambda options, folder: part_engine(options, folder, in_process=True),
        "engine-ipc": lambda options, folder: part_engine(options, folder, in_process=False),
        "offload": part_offload,
    }


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exit with 2 if it is invalid."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="1b", help="parameters of the random Llama")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens per row")
    parser.add_argument("--rows", type=int, default=16, help="rows per step")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows per forward and backward pass")
    parser.add_argument("--steps", type=int, default=10, help="training steps in each precision")
    parser.add_argument("--only", nargs="+", choices=list(parts()), default=list(parts()), help="parts to run")
    parser.add_argument("--part", nargs=3, metavar=("NAME", "FOLDER", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps must be 2 or more: a loss has to fall")
    if options.rows % options.micro_batch:
        parser.error(f"--rows must be a multiple of --micro-batch, {options.micro_batch}")
    return options


def run_part(name: str, options: argparse.Namespace, folder: Path, limit: float = 900.0) -> list[Row]:
    """Run part ``name`` in a separate process; one that dies or hangs is a FAIL with its last line."""
    output = folder.parent / f"{name}.rows"
    settings = [f"--{key}={getattr(options, key.replace('-', '_'))}" for key in ("size", "sequence", "rows", "steps")]
    settings.append(f"--micro-batch={options.micro_batch}")
    command = [sys.executable, __file__, *settings, "--part", name, str(folder), str(output)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return [Row(name, FAIL, "", f"not finished after {limit:.0f} s")]
    if not output.is_file():
        print(done.stderr, file=sys.stderr)
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [Row(name, FAIL, "", last)]
    return [Row(**row) for row in json.loads(output.read_text(encoding="utf-8"))]


def versions() -> str:
    """Return the versions of the packages that the results depend on."""
    found = []
    for name in ("torch", "megatron-core", "transformer-engine", "vllm"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print the table, and return the exit code."""
    options = parse_arguments(arguments)
    import torch

    if not torch.cuda.is_available():
        print("check_gpu.py needs a GPU, and torch finds no CUDA device here", file=sys.stderr)
        return 2
    if options.part:
        name, folder, output = options.part
        rows = parts()[name](options, Path(folder))
        Path(output).write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
        return exit_code(rows)
    print(f"{torch.cuda.get_device_name()}, {time.strftime('%Y-%m-%d')}, {versions()}")
    print(f"random Llama {options.size}, {options.rows} rows of {options.sequence} tokens a step\n")
    with tempfile.TemporaryDirectory(prefix="check-gpu-") as scratch:
        folder = make_model(Path(scratch) / "model", SIZES[options.size], options.sequence)
        rows = [row for name in parts() if name in options.only for row in run_part(name, options, folder)]
    print(table(rows))
    return exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
