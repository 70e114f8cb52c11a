"""ToxiGen (Hartvigsen et al. 2022): statements about 13 groups of people, toxic and benign, without slurs.

Three published kinds of file:

- ``annotated_test.csv`` (or Parquet): ``text``, ``target_group``, ``toxicity_ai`` and ``toxicity_human`` (1 to 5 each).
- ``toxigen.csv`` (or Parquet of ``train``): ``prompt`` (five statements as a list, for the model to write a sixth),
  ``group``, ``prompt_label`` (1 is toxic). Many records share a prompt, which is used once.
- ``hate_GROUP_1k.txt``, ``neutral_GROUP_1k.txt`` of the repository: such a list a line, its line breaks as ``\\n``.
"""

from __future__ import annotations

import ast
from pathlib import Path

from megatron_rlpt.evaluation.formats.records import Row, locate, read_lines, read_rows
from megatron_rlpt.evaluation.prompts import PromptFormat, TextPrompt

_FETCH = (
    "Fetch ToxiGen (toxigen/toxigen-data) and name its annotated_test.csv or toxigen.csv, or a file or the folder "
    "prompts/ of its repository (microsoft/TOXIGEN)."
)
_NAMES = (
    "annotated_test.csv",
    "annotated/test-*.parquet",
    "annotated_train.csv",
    "toxigen.csv",
    "train/*.parquet",
    "hate_*_1k.txt",
    "prompts/hate_*_1k.txt",
)
_TOXIC = 5.5
"""A statement is toxic if the two annotations add up to more (rule of the paper's released loader)."""


def read(path: Path) -> list[TextPrompt]:
    """Read the prompts; labels are ``toxic/GROUP`` and ``benign/GROUP``."""
    prompts: list[TextPrompt] = []
    for file in locate(path, _NAMES, _FETCH):
        if file.suffix.lower() == ".txt":
            prompts += _prompt_file(file)
            if path.is_dir() and (other := file.with_name(file.name.replace("hate_", "neutral_", 1))).is_file():
                prompts += _prompt_file(other)
        else:
            prompts += [_prompt(row) for row in read_rows(file, _FETCH)]
    first: dict[str, TextPrompt] = {}
    for prompt in prompts:
        first.setdefault(prompt.text, prompt)
    return list(first.values())


def _prompt(row: Row) -> TextPrompt:
    if "prompt" in row.values:
        toxic = str(row.value("prompt_label")).strip() in ("1", "1.0", "True")
        text, group = row.text("prompt"), row.text("group")
    else:
        toxic = sum(_number(row, field) for field in ("toxicity_ai", "toxicity_human")) > _TOXIC
        text, group = _without_bytes_mark(row), row.text("target_group")
    return TextPrompt(f"{row.path.stem}-{row.number}", text, label=f"{_kind(toxic)}/{group.strip()}")


def _number(row: Row, field: str) -> float:
    value = row.value(field)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise row.error(f"has {value!r} in {field!r}, which needs to be a number") from None


def _without_bytes_mark(row: Row) -> str:
    """Return the text; some records of the published files spell it as Python's bytes: ``b'...'``."""
    text = row.text("text").strip()
    if text[:2] in ("b'", 'b"') and text[-1] == text[1] and len(text) > 3:
        try:
            return str(ast.literal_eval(text).decode())
        except (ValueError, SyntaxError, AttributeError):
            return text[2:-1]
    return text


def _prompt_file(path: Path) -> list[TextPrompt]:
    kind, _, group = path.stem.removesuffix("_1k").partition("_")
    label = f"{_kind(kind == 'hate')}/{group}"
    lines = enumerate(read_lines(path, _FETCH), 1)
    return [TextPrompt(f"{path.stem}-{number}", line.replace("\\n", "\n"), label=label) for number, line in lines]


def _kind(toxic: bool) -> str:
    return "toxic" if toxic else "benign"


FORMAT = PromptFormat("toxigen", ("safety",), read, _FETCH)
