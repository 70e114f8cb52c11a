"""Fixtures for the integration tests: a tiny model that vLLM can serve, and one engine for all tests."""

import importlib.util
from pathlib import Path

import pytest
from slurm_cluster import running_cluster
from tiny_runs import save_model, start_engine

WITHOUT_VLLM = {
    "test_bad_input",
    "test_convert_cli",
    "test_launch_environment",
    "test_megatron_engine",
    "test_redis_sandbox",
    "test_slurm_accounting",
    "test_slurm_sandbox",
    "test_slurm_start",
}
"""Modules that run without vLLM; all others get its marker."""
KEPT = []
"""Engines that stay alive until the process ends."""
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


@pytest.fixture(scope="session", autouse=True)
def engines_outlive_the_tests():
    """Keep engines alive: vLLM destroys process-wide groups when one is collected, even while others are in use."""
    if not HAS_VLLM:
        yield
        return
    import vllm

    build = vllm.LLM.__init__

    def build_and_keep(self, *arguments, **options):
        build(self, *arguments, **options)
        KEPT.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm.LLM, "__init__", build_and_keep)
        yield


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
