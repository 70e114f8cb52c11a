"""Turn requests into token ids with the chat template, and keep texts from acting as control tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rlpt.errors import ModelError
from megatron_rlpt.teacher.generator import Message, Request
from megatron_rlpt.tokens.control_tokens import break_up_common, is_control_form
from megatron_rlpt.tokens.loading import load_tokenizer
from megatron_rlpt.types import Failed


class ChatTokenizer:
    """The tokenizer and chat template of a teacher."""

    def __init__(self, path: Path) -> None:
        """Load tokenizer and chat template from a local Hugging Face folder.

        Raises:
            ModelError: there is no tokenizer, or no chat template.
        """
        self._tokenizer = load_tokenizer(path)
        if not self._tokenizer.chat_template:
            raise ModelError(
                f"{path} has no chat template, so it cannot judge or rewrite by prompt; set teacher.path to a "
                "post-trained (instruct) model, or use teacher.judge=likelihood and candidates.rewrite=false"
            )
        self._control = _control_tokens(self._tokenizer)

    def tokens(self, request: Request) -> list[int] | Failed:
        """Return the token ids of the request's prompt, or a failure.

        Control tokens spelled out in texts are broken up. Lists of control tokens may be incomplete, so the result of
        the tokenizer is checked.
        """
        if not request.prompt or isinstance(request.prompt[0], int):
            return [token for token in request.prompt if isinstance(token, int)]
        messages = [
            {"role": message.role, "content": break_up_common(message.content, self._control.values())}
            for message in request.prompt
            if isinstance(message, Message)
        ]
        answer_start = break_up_common(request.answer_start, self._control.values())
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
