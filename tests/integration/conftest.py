"""Shared by the integration tests: a tiny model that vLLM can serve, and one engine for all of them."""

import sys
from pathlib import Path

import pytest
from tiny_runs import save_model, start_engine


@pytest.fixture(scope="session", autouse=True)
def engines_outlive_the_tests():
    """vLLM tears down process-wide groups when an engine is collected, also under engines that are still in use."""
    import vllm

    kept, build = [], vllm.LLM.__init__

    def build_and_keep(self, *arguments, **options):
        build(self, *arguments, **options)
        kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm.LLM, "__init__", build_and_keep)
        yield


@pytest.fixture(scope="session")
def served_model(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with heads of 32, the smallest that vLLM's attention on a CPU takes."""
    return save_model(tmp_path_factory.mktemp("models") / "served", tiny_model, seed=0)


@pytest.fixture(scope="session")
def other_model(served_model, tmp_path_factory) -> Path:
    """The same architecture and tokenizer with other weights."""
    return save_model(tmp_path_factory.mktemp("models") / "other", served_model, seed=1)


@pytest.fixture(scope="session")
def engine(served_model):
    """The rollout engine in fp32 on ``served_model``; a test that exchanges its weights puts them back."""
    return start_engine(served_model)


@pytest.fixture
def rlpt(monkeypatch, capfd):
    """The command in this process, from its arguments to its exit code, standard output and standard error."""
    from megatron_rlpt import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlpt", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as left:
            code = left.code or 0
        return code, *capfd.readouterr()

    return run
