"""FActScore (Min et al. 2023): write the biography of a person, and check it against what is known of them.

- ``prompt_entities.txt`` (``labeled/`` or ``unlabeled/`` of the data): a name a line, as Wikipedia's title.
- ``ChatGPT.jsonl`` and others of the data: ``topic``; ``annotations`` with ``human-atomic-facts``, of which those
  labelled ``S`` (supported) become the reference.
- A knowledge source beside the file, if there is one, gives the reference of every name: ``enwiki-20230401.db`` as
  published (SQLite, table ``documents`` with ``title`` and ``text``), or your own ``knowledge.jsonl`` (``title``,
  ``text``: a text or a list of texts).
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rlpt.errors import DataError, first_line
from megatron_rlpt.evaluation.formats.records import Row, locate, read_lines, read_rows
from megatron_rlpt.evaluation.prompts import PromptFormat, TextPrompt

_FETCH = (
    "Fetch the data of FActScore (shmsw25/FActScore) and name a prompt_entities.txt or a .jsonl of it; put "
    "enwiki-20230401.db or a knowledge.jsonl beside it for references."
)
_NAMES = ("prompt_entities.txt", "unlabeled/prompt_entities.txt", "labeled/prompt_entities.txt", "*.jsonl")
_DATABASE = "enwiki-20230401.db"
_KNOWLEDGE = "knowledge.jsonl"
_SEPARATOR = "####SPECIAL####SEPARATOR####"
"""Between the passages of an article in the published database."""


def read(path: Path) -> list[TextPrompt]:
    """Read the prompts; the id is the name of the person."""
    (file, *_) = locate(path, _NAMES, _FETCH)
    if file.suffix.lower() == ".txt":
        facts = dict.fromkeys(read_lines(file, _FETCH), "")
    else:
        facts = {row.text("topic").strip(): _supported(row) for row in read_rows(file, _FETCH)}
    known = _known(file.parent, list(facts))
    return [
        TextPrompt(
            name, f"Question: Tell me a bio of {name}.\nAnswer:", reference=_spaced(known.get(name) or supported)
        )
        for name, supported in facts.items()
    ]


def _spaced(text: str) -> str:
    return f" {text}" if text else ""


def _supported(row: Row) -> str:
    """Return the facts that a person found supported, as one text."""
    facts: list[str] = []
    for sentence in row.values.get("annotations") or []:
        for fact in (sentence.get("human-atomic-facts") if isinstance(sentence, Mapping) else None) or []:
            if fact.get("label") == "S":
                facts.append(str(fact.get("text", "")).strip())
    return " ".join(facts)


def _known(folder: Path, names: list[str]) -> dict[str, str]:
    """Return the articles about ``names`` in the knowledge source beside the file."""
    if (own := folder / _KNOWLEDGE).is_file():
        wanted = set(names)
        return {row.text("title"): _joined(row) for row in read_rows(own, _FETCH) if row.text("title") in wanted}
    if not (database := folder / _DATABASE).is_file():
        return {}
    try:
        with contextlib.closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            found = [
                connection.execute("SELECT text FROM documents WHERE title = ?", (one,)).fetchone() for one in names
            ]
    except sqlite3.Error as error:
        raise DataError(f"{database} cannot be read: {first_line(error)}; fetch it again or remove it") from None
    return {name: _article(row[0]) for name, row in zip(names, found, strict=True) if row}


def _joined(row: Row) -> str:
    text: Any = row.value("text")
    return " ".join(row.texts("text")) if isinstance(text, list) else row.text("text")


def _article(text: str) -> str:
    passages = [part.replace("<s>", "").replace("</s>", "").strip() for part in text.split(_SEPARATOR)]
    return " ".join(passages)


FORMAT = PromptFormat("factscore", ("factuality", "facts"), read, _FETCH)
