"""Text and tokens without a tokenizer, for tests of their users."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

from megatron_rlpt.tokens.tokenizer import Vocabulary


class FakeText:
    """``TextTokens`` from two functions; by default a token is a character. ``control`` lists the control tokens."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str] = lambda tokens: "".join(map(chr, tokens)),
        encode: Callable[[str], list[int]] = lambda text: list(map(ord, text)),
        control: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._encode = encode
        self._control = set(control)

    def text_of(self, tokens: Sequence[int], before: Sequence[int] = (), *, within: bool = False) -> str:
        return self._decode(tokens)

    def continue_with(self, before: Sequence[int], text: str, control: Sequence[int] = ()) -> list[int]:
        return self._encode(text)

    def whole_characters(self, tokens: Sequence[int], before: Sequence[int] = ()) -> int:
        return len(tokens)

    def is_blank(self, tokens: Sequence[int]) -> bool:
        return not self._decode([token for token in tokens if token not in self._control]).strip()

    def control_in(self, tokens: Sequence[int]) -> dict[int, str]:
        return {token: self._decode([token]) for token in tokens if token in self._control}


class FakeTokenizer(FakeText):
    """A tokenizer of ``size`` tokens by the same two functions."""

    def __init__(self, size: int, decode: Callable[[Sequence[int]], str], encode: Callable[[str], list[int]]) -> None:
        super().__init__(decode, encode)
        self.vocabulary = Vocabulary(size, frozenset(), None, decode)

    def encode(self, text: str, control_tokens: bool = False) -> list[int]:
        return self._encode(text)


NUMBERS = FakeText(lambda tokens: "-".join(map(str, tokens)))
"""Shows tokens as numbers."""

DIGITS = FakeTokenizer(10, lambda tokens: "".join(map(str, tokens)), lambda text: list(map(int, text)))
"""One token per character, a digit."""
BYTES = FakeTokenizer(256, lambda tokens: bytes(tokens).decode(), lambda text: list(text.encode()))
"""One token per byte."""


def common_start(*texts: str) -> str:
    """Return the beginning that all ``texts`` share."""
    return "".join(letters[0] for letters in takewhile(lambda one: len(set(one)) == 1, zip(*texts, strict=False)))
