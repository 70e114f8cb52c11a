"""What a component waits for before it starts: a buffer that answers, and for the trainer a first judgment.

A trainer that starts before its judges holds its GPUs for nothing, and one whose judges never work would find out only
after it has loaded everything.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from launch.spec import Spec, publish
from megatron_rlpt.buffer.open import open_buffer
from megatron_rlpt.config import load_config
from megatron_rlpt.errors import BufferUnavailableError, ModelError, TeacherError

T = TypeVar("T")

_POLL = 1.0
_TRY = ("--prefix", "The capital of France is", "--candidates", " Paris, on the river Seine.", " potato seven under.")
"""What the judge is asked; any verdict will do."""


def await_buffer(spec: Spec, stopped: threading.Event) -> list[str]:
    """Overrides that lead to the rollout buffer, once it answers; none where the configuration names it.

    An address of an earlier start of the job may still be there: it does not answer, or does not take the password.

    Raises:
        BufferUnavailableError: it does not answer in time.
    """
    if "buffer" not in spec.components:
        return []
    password = f"buffer.password_file={spec.shared / 'password'}"

    def look() -> list[str] | str:
        try:
            address = json.loads((spec.shared / "buffer.json").read_text(encoding="utf-8"))
            overrides = [f"buffer.url={address['url']}", password]
            open_buffer(load_config(spec.config, [*overrides, "buffer.retry=0"])).close()
        except (OSError, BufferUnavailableError) as error:
            return str(error)
        return overrides

    return _wait(look, spec.gate, stopped, BufferUnavailableError, "the rollout buffer does not answer")


def await_judgment(
    spec: Spec,
    overrides: Sequence[str],
    environment: Mapping[str, str],
    asks: bool,
    start: str,
    stopped: threading.Event,
) -> None:
    """Wait until the judge has given a verdict on two candidates, by the same servers that workers ask.

    Workers themselves wait for the trainer; one that could not start would have ended the job.

    Args:
        spec: of the launch.
        overrides: that lead to the buffer.
        environment: of ``rlpt judge try``.
        asks: whether this process asks; the others wait for it.
        start: of the job, so that a verdict of an earlier one does not count.
        stopped: gives up.

    Raises:
        TeacherError: there was none in time.
        ModelError: a model is not there, for which waiting is of no use.
    """
    passed = spec.shared / "judged.json"

    def ask() -> bool | str:
        command = [sys.executable, "-m", "megatron_rlpt", "judge", "try", "-c", spec.config, *_TRY]
        for override in overrides:
            command += ["--set", override]
        done = subprocess.run(command, env=dict(environment), capture_output=True, text=True)
        if done.returncode == ModelError.exit_code:
            raise ModelError((done.stderr.strip().splitlines() or ["no model"])[-1].removeprefix("error: "))
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["no verdict"])[-1]
        publish(passed, {"start": start})
        return True

    def follow() -> bool | str:
        try:
            return json.loads(passed.read_text(encoding="utf-8"))["start"] == start or "rank 0 has none yet"
        except OSError:
            return "rank 0 has none yet"

    _wait(ask if asks else follow, spec.gate, stopped, TeacherError, "judges gave no first judgment")


def _wait(
    look: Callable[[], T | str], seconds: float, stopped: threading.Event, error: type[Exception], what: str
) -> T:
    """What ``look`` finds; a text is why there is nothing yet."""
    deadline = time.monotonic() + seconds
    while isinstance(found := look(), str):
        if stopped.is_set() or time.monotonic() > deadline:
            why = "told to stop" if stopped.is_set() else f"not within {seconds:g} s"
            raise error(f"{what} ({why}): {found}")
        stopped.wait(_POLL)
    return found
