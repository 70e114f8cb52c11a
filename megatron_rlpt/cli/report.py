"""``rlpt report``: one page per run, or per comparison of several runs. Needs neither torch nor a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_rlpt.observe.terminal import say


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs (run.dir) or evaluations, in any state.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder to write to; default: the folder of the only run. Required for several.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write report.html, report.md and report.json of a run, or of several runs side by side.

    The page needs no other file and no network. Run folders are only read, also while training writes to them.
    """
    from megatron_rlpt.reports import JSON_FILE, MARKDOWN_FILE, write_report

    page = write_report(runs, out)
    say(f"report: {page}, with {MARKDOWN_FILE} and {JSON_FILE} beside it")
