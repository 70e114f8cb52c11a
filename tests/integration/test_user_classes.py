"""An objective, a judge and a data source of the user, each in one file: planned, trained, resumed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import finish, json_lines, lasting_metrics, only_error, rlpt_process, start, write_config

EXAMPLES = Path(__file__).resolve().parents[2] / "configs/examples"
OBJECTIVE = '''
"""Likelihood of the original, weighted by its reward; needs no rollouts."""

import os
import signal

from megatron_rlpt.objectives import Example, LossTerms, ObjectiveFacts, Selection
from megatron_rlpt.types import Reward, Source


class Weighted:
    version = "1"
    facts = ObjectiveFacts(trains_on=frozenset({Source.ORIGINAL}))

    def __init__(self, power=1.0):
        self.power = power
        self.selections = 0

    def select(self, groups):
        self.selections += 1
        if self.selections == int(os.environ.get("DIE_AT", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        selection = Selection()
        for group in groups:
            (candidate,), (reward,) = group.candidates, group.rewards
            if isinstance(reward, Reward):
                weight = reward.value**self.power
                selection.examples.append(Example(group.episode, (candidate,), (0,), advantages=(weight,)))
            else:
                selection.skipped[group.episode.id] = "no reward"
        return selection

    def loss(self, inputs):
        nll = -(inputs.logprobs * inputs.mask).sum(dim=1) / inputs.mask.sum(dim=1)
        return LossTerms(nll * inputs.advantages, {"weighted/weight": inputs.advantages})
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus) -> Path:
    """The user's files: an objective, and the corpus as CSV."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "weighted.py").write_text(OBJECTIVE)
    with (folder / "corpus.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "text"], *([row, one["text"]] for row, one in enumerate(json_lines(corpus)))])
    return folder


def configuration(folder: Path, model: Path, run: str) -> Path:
    return write_config(
        folder / f"{run}.yaml",
        model,
        folder / "corpus.csv",
        folder / run,
        objective={"name": f"{folder}/weighted.py:Weighted", "options": {"power": 0.5}},
        teacher={"judge": f"{EXAMPLES}/distinct.py:DistinctNgrams", "options": {"n": 2}},
        candidates={"rollouts": 0},
        data={
            "sources": [{"path": str(folder / "corpus.csv"), "reader": f"{EXAMPLES}/csv_source.py:CsvColumn"}],
            "suffix_length": 8,
            "min_prefix": 8,
            "max_prefix": 16,
            "shuffle_buffer": 16,
        },
        train={"steps": 3, "global_batch": 4, "micro_batch": 2},
    )


def test_a_run_is_planned_with_the_facts_of_the_users_classes(folder, tiny_model, rlpt):
    code, out, err = rlpt("plan", "-c", configuration(folder, tiny_model, "planned"), "--gpus", 1, "--json")
    assert code == 0, err
    assert json.loads(out)


def test_a_run_is_trained_killed_and_resumed_bit_for_bit_and_refused_with_another_source(folder, tiny_model):
    whole, broken = (configuration(folder, tiny_model, name) for name in ("whole", "broken"))
    code, _, err = finish(rlpt_process("train", "-c", str(whole)))
    assert code == 0, err
    rows = json_lines(folder / "whole/metrics.jsonl")
    assert [row["examples"] for row in rows] == [4, 4, 4]
    assert all(0 < row["weighted/weight"] <= 1 for row in rows)
    assert all(row["failure_rate"] == 0 for row in rows)

    code, _, _ = finish(rlpt_process("train", "-c", str(broken), DIE_AT=3))
    assert code == -signal.SIGKILL
    code, _, err = finish(rlpt_process("train", "-c", str(broken)))
    assert code == 0, err
    assert lasting_metrics(folder / "broken") == lasting_metrics(folder / "whole")
    exported = [(folder / name / "export/model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert exported[0] == exported[1]

    source = folder / "weighted.py"
    source.write_text(OBJECTIVE + "\n# changed\n")
    code, _, err = finish(rlpt_process("train", "-c", str(broken)))
    assert code == 8
    assert "another source of objective.name = " in only_error(err)
    assert "--fresh" in only_error(err)
    source.write_text(OBJECTIVE)
    code, out, _ = finish(rlpt_process("train", "-c", str(broken)))
    assert (code, "is complete" in out) == (0, True)


def test_several_ranks_of_torchrun_load_the_same_classes(folder, tiny_model):
    config = configuration(folder, tiny_model, "ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend=c10d",
                "--rdzv-endpoint=localhost:0"]  # fmt: skip
    done = subprocess.run(
        [*torchrun, "-m", "megatron_rlpt", "train", "-c", str(config)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    one, two = (lasting_metrics(folder / name) for name in ("whole", "ranks"))
    assert [row["weighted/weight"] for row in two] == pytest.approx([row["weighted/weight"] for row in one])
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=0.02)


def test_the_examples_learn_from_rollouts_that_a_worker_judges_without_a_teacher(served_model, corpus, tmp_path):
    config = write_config(
        tmp_path / "run.yaml",
        served_model,
        corpus,
        tmp_path / "run",
        objective={"name": f"{EXAMPLES}/hinge.py:Hinge", "options": {"margin": 2.0}},
        teacher={
            "judge": f"{EXAMPLES}/keywords.py:Keywords",
            "options": {"wanted": ["the", "cat"], "unwanted": ["dog"]},
            "run_in": "workers",
        },
    )
    worker = rlpt_process("judge", "serve", "-c", str(config))
    code, _, err = finish(start(config))
    worker.terminate()
    assert code == 0, err
    code, _, err = finish(worker)
    assert code == 0, err
    rows = json_lines(tmp_path / "run/metrics.jsonl")
    assert [row["failure_rate"] for row in rows] == [0, 0]
    assert sum(row["examples"] for row in rows) > 0
    assert all("hinge/lead" in row for row in rows if row["examples"])
    samples = [one for row in json_lines(tmp_path / "run/samples.jsonl") for one in row["candidates"]]
    assert {"keywords"} == {one["judge"] for one in samples if "value" in one}
