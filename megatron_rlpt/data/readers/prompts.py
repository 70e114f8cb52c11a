"""Read prompts with known answers: records that a policy answers, instead of documents that it continues.

    {"prompt": "Which continuation is better? ...", "answer": "{\\"verdict\\": \\"1\\"}", "label": {"verdict": "1"}}

``prompt`` is one message of a user or a list of messages with ``role`` and ``content``. ``answer_start`` begins the
answer for the policy. ``answer`` is a right answer to train on, if there is one; ``label`` is what a reward needs to
know. The chat template of the policy's tokenizer turns them into tokens, as a server of the trained model would.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from megatron_rlpt.data.readers.documents import MAX_RECORD_BYTES, BadRecord, Document, excerpt_of
from megatron_rlpt.data.readers.files import CorpusFiles
from megatron_rlpt.data.readers.jsonl import JsonlReader
from megatron_rlpt.errors import ModelError
from megatron_rlpt.tokens.chat_tokenizer import ChatTokenizer
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer, Vocabulary
from megatron_rlpt.types import Failed

_KNOWN = ("prompt", "answer_start", "answer", "label")
_NO_CHAT = (
    "cannot be given prompts; set model.path to a post-trained (instruct) model, or give its tokenizer a chat_template"
)


class PromptEncoder:
    """Turns records into documents of tokens."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """
        Args:
            vocabulary: of the policy.

        Raises:
            ModelError: the policy's tokenizer has no chat template, or no token that ends an answer.
        """
        self._chat = ChatTokenizer(vocabulary.folder, _NO_CHAT)
        self._text = PolicyTokenizer(vocabulary.folder)
        if self._chat.end is None:
            raise ModelError(f"{vocabulary.folder} has no eos_token, so answers have no end; set it in its tokenizer")
        self._end = self._chat.end

    def document(self, record: object, identity: str, source: str, offset: int) -> Document | BadRecord:
        """Return the tokens of prompt and answer.

        Args:
            record: a decoded JSON object.
            identity: id of the document.
            source: file of the record.
            offset: number of the record in it.
        """
        found = self._encoded(record)
        if isinstance(found, str):
            return BadRecord(source, offset, found, excerpt_of(repr(record)))
        prompt, answer, label = found
        return Document(identity, "", array("i", [*prompt, *answer]), len(prompt), label)

    def _encoded(self, record: object) -> tuple[list[int], list[int], str] | str:
        """Return tokens of prompt and answer, and the label; or what is wrong with the record."""
        if not isinstance(record, Mapping):
            return f"not an object but {type(record).__name__}"
        start, answer, label = record.get("answer_start", ""), record.get("answer", ""), record.get("label", {})
        turns = _turns(record.get("prompt"))
        if isinstance(turns, str):
            return turns
        if not isinstance(start, str) or not isinstance(answer, str):
            return "'answer' or 'answer_start' is not a string"
        if not isinstance(label, Mapping):
            return f"'label' is {type(label).__name__}, not an object"
        if unknown := sorted(set(record) - set(_KNOWN) - {"id"}):
            return f"unknown field {unknown[0]!r} (allowed: id, {', '.join(_KNOWN)})"
        prompt = self._chat.encode(turns, start)
        if isinstance(prompt, Failed):
            return prompt.reason
        if not prompt:
            return "the prompt has no tokens"
        answered = [*self._text.continue_with(prompt, answer), self._end] if answer else []
        return prompt, answered, json.dumps(label, sort_keys=True)


class PromptReader(JsonlReader):
    """Reads one prompt per line of JSON Lines, or one per element of a JSON array."""

    def __init__(self, files: CorpusFiles, encoder: PromptEncoder, limit: int = MAX_RECORD_BYTES) -> None:
        super().__init__(files, None, limit)
        self._encoder = encoder

    @override
    def _document(self, value: object, identity: str, path: str, number: int) -> Document | BadRecord:
        return self._encoder.document(value, identity, path, number)


def _turns(prompt: object) -> Sequence[tuple[str, str]] | str:
    """Return role and text of every message, or what is wrong with them."""
    if isinstance(prompt, str):
        return [("user", prompt)] if prompt.strip() else "'prompt' is empty"
    if not isinstance(prompt, Sequence) or not prompt:
        return "no 'prompt' that is a string or a list of messages"
    turns: list[tuple[str, str]] = []
    for message in prompt:
        parts: tuple[Any, Any] = (
            (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        )
        if not all(isinstance(part, str) for part in parts):
            return "a message of 'prompt' has no 'role' or no 'content' that is a string"
        turns.append(parts)
    return turns
