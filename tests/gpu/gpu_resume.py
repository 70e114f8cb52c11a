"""A run that is killed and resumed on a GPU equals one that was not, bit for bit, with ``train.deterministic``."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_figures import FAIL, PASS, Row
from gpu_models import ON_GPU

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/integration")]

from tiny_model import WORDS, make_tiny_model  # noqa: E402
from tiny_runs import json_lines, lasting_metrics, write_config  # noqa: E402

STEPS, EVERY = 8, 3
SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"dtype": "bf16"},
    "rollout": {"engine": "megatron"},
    "train": {"steps": STEPS, "global_batch": 4, "micro_batch": 2, "deterministic": True},
    "optimizer": {"lr": 1e-3, "decay": "constant"},
    "checkpoint": {"every": EVERY},
    "observe": {"samples_per_step": 2, "tensorboard": False},
}
"""Online DPO with rollouts from Megatron's engine and the likelihood judge: all that a GPU computes in a run."""
_PATIENCE = 300.0


def resume(options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Kill a run once it is past its first checkpoint, run the same command again, and compare with a whole run."""
    model = make_tiny_model(
        scratch / "resumed-model", hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4
    )
    corpus = write_corpus(scratch / "corpus.jsonl")
    whole, killed = (_configure(scratch / name, model, corpus) for name in ("whole", "killed"))
    began = time.monotonic()
    # Side by side: both are small.
    first, second = start(whole), start(killed)
    steps = _kill_past_checkpoint(second, scratch / "killed/run")
    again = start(killed)
    for name, process in (("whole", first), ("resumed", again)):
        code = process.wait(_PATIENCE)
        if code:
            raise RuntimeError(f"the {name} run ended with exit code {code}")
    results = [_results(scratch / name / "run") for name in ("whole", "killed")]
    differing = [what for what in results[0] if results[0][what] != results[1][what]]
    yield Row(
        "killed and resumed",
        FAIL if differing else PASS,
        f"killed after step {steps} of {STEPS}, resumed from the checkpoint after step {EVERY}; "
        f"{time.monotonic() - began:.0f} s for the three processes",
        f"other than the uninterrupted run: {', '.join(differing)}"
        if differing
        else f"weights and metrics bit for bit; deterministic mode on {'a GPU' if ON_GPU else 'a CPU'}",
        {"killed_at": steps, "differing": len(differing)},
    )


def start(config: Path) -> subprocess.Popen[bytes]:
    """Start ``rlpt train`` in the process group of this part, which ends it with itself."""
    command = [sys.executable, "-m", "megatron_rlpt", "train", "-c", str(config)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path})


def write_corpus(path: Path, words: Sequence[str] = WORDS) -> Path:
    """Write documents of random words as JSONL."""
    draw = random.Random(7)
    texts = [" ".join(draw.choices(words, k=draw.randrange(40, 81))) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def _configure(folder: Path, model: Path, corpus: Path) -> Path:
    folder.mkdir()
    return write_config(folder / "run.yaml", model, corpus, folder / "run", **SECTIONS)


def _kill_past_checkpoint(process: Any, folder: Path) -> int:
    """Kill the run one step or more after its first checkpoint; return the steps that it had made.

    Raises:
        RuntimeError: it ended before, or took too long.
    """
    deadline = time.monotonic() + _PATIENCE
    metrics = folder / "metrics.jsonl"
    while True:
        steps = len(json_lines(metrics)) if metrics.is_file() else 0
        if steps > EVERY and (folder / f"checkpoints/step-{EVERY:08d}").is_dir():
            break
        code = process.poll()
        if code is not None:
            raise RuntimeError(f"the run to be killed ended with exit code {code} after step {steps}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the run to be killed made {steps} steps in {_PATIENCE:.0f} s")
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError("the run was over before it could be killed")
    return steps


def _results(folder: Path) -> dict[str, Any]:
    """Return what must be the same."""
    return {
        "weights": (folder / "export/model.safetensors").read_bytes(),
        "metrics": lasting_metrics(folder),
        "samples": json_lines(folder / "samples.jsonl"),
    }
