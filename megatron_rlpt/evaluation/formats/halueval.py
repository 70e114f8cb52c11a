"""HaluEval (Li et al. 2023): questions, dialogues and documents, each with a right and a hallucinated answer.

One JSON Lines file a task (named ``.json``), or Parquet with the same fields:

- ``qa_data.json``: ``knowledge``, ``question``, ``right_answer``, ``hallucinated_answer``.
- ``dialogue_data.json``: ``knowledge``, ``dialogue_history``, ``right_response``, ``hallucinated_response``.
- ``summarization_data.json``: ``document``, ``right_summary``, ``hallucinated_summary``.
- ``general_data.json``: ``user_query``, ``chatgpt_response``, ``hallucination`` (yes or no): one answer.
"""

from __future__ import annotations

from pathlib import Path

from megatron_rlpt.evaluation.formats.records import Row, locate, read_rows
from megatron_rlpt.evaluation.prompts import PromptFormat, TextPrompt

_FETCH = (
    "Fetch HaluEval (RUCAIBox/HaluEval) and name its qa_data.json, dialogue_data.json, summarization_data.json or "
    "general_data.json, or the folder data/ for all of them."
)
_NAMES = ("*_data.json", "data/*_data.json", "*/*.parquet", "*.parquet")


def read(path: Path) -> list[TextPrompt]:
    """Read the prompts; labels are ``qa``, ``dialogue``, ``summarization`` and ``general``."""
    return [_prompt(row) for file in locate(path, _NAMES, _FETCH) for row in read_rows(file, _FETCH)]


def _prompt(row: Row) -> TextPrompt:
    if "question" in row.values:
        text = f"Knowledge: {row.text('knowledge').strip()}\nQuestion: {row.text('question').strip()}\nAnswer:"
        return _both(row, "qa", text, "answer")
    if "dialogue_history" in row.values:
        history = row.text("dialogue_history").strip()
        return _both(
            row, "dialogue", f"Knowledge: {row.text('knowledge').strip()}\n{history}\n[Assistant]:", "response"
        )
    if "document" in row.values:
        return _both(row, "summarization", f"Document: {row.text('document').strip()}\nSummary:", "summary")
    if "user_query" in row.values:
        return _general(row)
    raise row.error(f"is of no task of HaluEval: {_FETCH[:1].lower()}{_FETCH[1:-1]}")


def _both(row: Row, task: str, text: str, answer: str) -> TextPrompt:
    right, wrong = (row.text(f"{kind}_{answer}").strip() for kind in ("right", "hallucinated"))
    return TextPrompt(f"{task}-{row.number}", text, reference=f" {right}", other=f" {wrong}", label=task)


def _general(row: Row) -> TextPrompt:
    text = f"Question: {row.text('user_query').strip()}\nAnswer:"
    answer = f" {row.text('chatgpt_response').strip()}"
    verdict = row.text("hallucination", "hallucination_label").strip().lower()
    if verdict not in ("yes", "no"):
        raise row.error(f"has {verdict!r} in 'hallucination'; allowed: yes, no")
    right, wrong = (answer, "") if verdict == "no" else ("", answer)
    return TextPrompt(f"general-{row.number}", text, reference=right, other=wrong, label="general")


FORMAT = PromptFormat("halueval", ("factuality", "facts"), read, _FETCH)
