"""What a component waits for before it starts: a buffer that answers, and for the trainer a first judgment.

A trainer that starts before its judges holds its GPUs for nothing, and one whose judges never work would find out only
after it has loaded everything.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from launch.spec import KEY_VARIABLE, Spec, publish, read_published
from megatron_rlpt.buffer.open import open_buffer
from megatron_rlpt.config import load_config
from megatron_rlpt.distributed.processes import end_all, start_child
from megatron_rlpt.errors import BufferUnavailableError, ModelError, RunStopped, TeacherError

T = TypeVar("T")

_POLL = 1.0
_TRY = ("--prefix", "The capital of France is", "--candidate", " Paris, on the river Seine.",
        "--candidate", " potato seven under.")  # fmt: skip
"""What the judge is asked; any verdict will do."""


class Waiting(Protocol):
    """Who waits (``component.Component``)."""

    spec: Spec
    environment: dict[str, str]

    def say(self, state: str) -> None:
        """Tell ``rlpt status`` what is waited for."""

    def is_to_end(self) -> bool:
        """Whether waiting is to be given up."""

    def sleep(self, seconds: float) -> None:
        """Wait so long, or until it is to end."""


def await_buffer(this: Waiting) -> list[str]:
    """Overrides that lead to the rollout buffer, once it answers, and to the key of the teacher's servers.

    None where the configuration names them.

    An address of an earlier start of the job may still be there: it does not answer, or does not take the password.

    Raises:
        BufferUnavailableError: it does not answer in time.
        ConfigError: it cannot be asked from here, for which waiting is of no use.
        RunStopped: this component is to end.
    """
    spec = this.spec
    key = [f"teacher.workers.key_env={KEY_VARIABLE}"] if spec.makes_up_key else []
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

    return _wait(this, look, BufferUnavailableError, "the rollout buffer does not answer")


def await_judgment(this: Waiting, overrides: Sequence[str], asks: bool, start: str) -> None:
    """Wait until the judge has given a verdict on two candidates, by the same servers that workers ask.

    Workers themselves wait for the trainer; one that could not start would have ended the job.

    Args:
        this: the trainer's component.
        overrides: that lead to the buffer.
        asks: whether this process asks; the others wait for it.
        start: of the job, so that a verdict of an earlier one does not count.

    Raises:
        TeacherError: there was none in time.
        ModelError: a model is not there, for which waiting is of no use.
        RunStopped: this component is to end.
    """
    spec = this.spec
    passed = spec.shared / "judged.json"

    def ask() -> bool | str:
        command = [sys.executable, "-m", "megatron_rlpt", "judge", "try", "-c", spec.config, *_TRY, *overrides]
        with tempfile.TemporaryFile("w+") as words:
            process = start_child(command, env=this.environment, stdout=subprocess.DEVNULL, stderr=words)
            # It loads much before it asks, and may wait for a server: whoever is told to end does not.
            while process.poll() is None and not this.is_to_end():
                this.sleep(_POLL)
            end_all([process], 0.0)
            words.seek(0)
            said = (words.read().strip().splitlines() or ["no verdict"])[-1].removeprefix("error: ")
        if process.returncode == ModelError.exit_code:
            raise ModelError(said)
        if process.returncode:
            return said
        publish(passed, {"start": start})
        return True

    def follow() -> bool | str:
        return read_published(passed).get("start") == start or "rank 0 has none yet"

    _wait(this, ask if asks else follow, TeacherError, "judges gave no first judgment")


def _wait(this: Waiting, look: Callable[[], T | str], error: type[Exception], what: str) -> T:
    """What ``look`` finds; a text is why there is nothing yet."""
    deadline = time.monotonic() + this.spec.gate
    said = ""
    while isinstance(found := look(), str):
        if this.is_to_end():
            raise RunStopped(f"told to end while waiting: {what}: {found}")
        if time.monotonic() > deadline:
            raise error(f"{what} (not within guards.gate = {this.spec.gate:g} s): {found}")
        if found != said:
            this.say(f"waits, {found}")
            said = found
        this.sleep(_POLL)
    return found
