"""Overlap of generation, judging and training: seconds per step relative to the slowest of the three.

    python tools/bench/overlap.py [--steps 12] [--scale 1.0] [--runs 3]

Loop, pipeline, rollout buffer (SQLite) and judge worker are the real ones. Engine, teacher and policy sleep for the
time of their stage instead of computing, so the result shows the cost of the scheduling alone. The first steps, which
fill the pipeline, and the last, which drain it, are not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_rlpt.buffer.open import open_url
from megatron_rlpt.config import CandidatesConfig, Config, TrainConfig, WorkersConfig
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.judge_workers.group_processor import GroupProcessor
from megatron_rlpt.judge_workers.metrics import WorkerMetrics
from megatron_rlpt.judge_workers.worker import Worker
from megatron_rlpt.objectives import Example, Selection
from megatron_rlpt.objectives.online_dpo import OnlineDpo
from megatron_rlpt.observe import StageTimer
from megatron_rlpt.rollout.engine import Continuation, RolloutPrompt
from megatron_rlpt.teacher.generator import Ask, Reply, Request
from megatron_rlpt.trainer.buffered_judging import BufferedJudging
from megatron_rlpt.trainer.candidates import CandidateGenerator
from megatron_rlpt.trainer.curriculum import Curriculum
from megatron_rlpt.trainer.episode_feed import EpisodeFeed
from megatron_rlpt.trainer.gpu_memory import GpuMemory
from megatron_rlpt.trainer.learning import Learning
from megatron_rlpt.trainer.pipeline import Pipeline
from megatron_rlpt.trainer.returned_groups import Expected
from megatron_rlpt.trainer.stop import StopRequest
from megatron_rlpt.trainer.train import Training, train
from megatron_rlpt.types import Episode, Failed, Group, Reward

BATCH, PART, ROLLOUTS = 64, 4, 2
"""Episodes of a batch, episodes that the engine generates in one call, rollouts of each."""


@dataclass(frozen=True)
class Times:
    """Seconds of each stage for one batch."""

    generate: float
    judge: float
    update: float

    @property
    def slowest(self) -> float:
        """Return the longest time of a stage."""
        return max(self.generate, self.judge, self.update)

    @property
    def together(self) -> float:
        """Return the sum of the stages."""
        return self.generate + self.judge + self.update


class Words:
    """A tokenizer whose tokens are whole words."""

    def whole_characters(self, tokens: Sequence[int], before: Sequence[int] = ()) -> int:
        """Return the number of tokens."""
        return len(tokens)

    def is_blank(self, tokens: Sequence[int]) -> bool:
        """Return false."""
        return False


class Stream:
    """An endless stream of episodes."""

    def __init__(self) -> None:
        self._next = 0

    def take(self, count: int) -> list[Episode]:
        """Return the next ``count`` episodes."""
        first, self._next = self._next, self._next + count
        return [Episode(f"e{number}", (number,), (0,), "c", "d", 1) for number in range(first, self._next)]

    def state_dict(self) -> dict[str, int]:
        """Return the number of the next episode."""
        return {"next": self._next}

    def metrics(self) -> dict[str, float]:
        """Return no metrics."""
        return {}


class WaitingEngine:
    """An engine that sleeps for its share of ``generate``."""

    def __init__(self, times: Times) -> None:
        self.version: int | None = 0
        self._times = times

    def generate(self, prompts: Sequence[RolloutPrompt], max_tokens: int, version: int) -> list[Continuation]:
        """Sleep, and return arbitrary tokens."""
        time.sleep(self._times.generate * len(prompts) / (BATCH * ROLLOUTS))
        return [Continuation((prompt.seed % 1000, 1), (-1.0, -1.0), "length") for prompt in prompts]

    def update_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """Take over the version."""
        self.version = version


class WaitingPolicy:
    """A policy that sleeps for ``update`` in every update."""

    def __init__(self, times: Times) -> None:
        self.version = 0
        self._times = times

    def update(self, examples: Sequence[Example]) -> dict[str, float]:
        """Sleep, and increment the version."""
        time.sleep(self._times.update)
        self.version += 1
        return {}

    def weights(self) -> Iterable[tuple[str, Any]]:
        """Return no weights."""
        return ()


class WaitingTeacher:
    """A teacher that is always available and never called."""

    name, all_down = "none", False

    async def __call__(self, request: Request) -> Reply | Failed:
        """Fail: the judge below sends no request."""
        raise AssertionError("the waiting judge sends no request")


class WaitingJudge:
    """A judge that sleeps for its share of ``judge``, with ``slots`` groups concurrently."""

    def __init__(self, times: Times, slots: int) -> None:
        self._seconds = times.judge * slots / BATCH

    async def judge_group(self, group: Group, ask: Ask) -> Group:
        """Sleep, and reward later candidates more."""
        await asyncio.sleep(self._seconds)
        return replace(group, rewards=tuple(Reward(float(n), "j", "1") for n in range(len(group.candidates))))


class Record:
    """An observer and saver that records the ends of steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def step(self, step: int, version: int, metrics: dict[str, float], groups: Sequence[Group], sel: Selection) -> None:
        """Record the time."""
        self.ends.append(time.perf_counter())

    def save(self, done: int) -> None:
        """Do nothing."""

    def poll(self) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


