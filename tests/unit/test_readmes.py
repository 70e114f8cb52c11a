"""Every command in a README parses and is run by a test, or the README says why not; every link works."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from megatron_rlpt.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
READMES = sorted(
    path
    for path in ROOT.rglob("README.md")
    if not {".venv", ".venv-launch", ".venv-megatron", ".pytest_cache", "runs"} & set(path.relative_to(ROOT).parts)
)
PROGRAM = re.compile(
    r"(sudo |eval \"\$\()?(bash|rlpt|python3?|srun|sbatch|docker|enroot|apptainer|pip|\S*venv\S*/bin/\S+) "
)
RUN_BY = {
    "rlpt train": "tests/integration/test_resume.py",
    "rlpt report": "tests/unit/reports/test_report_files.py",
    "rlpt evaluate": "tests/integration/test_evaluate.py",
    "rlpt convert": "tests/integration/test_convert_cli.py",
    "rlpt init": "tests/unit/convert/test_fresh.py",
    "rlpt config": "tests/unit/cli/test_main.py",
    "rlpt doctor": "tests/unit/cli/test_doctor.py",
    "rlpt plan": "tests/unit/planner/test_recipes.py",
    "rlpt launch": "tests/integration/test_launch_slurm.py",
    "rlpt status": "tests/unit/launch/test_status.py",
    "rlpt buffer": "tests/unit/buffer/test_buffer_cli.py",
    "rlpt teacher data": "tests/unit/teacher_training/test_teacher_data.py",
    "rlpt teacher thoughts": "tests/unit/teacher_training/test_thinking_data.py",
    "rlpt experiment": "tests/unit/experiments/test_experiment_run.py",
    "rlpt world make": "tests/unit/world/test_make.py",
    "rlpt world measure": "tests/unit/world/test_sampling.py",
    "rlpt judge try": "tests/unit/cli/test_judge_try.py",
    "rlpt judge calibrate": "tests/unit/evaluation/test_judge_calibration.py",
    "rlpt judge serve": "tests/unit/judge_workers/test_supervisor.py",
    "rlpt teacher serve": "tests/integration/test_teacher_server.py",
    "python -m torch.distributed.run": "tests/integration/test_user_classes.py",
    "bash tools/slurm_sandbox.sh": "tests/integration/test_slurm_sandbox.py",
    "bash tools/demo_cluster.sh": "tests/integration/test_demo_cluster.py",
    'python -c "import csv': "tests/unit/test_readmes.py",
    "bash tools/setup.sh": "tools/test.sh",
    "bash tools/setup_launch.sh": "tools/test.sh",
    "bash tools/test.sh": ".ci/run",
    "python tests/gpu/check_gpu.py --rehearse": "tests/integration/test_gpu_rehearsal.py",
    "python tools/wheels.py": "tests/unit/tools/test_wheels.py",
}
"""Beginning of a command -> what runs it."""
NOT_RUN = {
    "bash tools/demo.sh": "ten to twenty minutes",
    "bash tools/test_megatron_versions.sh": "takes an hour",
    "srun -N2 --ntasks-per-node=8": "need a cluster",
    "docker build": "The image has not been built",
    "enroot import": "The image has not been built",
    "apptainer build": "The image has not been built",
    "bash tools/setup.sh --gpu": "installed or measured on a GPU yet",
    "python tests/gpu/check_gpu.py": "measured on a GPU yet",
    ".venv/bin/uv pip compile": "To resolve it anew",
    "pip install --no-index": "there, after the last",
}
"""Beginning of a command -> words of the README that say why no test runs it."""


def commands(path: Path) -> list[str]:
    """Return the commands in the code blocks of a README, with continued lines joined and comments removed."""
    found, fenced = [], False
    for line in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif (fenced or line.startswith("    ")) and PROGRAM.match(line.strip()):
            bare = " ".join(line.strip().split("  #")[0].split())
            found.append(re.sub(r"^(sudo |eval \"\$\()|^\S*venv\S*/bin/(?=rlpt|python)", "", bare))
    return found


CASES = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in READMES]


@pytest.mark.parametrize("path", CASES)
def test_every_command_is_run_by_a_test_or_the_readme_says_why_not(path):
    text = path.read_text(encoding="utf-8")
    for command in commands(path):
        beginning = max(filter(command.startswith, RUN_BY | NOT_RUN), key=len, default="")
        by, why = RUN_BY.get(beginning), NOT_RUN.get(beginning)
        assert by or why, f"no test is known to run {command!r}: add it to RUN_BY, or say in the README why not"
        assert by is None or (ROOT / by).is_file(), by
        assert by or why in text, f"the README has to say why {command!r} is not run by a test: {why}"


@pytest.mark.parametrize("path", CASES)
def test_every_rlpt_command_has_options_that_rlpt_knows(path):
    for command in commands(path):
        if not command.startswith("rlpt "):
            continue
        words = [word for word in shlex.split(command.replace("[", "").replace("]", ""))[1:] if word != "..."]
        context, group = None, get_command(app)
        while hasattr(group, "commands"):
            assert words, command
            assert words[0] in group.commands, command
            context, group = (
                group.make_context(words[0], [], parent=context, resilient_parsing=True),
                group.commands[words.pop(0)],
            )
        known = {option for param in group.params for option in (*param.opts, *param.secondary_opts)} | {"--help"}
        for word in words:
            assert not word.startswith("-") or word.split("=")[0] in known, f"{command}: {word}"


@pytest.mark.parametrize("path", CASES)
def test_every_link_and_file_is_there(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", text):
        assert target.startswith("http") or (path.parent / target).exists(), target
    for name in re.findall(r"`((?:configs|tools|tests|launch|megatron_rlpt)/[\w./-]+\.(?:py|sh|yaml|md|txt))`", text):
        assert (ROOT / name).exists(), name


def test_the_csv_file_of_the_examples_is_made_by_its_command(smollm2, tmp_path):
    (command,) = [one for one in commands(ROOT / "configs/examples/README.md") if one.startswith("python -c")]
    target = tmp_path / "corpus.csv"
    script = command.replace("runs/examples/corpus.csv", str(target)).replace("python ", f"{sys.executable} ", 1)
    subprocess.run(["bash", "-c", script], cwd=ROOT, check=True)
    with target.open(newline="", encoding="utf-8") as file:
        assert sum(len(row["text"]) > 0 for row in csv.DictReader(file)) > 1000


def test_the_front_page_is_short():
    assert (ROOT / "README.md").stat().st_size <= 12_000
