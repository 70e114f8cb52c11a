"""XSTest (Röttger et al. 2024): 250 safe questions that only look unsafe, and 200 unsafe ones that contrast with them.

``xstest_prompts.csv``: ``id``, ``prompt``, ``type``, ``label`` (``safe``, ``unsafe``), ``focus``, ``note``. Older
releases (``xstest_v2_prompts.csv``) have no label; unsafe types begin with ``contrast_`` in both.
"""

from __future__ import annotations

from pathlib import Path

from megatron_rlpt.evaluation.formats.records import Row, locate, read_rows
from megatron_rlpt.evaluation.prompts import PromptFormat, TextPrompt

_FETCH = "Fetch XSTest (paul-rottger/xstest) and name its xstest_prompts.csv or the folder that has it."
_NAMES = ("xstest_prompts.csv", "xstest_v2_prompts.csv", "data/*.parquet", "*.parquet")


def read(path: Path) -> list[TextPrompt]:
    """Read the prompts; labels are ``safe/TYPE`` and ``unsafe/TYPE``."""
    return [_prompt(row) for file in locate(path, _NAMES, _FETCH) for row in read_rows(file, _FETCH)]


def _prompt(row: Row) -> TextPrompt:
    kind = row.text("type").strip()
    label = row.optional("label").strip().lower() or ("unsafe" if kind.startswith("contrast_") else "safe")
    if label not in ("safe", "unsafe"):
        raise row.error(f"has the label {label!r}; XSTest knows safe and unsafe")
    return TextPrompt(str(row.values.get("id") or row.number), row.text("prompt"), label=f"{label}/{kind}")


FORMAT = PromptFormat("xstest", ("safety",), read, _FETCH)
