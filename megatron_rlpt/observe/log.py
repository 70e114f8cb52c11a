"""The run's log: one line per event, ``time level name: message key=value``, on standard error and in ``run.log``."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, TextIO

from megatron_rlpt.observe.terminal import plain

ROOT = "megatron_rlpt"
_STANDARD = frozenset({"exc_info", "stack_info", "stacklevel", "extra"})


class Logger(logging.LoggerAdapter[logging.Logger]):
    """A standard logger whose calls take the event's fields as keywords: ``log.info("saved", step=3, seconds=0.4)``."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Move the fields to where the formatter finds them."""
        passed = {key: value for key, value in kwargs.items() if key in _STANDARD}
        fields = {key: value for key, value in kwargs.items() if key not in _STANDARD}
        passed["extra"] = {**(passed.get("extra") or {}), "fields": fields}
        return msg, passed


def get_logger(name: str) -> Logger:
    """The logger of one component, for instance ``get_logger("rollout")``; a module's ``__name__`` works too."""
    short = name.removeprefix(f"{ROOT}.")
    return Logger(logging.getLogger(ROOT if short == ROOT else f"{ROOT}.{short}"), {})


def setup_logging(run_dir: Path | None = None, level: int = logging.INFO, rank: int = 0) -> None:
    """Send the log to standard error and, given a run folder, append it to ``<run_dir>/run.log`` as well.

    Ranks other than 0 show warnings only and write ``<run_dir>/logs/rank-<number>.log``: a thousand equal lines help
    nobody, and the one that differs is looked for by its rank. Calling it again replaces the earlier set-up. Other
    packages' loggers are left as they are.
    """
    logger = logging.getLogger(ROOT)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [_Stderr()]
    if rank:
        handlers[0].setLevel(logging.WARNING)
    if run_dir is not None:
        path = run_dir / "logs" / f"rank-{rank:05d}.log" if rank else run_dir / "run.log"
        if (file := _open(path)) is not None:
            handlers.append(file)
    for handler in handlers:
        handler.setFormatter(LineFormatter())
        logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


def quiet_libraries() -> None:
    """Keep other packages' bars and advice out of the terminal; call it before they are imported.

    What is muted is known and without consequence here: Megatron announces each fused kernel it does without (``rlpt
    doctor`` lists them), torch announces renamed functions that Megatron and vLLM still call, and both transformers
    and vLLM draw a progress bar over ours. Environment variables that are set already win.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for category, module in ((UserWarning, r"megatron\."), (FutureWarning, r"(torch|vllm|megatron)\.")):
        warnings.filterwarnings("ignore", category=category, module=module)
    for name in ("torch._library.triton", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.ERROR)


class LineFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.123Z INFO rollout: weights updated version=3``; only a traceback adds lines."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """UTC with milliseconds."""
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"

    def format(self, record: logging.LogRecord) -> str:
        """The line, and after it the traceback if there is one."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        text = " ".join([record.getMessage().replace("\n", "\\n"), *(f"{k}={_plain(v)}" for k, v in fields.items())])
        name = record.name.removeprefix(f"{ROOT}.")
        line = plain(f"{self.formatTime(record)} {record.levelname} {name}: {text}")
        if record.exc_info:
            line += "\n" + plain(self.formatException(record.exc_info), keep="\n")
        return line


class _LogFile(logging.FileHandler):
    """Loses lines on a full disk, and says so once instead of a traceback for each."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._lost = False

    def handleError(self, record: logging.LogRecord) -> None:
        """What ``emit`` met; a message that cannot be made is a bug of ours and is shown as one."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._lost:
            self._lost = True  # before it is said, which comes here again
            _complain(Path(self.baseFilename), error)

    def close(self) -> None:
        """Close the file, with what it took."""
        with contextlib.suppress(OSError):
            super().close()


def _open(path: Path) -> logging.Handler | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _LogFile(path)
    except OSError as error:
        _complain(path, error)
        return None


def _complain(path: Path, error: BaseException | None) -> None:
    get_logger(__name__).warning(
        "the log cannot be written here; it is complete on standard error only", file=path, reason=error
    )


class _Stderr(logging.StreamHandler[TextIO]):
    """Looks ``sys.stderr`` up at every line: a live progress display replaces it to print above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    def handleError(self, record: logging.LogRecord) -> None:
        """A terminal that is gone, or a full disk behind it, has nobody to be told; a bug of ours is shown."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    @property
    def stream(self) -> TextIO:
        """Standard error as it is now."""
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AttributeError("the stream is always the current standard error")


def _plain(value: object) -> str:
    """A field's value without line breaks; quoted where it would otherwise run into the next field."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if text and not any(char.isspace() or char in '"=' for char in text):
        return text
    return json.dumps(text, ensure_ascii=False)
