"""Imports risky packages in a separate process, so that a crash or a hang does not affect this one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

_MARK = "RLPT-PROBE "
_TEMPLATE = """\
import json, sys

def describe(error):
    return (type(error).__name__ + ": " + " ".join(str(error).split())).removesuffix(": ")

answer = {{"facts": {{}}}}
try:
    exec({body!r}, {{"facts": answer["facts"]}})
except BaseException as error:
    root = error
    while (deeper := root.__cause__ or (None if root.__suppress_context__ else root.__context__)) is not None:
        root = deeper
    answer["error"] = describe(error)
    if root is not error:  # transformers, for instance, hides the cause behind another error
        answer["error"] += f" (because of {{describe(root)}})"
print("\\n" + {mark!r} + json.dumps(answer), flush=True)
"""


@dataclass(frozen=True)
class Probe:
    """The result of a probe: facts, or an error in one line."""

    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the probe succeeded."""
        return self.error is None


def run_probe(body: str, timeout: float) -> Probe:
    """Run Python statements that fill the dictionary ``facts`` in a fresh interpreter.

    Args:
        body: the statements.
        timeout: seconds after which the process group is killed.
    """
    process = subprocess.Popen(
        # -P: like the rlpt command, do not search the working directory for packages.
        [sys.executable, "-P", "-c", _TEMPLATE.format(body=body, mark=_MARK)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return Probe(error=f"no answer within {timeout:g} s")
        raise
    for line in reversed(output.splitlines()):
        if line.startswith(_MARK):
            # A crash while the interpreter shuts down, after the answer, does not matter.
            return Probe(**json.loads(line.removeprefix(_MARK)))
    if process.returncode < 0:
        return Probe(error=f"killed by {signal.Signals(process.returncode * -1).name}")
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return Probe(error=lines[-1] if lines else f"exit code {process.returncode} without a message")
