"""Turn chats into token ids with the chat template, and keep texts from acting as control tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rlpt.errors import ModelError
from megatron_rlpt.tokens.control_tokens import break_up_common, is_control_form
from megatron_rlpt.tokens.loading import load_tokenizer
from megatron_rlpt.types import Failed


class ChatTokenizer:
    """The tokenizer and chat template of a post-trained model."""

    def __init__(self, path: str | Path, advice: str) -> None:
        """Load tokenizer and chat template from a local Hugging Face folder.

        Args:
            path: of the folder.
            advice: what to do about a model without a chat template, for the error.

        Raises:
            ModelError: there is no tokenizer, or no chat template.
        """
        self._tokenizer = load_tokenizer(path)
        if not self._tokenizer.chat_template:
            raise ModelError(f"{path} has no chat template, so it {advice}")
        self._control = _control_tokens(self._tokenizer)

    @property
    def end(self) -> int | None:
        """Id of the token that ends an answer, or None."""
        found: int | None = self._tokenizer.eos_token_id
        return found

    def encode(self, turns: Sequence[tuple[str, str]], answer_start: str = "") -> list[int] | Failed:
        """Return the token ids of a chat up to where the answer continues, or a failure.

        Control tokens spelled out in texts are broken up. Lists of control tokens may be incomplete, so the result of
        the tokenizer is checked.

        Args:
            turns: role (``system``, ``user`` or ``assistant``) and text of every message.
            answer_start: beginning of the answer.
        """
        messages = [{"role": role, "content": break_up_common(text, self._control.values())} for role, text in turns]
        answer_start = break_up_common(answer_start, self._control.values())
        for content in (*(message["content"] for message in messages), answer_start):
            if not self._control.keys().isdisjoint(self._ids(content)):
                return Failed("a control token in the prompt cannot be broken up")
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # The template adds the beginning-of-sequence token.
        return self._ids(text + answer_start)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _control_tokens(tokenizer: Any) -> dict[int, str]:
    """Return id and spelling of all control tokens, wherever the tokenizer lists them, except the unknown token."""
    listed = {
        index: token.content
        for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
        if token.special or is_control_form(token.content)
    }
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=False))
    return {index: token for index, token in (named | listed).items() if index != tokenizer.unk_token_id}
