"""Cluster files of various sites through ``rlpt launch --dry-run``: rendered scripts and refusals."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from prefork import forked_launcher

ROOT = Path(__file__).resolve().parents[2]
RUN = {
    "run": {"dir": "/shared/runs/one"},
    "model": {"path": "/shared/model"},
    "data": {"sources": [{"path": "/shared/corpus.jsonl"}]},
    "train": {"steps": 10},
    "teacher": {"run_in": "workers"},
}
CLUSTER = {
    "executor": "slurm",
    "python": "/shared/python",
    "trainer": {"nodes": 2, "ranks_per_node": 8, "gpus_per_node": 8, "gpu_type": "h100", "cpus_per_rank": 12},
    "teacher": {"nodes": 1, "servers_per_node": 2, "gpus_per_node": 8, "gpu_type": "h100", "cpus_per_server": 40},
    "judges": {"workers": 4, "cpus": 16},
    "buffer": {"redis": True},
}


def written(folder: Path, **sections: object) -> list[str]:
    """Return the arguments of a dry launch, with ``sections`` merged over ``CLUSTER``."""
    settings = {"home": str(folder / "home"), **CLUSTER}
    for name, section in sections.items():
        settings[name] = {**settings.get(name, {}), **section} if isinstance(section, dict) else section
    (folder / "run.yaml").write_text(json.dumps(RUN))
    (folder / "cluster.yaml").write_text(json.dumps(settings))
    files = ["--cluster", str(folder / "cluster.yaml"), "-c", str(folder / "run.yaml")]
    return ["launch", *files, "--dry-run", "--pack-dirty"]


def script(folder: Path, **sections: object) -> str:
    code, out, err = launch(*written(folder, **sections))
    assert code == 0, err
    return out


def launch(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``rlpt`` in the environment that launches."""
    process = forked_launcher(*arguments)
    return (process.wait(120), *process.communicate())


def asked(text: str, option: str) -> list[str]:
    return re.findall(rf"^#SBATCH --{option}=(.*)$", text, re.MULTILINE)


def steps(text: str) -> dict[str, str]:
    """Return role -> its ``srun`` line, in the order in which components start."""
    lines = re.findall(r"^srun --output.*$", text, re.MULTILINE)
    return dict(zip(("buffer", "teacher", "judges", "trainer"), lines, strict=True))


def test_a_site_that_wants_typed_gres(tmp_path):
    text = script(tmp_path, slurm={"gpu_option": "gres"})
    assert asked(text, "gres") == ["gpu:h100:8"]
    assert asked(text, "gpus-per-node") == []
    assert "--gres=none" in steps(text)["judges"]
    assert "gres" not in steps(text)["trainer"] + steps(text)["teacher"]


def test_a_site_whose_slurm_does_not_count_gpus(tmp_path):
    text = script(tmp_path, slurm={"gpu_option": "whole_nodes", "extra": {"exclusive": ""}})
    assert "gpus" not in "".join(re.findall(r"^(?:#SBATCH|srun).*$", text, re.MULTILINE))
    assert "#SBATCH --exclusive" in text


def test_nodes_of_104_cores_are_not_asked_for_320(tmp_path):
    text = script(tmp_path)
    assert int(asked(text, "ntasks-per-node")[0]) * int(asked(text, "cpus-per-task")[0]) == 96
    assert "--cpus-per-task=12" in steps(text)["trainer"]
    assert "--cpus-per-task=40" in steps(text)["teacher"]
    assert "--cpus-per-task=16" in steps(text)["judges"]


def test_two_kinds_of_nodes_in_one_job(tmp_path):
    slurm = {"allocation": "heterogeneous"}
    text = script(tmp_path, slurm=slurm, teacher={"gpu_type": "l40s", "gpus_per_node": 4})
    assert asked(text, "gpus-per-node") == ["l40s:4", "h100:8"]
    tasks, cores = asked(text, "ntasks-per-node"), asked(text, "cpus-per-task")
    assert [int(one) * int(other) for one, other in zip(tasks, cores, strict=True)] == [96, 96]


def test_a_job_that_waits_and_loads_modules(tmp_path):
    sections = {"modules": ["cuda/12.8"], "setup": ["source '/opt/my site/env.sh'"]}
    text = script(tmp_path, slurm={"dependency": "afterok:77", "allocation": "separate"}, **sections)
    judging, training = text.split("#!/bin/bash\n")[1:]
    assert asked(judging, "dependency") == ["afterok:77"]
    assert asked(training, "dependency") == [], "it follows the judging job, whose number is not known yet"
    for part in (judging, training):
        assert part.index("module load cuda/12.8") < part.index("/opt/my site/env.sh") < part.index("\nsrun --output")
        assert subprocess.run(["bash", "-n"], input=part, text=True).returncode == 0


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"slurm": {"extra": {"gres": "gpu:8"}}}, "slurm.extra.gres would be hidden from the components' steps"),
        ({"slurm": {"extra": {"array": "1-2"}}}, "slurm.extra.array would start the whole run once per array index"),
        ({"setup": ["export HF_TOKEN=x"]}, "setup sets HF_TOKEN, which looks like a secret"),
        ({"modules": ["a b"]}, "modules has 'a b'"),
        ({"teacher": {"arguments": ["--trust_remote_code"]}}, "has --trust_remote_code, which would run code"),
        ({"guards": {"gate": float("nan")}}, "guards.gate is nan; allowed: 1 or more"),
        ({"buffer": {"port": 70000}}, "buffer.port is 70000; allowed: up to 65535"),
        ({"slurm": {"dependency": "77"}}, "slurm.dependency is '77'"),
        ({"teacher": {"gpu_type": "l40s"}}, "allowed with allocation one, whose nodes are alike"),
    ],
)
def test_what_would_break_is_one_line_that_says_why(rlpt, tmp_path, sections, said):
    code, out, err = rlpt(*written(tmp_path, **sections))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert len(err.splitlines()) == 1
