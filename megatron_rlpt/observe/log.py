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

from megatron_rlpt.plain_text import plain

ROOT = "megatron_rlpt"
_STANDARD = frozenset({"exc_info", "stack_info", "stacklevel", "extra"})


class Logger(logging.LoggerAdapter[logging.Logger]):
    """A standard logger that takes the event's fields as keywords: ``log.info("saved", step=3, seconds=0.4)``."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Move the fields into ``extra``, where the formatter reads them."""
        passed = {key: value for key, value in kwargs.items() if key in _STANDARD}
        fields = {key: value for key, value in kwargs.items() if key not in _STANDARD}
        passed["extra"] = {**(passed.get("extra") or {}), "fields": fields}
        return msg, passed


def get_logger(name: str) -> Logger:
    """Return the logger of a component, for instance ``get_logger("rollout")`` or ``get_logger(__name__)``."""
    short = name.removeprefix(f"{ROOT}.")
    return Logger(logging.getLogger(ROOT if short == ROOT else f"{ROOT}.{short}"), {})


def setup_logging(run_dir: Path | None = None, level: int = logging.INFO, rank: int = 0) -> None:
    """Send the log to standard error and, given a run folder, append it to ``<run_dir>/run.log`` as well.

    Ranks other than 0 show only warnings and write ``<run_dir>/logs/rank-<number>.log``, so that equal lines of many
    ranks do not hide the one that differs. A second call replaces the first. Loggers of other packages are unchanged.
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
    """Keep progress bars and warnings of other packages out of the terminal; call it before importing them.

    All that it mutes is known and harmless here: Megatron warns about each missing fused kernel (``rlpt doctor`` lists
    them), torch warns about renamed functions that Megatron and vLLM still call, and transformers and vLLM draw their
    progress bars over ours. Environment variables that are already set take precedence.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for category, module in ((UserWarning, r"megatron\."), (FutureWarning, r"(torch|vllm|megatron)\.")):
        warnings.filterwarnings("ignore", category=category, module=module)
    for name in ("torch._library.triton", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.ERROR)


class LineFormatter(logging.Formatter):
    """Formats one line: ``2026-01-31T12:00:00.123Z INFO rollout: weights updated version=3``; tracebacks add lines."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """Return the time in UTC with milliseconds."""
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, followed by the traceback if there is one."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        text = " ".join([record.getMessage().replace("\n", "\\n"), *(f"{k}={_plain(v)}" for k, v in fields.items())])
        name = record.name.removeprefix(f"{ROOT}.")
        line = plain(f"{self.formatTime(record)} {record.levelname} {name}: {text}")
        if record.exc_info:
            line += "\n" + plain(self.formatException(record.exc_info), keep="\n")
        return line


class _LogFile(logging.FileHandler):
    """Drops lines on a full disk, with one warning instead of a traceback per line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._lost = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line; the file opens again if it was closed."""
        try:
            super().emit(record)
        except OSError:  # of opening: the standard class handles only those of writing
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the line on an OSError; show any other error, which is a bug."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._lost:
            self._lost = True  # before the warning, which may end up here again
            _complain(Path(self.baseFilename), error)

    def close(self) -> None:
        """Close the file."""
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
        "the log file cannot be written; only standard error has the complete log", file=path, reason=error
    )


class _Stderr(logging.StreamHandler[TextIO]):
    """Looks up ``sys.stderr`` for every line: a live progress display replaces it to print above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore an OSError of the terminal or a redirected file; show any other error, which is a bug."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    @property
    def stream(self) -> TextIO:
        """Current standard error."""
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AttributeError("the stream is always the current standard error")


def _plain(value: object) -> str:
    """Return a field's value without line breaks, quoted if it contains spaces, quotes or ``=``."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if text and not any(char.isspace() or char in '"=' for char in text):
        return text
    return json.dumps(text, ensure_ascii=False)
