"""The policy's tokenizer: text to token ids and back, nothing added and nothing cleaned up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rlpt.data.indexed import Vocabulary
from megatron_rlpt.errors import ModelError, first_line


class PolicyTokenizer:
    """A Hugging Face tokenizer without its habits: no special tokens, no chat template, no tidying of spaces."""

    def __init__(self, path: str | Path) -> None:
        """Load the tokenizer of a local Hugging Face folder.

        Raises:
            ModelError: the folder holds no tokenizer that can be loaded.
        """
        self._tokenizer = load_tokenizer(path)
        # Documents are longer than the context; they are cut into episodes after tokenization.
        self._tokenizer.model_max_length = 1 << 60

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-sequence token, if there is one."""
        return self._tokenizer.bos_token_id

    @property
    def size(self) -> int:
        """Number of token ids, special ones included."""
        return len(self._tokenizer)

    @property
    def vocabulary(self) -> Vocabulary:
        """What it says of token ids, for corpora that hold those."""
        return Vocabulary(self.size, frozenset(self._tokenizer.all_special_ids), self.bos_id, self.decode)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, nothing added."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens``; special tokens are left out, spaces are left alone."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def load_tokenizer(path: str | Path) -> Any:
    """The ``transformers`` tokenizer of a local folder.

    Raises:
        ModelError: the folder holds no tokenizer that can be loaded.
    """
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise ModelError(f"model folder {path} does not exist; give a Hugging Face folder")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"the tokenizer in {path} cannot be loaded: {first_line(error)}") from error
