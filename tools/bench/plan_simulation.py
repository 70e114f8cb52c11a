"""Compare the seconds per step that the planner simulates with real asynchronous runs on a CPU.

    python tools/bench/plan_simulation.py [--steps 16] [--judge 0.6 1.5] [--staleness 0 1 2] [--json FILE]

A run is ``rlpt train`` with a random Llama. The Megatron policy, the vLLM engine (in a separate process if it runs
concurrently with the policy) and the rollout buffer (SQLite) are the real ones, with one thread each. The judge worker
is real too, but its judge waits for the given seconds per group instead of computing, like a judge with servers on
other machines, so that on two cores policy and engine have one core each. The first and the last steps, which fill and
drain the pipeline, are not counted.

Inputs of the simulation are the measured seconds of generation, update and sync, and of the rest of a step. They come
from two runs. The first run with staleness 0, in which no stages overlap, gives those for staleness 0. The first run
with a higher staleness, in which generation and update overlap and slow each other down on one machine, gives those for
all others. The last column is the error of a prediction from the run with staleness 0, as if each stage had its own
machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_rlpt.buffer.open import open_url
from megatron_rlpt.config import WorkersConfig
from megatron_rlpt.judge_workers.group_processor import GroupProcessor
from megatron_rlpt.judge_workers.metrics import WorkerMetrics
from megatron_rlpt.judge_workers.worker import Worker
from megatron_rlpt.planner.simulation.setting import Judges, Rollouts, Service, SimulatedCluster, Workload
from megatron_rlpt.planner.simulation.simulate import simulate
from megatron_rlpt.teacher.generator import Ask, Reply, Request
from megatron_rlpt.types import Failed, Group, Reward

BATCH, PART, ROLLOUTS, SUFFIX, SLOTS = 16, 4, 4, 16, 4
"""Episodes per batch, episodes per call of the engine, rollouts per episode, tokens per rollout, groups judged
concurrently."""
WORDS = ("the", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "saw", "big", "red", "house")
MODEL = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}


@dataclass(frozen=True)
class Stages:
    """Seconds per step."""

    step: float
    """From the end of one step to the end of the next."""
    generate: float
    """In the background if staleness is above 0."""
    update: float
    sync: float
    rest: float
    """Outside of the stages: metrics, samples."""


@dataclass(frozen=True)
class StepRow:
    """A run and its simulation."""

    judge: float
    staleness: int
    measured: Stages
    simulated: float
    alone: float
    """Simulated seconds per step, from stages that do not overlap."""
    predicted: bool
    """Whether the inputs of the simulation come from another run."""

    @property
    def error(self) -> float:
        """Return the relative error of the simulated seconds per step."""
        return self.simulated / self.measured.step - 1

    def __str__(self) -> str:
        found = self.measured
        cells = [
            f"{self.judge}",
            f"{self.staleness}",
            f"{found.generate:.2f}",
            f"{found.update:.2f}",
            f"{found.step:.2f}",
            f"{self.simulated:.2f}",
            f"{self.error:+.1%}" if self.predicted else f"({self.error:+.1%})",
            f"{self.alone / found.step - 1:+.1%}",
        ]
        return "| " + " | ".join(cells) + " |"


class PacedTeacher:
    """A teacher that is always available and never called."""

    name, all_down = "none", False

    async def __call__(self, request: Request) -> Reply | Failed:
        """Fail: the judge below sends no request."""
        raise AssertionError("the paced judge sends no request")


class PacedJudge:
    """A judge that sleeps for the given seconds per group."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def judge_group(self, group: Group, ask: Ask) -> Group:
        """Sleep, and reward later candidates more."""
        await asyncio.sleep(self._seconds)
        return replace(group, rewards=tuple(Reward(float(n), "j", "1") for n in range(len(group.candidates))))


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """Write a random model with a word-level tokenizer and a corpus of its words; return their paths."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "model")
    torch.manual_seed(0)
    # End-of-sequence is so rare that nearly all rollouts have the full length.
    settings = MODEL | {"vocab_size": 4096, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder / "model")
    draw, corpus = random.Random(7), folder / "corpus.jsonl"
    lines = (" ".join(draw.choices(WORDS, k=SUFFIX + 32)) for _ in range(2000))
    corpus.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder / "model", corpus


@contextlib.contextmanager
def working(url: str, name: str, seconds: float) -> Iterator[None]:
    """Run a judge worker in a thread with its own event loop."""
    buffer = open_url(url, name)
    started: list[tuple[asyncio.AbstractEventLoop, Worker]] = []

    async def work() -> None:
        settings = WorkersConfig(groups=SLOTS)
        judge = PacedJudge(seconds)
        worker = Worker(
            buffer, PacedTeacher(), lambda: GroupProcessor(judge, None), settings, "worker", WorkerMetrics()
        )
        started.append((asyncio.get_running_loop(), worker))
        await worker.run()

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    try:
        yield
    finally:
        loop, worker = started[0]
        loop.call_soon_threadsafe(worker.stop)
        thread.join()
        buffer.close()


def measure(model: Path, corpus: Path, judge: float, staleness: int, steps: int) -> Stages:
    """Return the mean stages of one run once its pipeline is full."""
    filling = staleness + 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        url = f"sqlite:///{folder / 'buffer.sqlite'}"
        settings: dict[str, Any] = {
            "run": {"dir": str(folder / "run")},
            "model": {"path": str(model), "dtype": "fp32"},
            "data": {
                "sources": [{"path": str(corpus)}],
                "suffix_length": SUFFIX,
                "min_prefix": 32,
                "max_prefix": 32,
                "shuffle_buffer": 16,
            },
            "candidates": {"rollouts": ROLLOUTS},
            "rollout": {"kv_cache_gib": 0.1, "max_batch": PART * ROLLOUTS},
            "teacher": {"run_in": "workers"},
            "buffer": {"url": url, "name": "bench"},
            "optimizer": {"lr": 1e-6},
            "train": {
                "steps": filling + steps + staleness,
                "global_batch": BATCH,
                "micro_batch": 4,
                "staleness": staleness,
            },
            # Only the last step writes one, after the measured steps.
            "checkpoint": {"every": 10**6},
            "observe": {"tensorboard": False},
        }
        (folder / "run.yaml").write_text(json.dumps(settings))
        command = [sys.executable, "-m", "megatron_rlpt", "train", "-c", str(folder / "run.yaml")]
        with working(url, "bench", judge):
            done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"rlpt train ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    shown = lines[filling : filling + steps]
    step = (shown[-1]["time"] - lines[filling - 1]["time"]) / len(shown)

    def mean(name: str) -> float:
        return fmean(line[name] for line in shown)

    generate = mean("background/generate" if staleness else "seconds/generate")
    return Stages(step, generate, mean("seconds/update"), mean("seconds/sync"), step - mean("seconds/total"))


def predict(given: Stages, judge: float, staleness: int, steps: int) -> float:
    """Return the simulated seconds per step, given the stages of a run."""
    rollouts = Rollouts(ROLLOUTS, SUFFIX, BATCH * ROLLOUTS * SUFFIX / given.generate)
    work = Workload(BATCH, PART, staleness, Service(given.update + given.rest), given.sync)
    cluster = SimulatedCluster(rollouts, Judges(1, SLOTS, Service(judge)))
    return simulate(cluster, work, steps + 2 * staleness + 4).step_seconds


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16, help="measured steps of each run")
    parser.add_argument("--judge", type=float, nargs="+", default=[0.6, 1.5], help="seconds to judge a group")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2], help="0 is needed: others build on it")
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
    arguments = parser.parse_args()
    if 0 not in arguments.staleness:
        parser.error(f"--staleness is {arguments.staleness}; add 0, whose stages the last column starts from")
    head = ("judge / s", "staleness", "generate", "update", "measured / s", "simulated / s", "error", "from alone")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head), flush=True)
    given: dict[bool, Stages] = {}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        model, corpus = make_inputs(Path(name))
        for staleness in sorted(arguments.staleness):
            for judge in arguments.judge:
                found = measure(model, corpus, judge, staleness, arguments.steps)
                given.setdefault(staleness > 0, found)
                simulated, alone = (
                    predict(given[beside], judge, staleness, arguments.steps) for beside in (staleness > 0, False)
                )
                row = StepRow(judge, staleness, found, simulated, alone, predicted=found is not given[staleness > 0])
                print(row, flush=True)
                rows.append(row)
    if errors := [abs(row.error) for row in rows if row.predicted]:
        print(f"\nsimulated from another run's stages: error {fmean(errors):.1%} on average, {max(errors):.1%} at most")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) | {"error": row.error} for row in rows], indent=1))


if __name__ == "__main__":
    main()
