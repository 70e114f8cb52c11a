"""Fixtures for all tests: a tiny model with a real tokenizer, the demo model, a small corpus, a Redis server."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

import hypothesis
import pytest
from redis_server import RedisServer
from tiny_model import WORDS, make_tiny_model

from megatron_rlpt.policy.megatron_compat import ImportHook

# No deadline per example: the machine may be busy. A third of the usual examples: others are drawn in every run.
hypothesis.settings.register_profile("busy", deadline=None, max_examples=35)
hypothesis.settings.load_profile("busy")

# Background jobs of a shell ignore Ctrl-C, and processes that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
NEEDS = {
    "redis": ("redis-server", lambda: shutil.which("redis-server")),
    "slurm": ("Slurm", lambda: shutil.which("slurmctld")),
    "vllm": ("vLLM", lambda: importlib.util.find_spec("vllm")),
    "chromium": ("chromium", lambda: shutil.which("chromium")),
}
"""Marker -> the program that its tests need, and a check whether it is installed."""


LANES = ("integration", "odd", "distributed", "unit")
"""Folders of tests in the order in which they start: the slowest first."""
TOGETHER = {
    **dict.fromkeys(("test_launch_slurm", "test_slurm_start", "test_slurm_accounting"), "slurm"),
    "test_launch_slurm_stops": "slurm, another cluster",
    **dict.fromkeys(
        (
            "test_rollout_engine",
            "test_self_check",
            "test_objectives_end_to_end",
            "test_engine_process",
            "test_moe_engine",
            "test_evaluate",
            "test_teacher_vllm",
            "test_world_judge",
        ),
        "vllm",
    ),
}
"""Module -> group of modules that share a cluster, an engine or the process that has imported vLLM; any other module is
its own group."""


def pytest_collection_modifyitems(items):
    for item in items:
        if "redis_server" in getattr(item, "fixturenames", ()):
            item.add_marker("redis")
    items.sort(key=_start)


def pytest_collection_finish(session):
    """Keep the garbage collector from scanning all modules, tests and libraries repeatedly."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Run the tests of a module in one process, and those of modules that share something expensive."""
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.split("::", 1)[0]
            return TOGETHER.get(Path(module).stem, module)

    return ByModule(config, log)


def _start(item) -> tuple[int, int]:
    lane = item.path.relative_to(ROOT / "tests").parts[0]
    group = TOGETHER.get(item.path.stem, "")
    return (
        0 if group.startswith("slurm") else 1 if group else 2,
        LANES.index(lane) if lane in LANES else len(LANES),
    )


KEPT = []
"""vLLM engines that stay alive until the process ends."""


@pytest.fixture(scope="session", autouse=True)
def _engines_outlive_the_tests():
    """Keep engines alive: vLLM destroys process-wide groups when one is collected, even while others are in use."""

    def keep(module):
        build = module.LLM.__init__

        def build_and_keep(self, *arguments, **options):
            build(self, *arguments, **options)
            KEPT.append(self)

        module.LLM.__init__ = build_and_keep

    # Only once a test has imported vLLM, which takes 13 s.
    if (loaded := sys.modules.get("vllm.entrypoints.llm")) is not None:
        keep(loaded)
    else:
        sys.meta_path.insert(0, ImportHook("vllm.entrypoints.llm".__eq__, keep))


@pytest.fixture(autouse=True)
def _no_log_of_another_test():
    """Detach the log that a command opened in this process: its file is gone with the folder of its test."""
    yield
    logger = logging.getLogger("megatron_rlpt")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


def pytest_runtest_setup(item):
    """Skip tests that cannot run on this machine; fail in CI, where everything must be installed."""
    for marker, (program, find) in NEEDS.items():
        if item.get_closest_marker(marker) and not find():
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{program} is not installed; see tools/test.sh")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder; made by tools/prepare_demo.py."""
    folder = ROOT / "runs/assets/smollm2-135m-instruct"
    assert folder.is_dir(), "run tools/prepare_demo.py first (tools/test.sh does)"
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama of 2 layers (tied embeddings, grouped queries) with a word-level tokenizer, as saved to disk."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """60 documents of 40 to 80 words from the vocabulary of the tiny model, as JSONL."""
    import random

    draw = random.Random(7)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with path.open("w", encoding="utf-8") as handle:
        for _ in range(60):
            handle.write(json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randrange(40, 81)))}) + "\n")
    return path


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    """A Redis server that all tests share; each test uses its own buffer names."""
    with RedisServer(tmp_path_factory.mktemp("redis") / "server") as server:
        yield server


@pytest.fixture
def rlpt(monkeypatch, capfd):
    """Run the command in this process; returns exit code, standard output and standard error."""
    from megatron_rlpt.cli import main as cli

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
