"""Rollout buffers in SQLite and in a real Redis."""

import itertools
import sys

import pytest

from megatron_rlpt.buffer.open import open_url

_numbers = itertools.count()


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def store(request, tmp_path):
    """Arguments of ``open_url`` for a buffer that is new in every test."""
    name = f"test-{next(_numbers)}"
    if request.param == "sqlite":
        return {"url": f"sqlite:///{tmp_path}/buffer.sqlite", "name": name}
    return {**request.getfixturevalue("redis_server").options, "name": name}


@pytest.fixture
def opened(store):
    """Open the buffer once more, as another process would."""
    handles = []

    def open_again(**options):
        handles.append(open_url(**{**store, "retry": 5.0, **options}))
        return handles[-1]

    yield open_again
    for handle in handles:
        handle.close()


@pytest.fixture
def buffer(opened):
    return opened()


@pytest.fixture
def rlpt(monkeypatch, capsys):
    """Run the command in this process; returns exit code, standard output and standard error."""
    from megatron_rlpt.cli import main as cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlpt", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code or 0, *capsys.readouterr()

    return run
