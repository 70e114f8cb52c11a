"""Text and tokens without a tokenizer, for tests of their users."""

from __future__ import annotations

from collections.abc import Callable, Sequence


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


NUMBERS = FakeText(lambda tokens: "-".join(map(str, tokens)))
"""Shows tokens as numbers."""
