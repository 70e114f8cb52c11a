"""Write a report: ``report.html``, ``report.md`` and ``report.json`` side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_rlpt.errors import CheckpointError, ConfigError, is_disk_full
from megatron_rlpt.files import write_atomically
from megatron_rlpt.observe.jsonl import finite
from megatron_rlpt.reports.collect import collect_runs
from megatron_rlpt.reports.content import build_content, to_json
from megatron_rlpt.reports.markdown import render_markdown
from megatron_rlpt.reports.page import render_page

PAGE_FILE, MARKDOWN_FILE, JSON_FILE = "report.html", "report.md", "report.json"


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Report on one run folder, or compare several; return the path of the page.

    Each file appears complete or not at all and replaces that of an earlier report. Run folders are only read.

    Args:
        folders: of runs, or of evaluations.
        out: folder to write to, created if missing; by default the folder of the only run.

    Raises:
        ConfigError: several runs without ``out``, or ``out`` is not writable.
        DataError: a folder holds nothing to report on, or cannot be read.
        CheckpointError: the disk is full.
    """
    if out is None and len(folders) > 1:
        raise ConfigError("a report of several runs belongs to none of them; name a folder for it with --out")
    runs = collect_runs(folders)
    content = build_content(runs)
    target = folders[0] if out is None else out
    page = render_page(content, runs)
    texts = {
        MARKDOWN_FILE: render_markdown(content),
        JSON_FILE: json.dumps(finite(to_json(content)), indent=2, allow_nan=False) + "\n",
        PAGE_FILE: page,
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomically(target / name, text)
    except OSError as error:
        kind = CheckpointError if is_disk_full(error) else ConfigError
        raise kind(
            f"the report cannot be written to {target} ({error.strerror}); name another folder with --out"
        ) from None
    return target / PAGE_FILE
