"""Fixtures for the integration tests: a tiny model that vLLM can serve, and one engine for all tests."""

import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judging_server import judging
from slurm_cluster import running_cluster
from slurm_launches import QUICK, SECTIONS, Launched
from tiny_runs import finish, rlpt_process, save_model, start, start_engine, write_config

WITHOUT_VLLM = {
    "test_bad_input",
    "test_convert_cli",
    "test_launch_environment",
    "test_megatron_engine",
    "test_redis_sandbox",
    "test_served_judges",
    "test_slurm_accounting",
    "test_slurm_sandbox",
    "test_slurm_start",
    "test_two_models",
}
"""Modules that run without vLLM; all others get its marker."""
HAS_VLLM = importlib.util.find_spec("vllm") is not None


class Unimportable(pytest.Module):
    """A test module whose imports are not installed: one test, which is skipped, or fails in CI."""

    def collect(self):
        yield MissingVllm.from_parent(self, name="vllm")


class MissingVllm(pytest.Item):
    """A placeholder for all tests of a module that needs vLLM."""

    def runtest(self):
        """Do nothing: ``pytest_runtest_setup`` has skipped it."""


def pytest_pycollect_makemodule(module_path, parent):
    wanted = HAS_VLLM or module_path.stem in WITHOUT_VLLM
    return None if wanted else Unimportable.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.stem not in WITHOUT_VLLM:
            item.add_marker("vllm")


@pytest.fixture(scope="session")
def served_model(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with heads of 32, the smallest that vLLM's CPU attention supports."""
    return save_model(tmp_path_factory.mktemp("models") / "served", tiny_model, seed=0)


@pytest.fixture(scope="session")
def other_model(served_model, tmp_path_factory) -> Path:
    """The same architecture and tokenizer with other weights."""
    return save_model(tmp_path_factory.mktemp("models") / "other", served_model, seed=1)


@pytest.fixture(scope="session")
def engine(served_model):
    """The rollout engine in fp32 with ``served_model``; a test that updates its weights restores them."""
    return start_engine(served_model)


@pytest.fixture(scope="session")
def cluster():
    """A Slurm sandbox of two nodes with accounting, shared by all tests."""
    with running_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def judging_section():
    with judging() as section:
        yield section


@pytest.fixture
def launched(cluster, served_model, corpus, tmp_path, judging_section) -> Callable[..., Launched]:
    """Prepare runs whose judge workers use the server unless another ``teacher`` is given."""

    def make(**options: Any) -> Launched:
        return Launched(tmp_path, cluster, served_model, corpus, **{"teacher": judging_section, **options})

    return make


@pytest.fixture(scope="module")
def undisturbed(served_model, corpus, judging_section, tmp_path_factory) -> Path:
    """The undisturbed quick run, with one judge worker and without a launch."""
    base = tmp_path_factory.mktemp("undisturbed")
    sections = {**SECTIONS, "teacher": judging_section}
    config = write_config(base / "run.yaml", served_model, corpus, base / "run", **sections)
    worker = rlpt_process("judge", "serve", "-c", str(config), *QUICK)
    try:
        code, _, err = finish(start(config, *QUICK))
        assert code == 0, err
    finally:
        os.kill(worker.pid, signal.SIGTERM)
        finish(worker)
    return base / "run"
