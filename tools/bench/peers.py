"""A training step of ``rlpt train`` against that of another trainer: same weights, prompts, lengths and free reward.

    python tools/bench/peers.py --peer trl --prefix 448 --suffix 64 --k 2 --prompts 4 --steps 5 [--json FILE] [--quick]
    python tools/bench/peers.py --peer public --prefix 64 --suffix 48 --k 4 [--json FILE] [--quick]

Both trainers are up at the same time and work in turns: generate, reward, update, hand over the weights. A turn lasts
from one reward to the next, so it holds every part of a step once. ``bash tools/setup_peers.sh`` installs TRL;
``public`` is the step of a public implementation of the method (``peers/public_steps.py``), whose pool is the original
and K rollouts. Online DPO with a frozen reference; the precision is the one that ``model.dtype: auto`` chooses on this
machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from frame import MODEL, add_options, memory_of, report

from megatron_rlpt.observe.machine import bf16_is_slow
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent / "peers"
TRL_PYTHON = ROOT / ".venv-peers/bin/python"
PATIENCE = 1800.0
"""Longest seconds for a start or a step."""
LR = 1e-6
WARM_UP = 1


class Trainer:
    """A trainer in a process of its own, which waits for its turns."""

    def __init__(self, name: str, command: list[str], folder: Path) -> None:
        self.name = name
        self.seconds: list[float] = []
        self._folder = folder
        self._count = 0
        self._log = (folder / f"{name}.log").open("w")
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "RLPT_TURNS": str(folder), "RLPT_TURN": name},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._wait()

    def step(self) -> float:
        """Let it work until its next reward; return the seconds."""
        started = time.perf_counter()
        (self._folder / f"{self.name}.go.{self._count}").touch()
        self._count += 1
        self._wait()
        return time.perf_counter() - started

    def peak_bytes(self) -> int:
        """Return the most memory that its processes have held, one by one."""
        total = 0
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):  # another entry, or a process that has ended
                if os.getsid(int(entry.name)) == self._process.pid:
                    total += memory_of(entry.name, "VmHWM")
        return total

    def end(self) -> None:
        """Kill it."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _wait(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not (self._folder / f"{self.name}.ready.{self._count}").exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                lines = (self._folder / f"{self.name}.log").read_text().splitlines()
                raise SystemExit("\n".join([*lines[-20:], f"error: {self.name} took no step; see above"]))
            time.sleep(0.002)


def write_corpus(path: Path, prefix: int, suffix: int, count: int) -> None:
    """Write documents of ``prefix + suffix`` words, each of which is one token, as JSON lines with their prefix."""
    tokenizer = PolicyTokenizer(MODEL)
    draw = random.Random(0)
    words = [" time", " water", " house", " light", " world", " story", " river", " music", " winter", " garden"]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            text = "".join(draw.choices(words, k=prefix + suffix))
            tokens = tokenizer.encode(text)
            assert len(tokens) == prefix + suffix, "every word is one token"
            file.write(json.dumps({"text": text, "prefix": tokenizer.text_of(tokens[:prefix])}) + "\n")


def our_command(given: argparse.Namespace, folder: Path, corpus: Path, steps: int) -> list[str]:
    """Return the command of ``rlpt train`` with the same work."""
    config = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(MODEL)},
        "data": {
            "sources": [{"path": str(corpus)}],
            "suffix_length": given.suffix,
            "min_prefix": given.prefix,
            "max_prefix": given.prefix,
            "shuffle_buffer": 1,
        },
        "candidates": {"original": given.peer == "public", "rollouts": given.k},
        "teacher": {"judge": f"{HERE}/waiting_reward.py:WaitingReward", "options": {"prompts": given.prompts}},
        "objective": {"name": "online_dpo"},
        "optimizer": {"lr": LR, "decay": "constant"},
        "train": {"steps": steps, "global_batch": given.prompts, "micro_batch": given.prompts},
        "checkpoint": {"every": 100000},
        "observe": {"tensorboard": False},
    }
    path = folder / "ours.json"
    path.write_text(json.dumps(config))
    return [sys.executable, "-m", "megatron_rlpt", "train", "-c", str(path)]


def peer_command(given: argparse.Namespace, folder: Path, corpus: Path, steps: int) -> list[str]:
    """Return the command of the peer's driver."""
    settings: dict[str, Any] = {
        "folder": str(folder / "peer"),
        "model": str(MODEL),
        "corpus": str(corpus),
        "dtype": "fp32" if bf16_is_slow() else "bf16",
        "lr": LR,
        "steps": steps,
        **{name: getattr(given, name) for name in ("prefix", "suffix", "k", "prompts")},
    }
    python = str(TRL_PYTHON) if given.peer == "trl" else sys.executable
    return [python, str(HERE / f"{given.peer}_steps.py"), json.dumps(settings)]


def stages(folder: Path) -> dict[str, float]:
    """Return the median seconds of our stages; that of judging is the wait for the turn."""
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()][WARM_UP:]
    names = {name for row in rows for name in row if name.startswith("seconds/")} - {"seconds/judge", "seconds/step"}
    return {name.removeprefix("seconds/"): statistics.median(row.get(name, 0.0) for row in rows) for name in names}


def main() -> None:
    """Print the figures, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=["trl", "public"], default="trl", help="the other trainer")
    parser.add_argument("--prefix", type=int, default=448, help="tokens of a prompt")
    parser.add_argument("--suffix", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--k", type=int, default=2, help="rollouts of a prompt; TRL has 2")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a step")
    add_options(parser, "one prompt and three steps")
    given = parser.parse_args()
    if given.quick:
        given.prompts, given.steps = 1, 3
    if given.peer == "trl" and given.k != 2:
        parser.error(f"--k is {given.k}; TRL's OnlineDPOTrainer generates 2 completions per prompt")
    needed = {MODEL: "python tools/prepare_demo.py"}
    if given.peer == "trl":
        needed[TRL_PYTHON] = "bash tools/setup_peers.sh"
    for path, how in needed.items():
        if not path.exists():
            parser.error(f"{path} does not exist; run {how}")
    total = given.steps + WARM_UP + 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        write_corpus(corpus, given.prefix, given.suffix, (total + 4) * given.prompts)
        trainers: list[Trainer] = []
        try:
            for label, command in (("ours", our_command), ("peer", peer_command)):
                trainers.append(Trainer(label, command(given, folder, corpus, total + 2), folder))
            for step in range(given.steps + WARM_UP):
                for trainer in trainers if step % 2 else trainers[::-1]:
                    seconds = trainer.step()
                    if step >= WARM_UP:
                        trainer.seconds.append(seconds)
            peaks = {f"{trainer.name}_peak_bytes": trainer.peak_bytes() for trainer in trainers}
        finally:
            for trainer in trainers:
                trainer.end()
        found = stages(folder)
    ours, peer = trainers
    ratios = [theirs / own for own, theirs in zip(ours.seconds, peer.seconds, strict=True)]
    figures = {
        **{name: getattr(given, name) for name in ("peer", "prefix", "suffix", "k", "prompts", "steps")},
        "dtype": "fp32" if bf16_is_slow() else "bf16",
        "ours_s": statistics.median(ours.seconds),
        "peer_s": statistics.median(peer.seconds),
        "ratio": statistics.median(peer.seconds) / statistics.median(ours.seconds),
        "ratios": ratios,
        "ours_stages": found,
        **peaks,
    }
    report(figures, given.json)


if __name__ == "__main__":
    main()
