"""Conditions for a component to start: a buffer that answers and, for the trainer, a first judgment.

A trainer that starts before its judges wastes its GPUs, and would notice broken judges only after loading everything.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from launch.spec import KEY_VARIABLE, Spec, publish, read_published
from megatron_rlpt.buffer.open import open_buffer
from megatron_rlpt.config import Config, load_config, models_asked
from megatron_rlpt.distributed.processes import end_all, start_child
from megatron_rlpt.errors import BufferUnavailableError, ModelError, RunStopped, TeacherError
from megatron_rlpt.judge_workers.discovery import KIND, servers_of

T = TypeVar("T")

_POLL = 1.0
_TRY = ("--prefix", "The capital of France is", "--candidate", " Paris, on the river Seine.",
        "--candidate", " potato seven under.")  # fmt: skip
"""Arguments of a trial judgment; any verdict will do."""


class Waiting(Protocol):
    """A component that waits (``component.RunningComponent``)."""

    spec: Spec
    environment: dict[str, str]

    def report(self, state: str) -> None:
        """Publish the state for ``rlpt status``."""

    def must_end(self) -> bool:
        """Return whether to give up waiting."""

    def sleep(self, seconds: float) -> None:
        """Wait ``seconds``, or until the component has to end."""


def await_buffer(component: Waiting) -> list[str]:
    """Wait until the rollout buffer answers; return the overrides for it and for the key of the teacher's servers.

    Settings that the configuration already has need no override. The address of an earlier start of the job may still
    be published; it does not answer or refuses the password.

    Raises:
        BufferUnavailableError: it does not answer in time.
        ConfigError: its settings cannot work, so waiting is of no use.
        RunStopped: this component has to end.
    """
    spec = component.spec
    key = [f"teacher.workers.key_env={KEY_VARIABLE}"] if spec.generates_key else []
    if "buffer" not in spec.components:
        return key
    password = f"buffer.password_file={spec.shared / 'password'}"

    def look() -> list[str] | str:
        address = read_published(spec.shared / "buffer.json", url=str)
        if not address:
            return "the rollout buffer has not started"
        overrides = [f"buffer.url={address['url']}", password, *key]
        try:
            open_buffer(load_config(spec.config, [*overrides, "buffer.retry=0"])).close()
        except BufferUnavailableError as error:
            return str(error)
        return overrides

    return _wait(component, look, BufferUnavailableError, "the rollout buffer does not answer")


def await_judgment(component: Waiting, overrides: Sequence[str], first: bool, start: str) -> None:
    """Wait until a trial judgment of two candidates succeeds, with the servers that the judge workers use.

    Where the rewriter has a model of its own, wait for one of its servers as well. Judge workers themselves wait for
    the trainer; one that cannot start ends the job.

    Args:
        component: the trainer's.
        overrides: for the buffer.
        first: run the trial in this process; the others wait for its result.
        start: of the job, so that the result of an earlier start does not count.

    Raises:
        TeacherError: no verdict in time.
        ModelError: a model does not exist, so waiting is of no use.
        RunStopped: this component has to end.
    """
    spec = component.spec
    passed = spec.shared / "judged.json"

    def judge() -> bool | str:
        command = [sys.executable, "-m", "megatron_rlpt", "judge", "try", "-c", spec.config, *_TRY, *overrides]
        with tempfile.TemporaryFile("w+") as stderr:
            process = start_child(command, env=component.environment, stdout=subprocess.DEVNULL, stderr=stderr)
            # It loads a lot before its first request, and may wait for a server.
            while process.poll() is None and not component.must_end():
                component.sleep(_POLL)
            end_all([process], 0.0)
            stderr.seek(0)
            error = (stderr.read().strip().splitlines() or ["no verdict"])[-1].removeprefix("error: ")
        if process.returncode == ModelError.exit_code:
            raise ModelError(error)
        return error if process.returncode else True

    def served() -> bool | str:
        return _unserved(load_config(spec.config, overrides)) or True

    def follow() -> bool | str:
        return read_published(passed).get("start") == start or "rank 0 has none yet"

    what = "judges gave no first judgment"
    if not first:
        _wait(component, follow, TeacherError, what)
        return
    _wait(component, judge, TeacherError, what)
    _wait(component, served, TeacherError, "not every model of the teacher is served")
    publish(passed, {"start": start})


def _unserved(config: Config) -> str:
    """Return which of two models has no server yet; empty if both have one, and for one model, which a trial finds."""
    models = models_asked(config)
    if len(models) < 2:
        return ""
    with contextlib.closing(open_buffer(config)) as buffer:
        announced = buffer.announced(KIND)
    lacking = [model.who for model in models if not servers_of(config, model, announced)]
    return f"no server of the {' and of the '.join(lacking)} is announced" if lacking else ""


def _wait(component: Waiting, look: Callable[[], T | str], error: type[Exception], what: str) -> T:
    """Return what ``look`` finds; it returns a text to say why there is nothing yet."""
    deadline = time.monotonic() + component.spec.gate
    reported = ""
    while isinstance(found := look(), str):
        if component.must_end():
            raise RunStopped(f"stopped as requested while waiting: {what}: {found}")
        if time.monotonic() > deadline:
            raise error(f"{what} (not within guards.gate = {component.spec.gate:g} s): {found}")
        if found != reported:
            component.report(f"waiting: {found}")
            reported = found
        component.sleep(_POLL)
    return found