@contextlib.contextmanager
def working(url: str, times: Times, slots: int) -> Iterator[None]:
    """Run a judge worker in a thread with its own event loop."""
    buffer = open_url(url, "bench")
    started: list[tuple[asyncio.AbstractEventLoop, Worker]] = []

    async def work() -> None:
        worker = Worker(
            buffer,
            WaitingTeacher(),
            lambda: GroupProcessor(WaitingJudge(times, slots), None),
            WorkersConfig(groups=slots),
            "worker",
            WorkerMetrics(),
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


def measure(times: Times, staleness: int, steps: int, slots: int) -> float:
    """Return the mean seconds per step once the pipeline is full."""
    filling = staleness + 2
    config = Config(
        train=TrainConfig(steps=filling + steps + staleness, global_batch=BATCH, staleness=staleness),
        candidates=CandidatesConfig(rollouts=ROLLOUTS),
    )
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'buffer.sqlite'}"
        buffer, engine, policy, record = open_url(url, "bench"), WaitingEngine(times), WaitingPolicy(times), Record()
        judging = BufferedJudging(
            buffer,
            Ranks(),
            run="bench",
            replace=False,
            capacity=(staleness + 1) * BATCH,
            max_attempts=3,
            settings="{}",
            expected=Expected(suffix_length=2, vocab=1000),
            max_failure_rate=0.0,
            max_pause=0.0,
        )
        pipeline = Pipeline(
            EpisodeFeed(Stream(), Ranks(), BATCH),  # type: ignore[arg-type]
            CandidateGenerator(
                text=Words(),  # type: ignore[arg-type]
                original=True,
                rewriter=None,
                engine=engine,
                suffix_length=2,
                run_seed=1,
            ),
            judging,
            Curriculum(config.candidates, 1),
            Ranks(),
            batch=BATCH,
            part=PART,
            steps=config.train.steps,
            staleness=staleness,
            background=staleness > 0,
        )
        pipeline.start(0)
        run = Training(
            config,
            pipeline,
            OnlineDpo(0.1),
            policy,  # type: ignore[arg-type]
            engine,
            None,
            GpuMemory(None, None, Ranks()),
            record,
            record,
            StageTimer(None),
            StopRequest(Path(folder), Ranks()),
            Learning(config.train.empty_window, config.train.max_empty_share),
        )
        with working(url, times, slots):
            train(run)
        pipeline.close()
        buffer.close()
    ends = record.ends[filling - 1 : filling + steps]
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--scale", type=float, default=1.0, help="seconds of the slowest stage")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--slots", type=int, default=8, help=f"groups judged concurrently, of {BATCH}")
    arguments = parser.parse_args()
    print("| generate | judge | update | staleness | step / slowest stage | step / sum of stages |\n|" + "---|" * 6)
    shares = [(1, 1, 1), (1, 0.5, 0.5), (0.5, 1, 0.5), (0.5, 0.5, 1), (0.9, 0.6, 1)]
    for share in shares:
        times = Times(*(arguments.scale * part for part in share))
        for staleness in (0, 1, 2):
            found = sorted(measure(times, staleness, arguments.steps, arguments.slots) for _ in range(arguments.runs))
            slowest = " to ".join(f"{seconds / times.slowest:.2f}" for seconds in (found[0], found[-1]))
            turn = " to ".join(f"{seconds / times.together:.2f}" for seconds in (found[0], found[-1]))
            print("| " + " | ".join([*map(str, share), str(staleness), slowest, turn]) + " |", flush=True)


if __name__ == "__main__":
    main()
