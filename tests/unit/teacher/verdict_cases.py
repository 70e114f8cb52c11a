"""Replies of a judge as they should not be, and an oracle that says which of them is a verdict after all."""

from __future__ import annotations

import json
import random

_WORDS = (
    "1",
    "2",
    "safe",
    "unsafe",
    "none",
    "possible",
    "definite",
    "Safe",
    "NONE",
    "3",
    "0",
    "nan",
    "",
    "1 or 2",
    "tie",
)
_VALUES = (
    *map(json.dumps, _WORDS * 2),
    *("1", "2", "01", "1.0", "2.0", "1e0", "-1", "9" * 400, "1e999", "NaN", "Infinity", "-Infinity", "\u0661"),
    *("true", "false", "null", "[]", '["1"]', "{}", '{"verdict": "1"}', "'1'", '"\\u0031"', '"safe'),
)
_KEYS = ('"Verdict"', "'verdict'", "verdict", '"\\u0076erdict"', '"label"', '"verdict "', '"reasoning"')
_REASONINGS = ('"a\nb"', '"\\x"', '"\\u12"', '"{\\"verdict\\": \\"1\\"}"', '"\ttab"', "null", "1", '"open', "[]")
_SPACES = ("", "", "", " ", "\n", "\t ", "\r\n", "\u00a0", "\u2028", "\x00")
_FRAGMENTS = (
    *("{", "}", "[", "]", '"', "\\", ":", ",", "\n", " ", "```", "```json\n", "verdict", '"verdict"', '"reasoning"'),
    *("VERDICT: 1", "1", "2", "safe", "NaN", "\x00", "\ud800", "\U0001f600", "\u2028", "<think>", "</think>"),
)
_LONG = ("{" * 3000, "[" * 3000, '{"a":' * 2000, "}" * 3000, '"' * 1000, "\n{" * 1000)


def make_reply(seed: int) -> str:
    """A reply drawn from ``seed``: verdicts, what is nearly one, and pieces of both, between other text."""
    draw = random.Random(seed)
    pieces = [_piece(draw) for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 4)))]
    return draw.choice(("", "\n", "\n")).join(pieces)


def _piece(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.7:
        text = _object(draw)
        wrappings = (
            *(text,) * 6,
            *(
                f"\n{text}",
                f"  {text} ",
                f"```json\n{text}\n```",
                f"```{text}```",
                f'{{"answer": {text}}}',
                f"[{text}]",
            ),
            *(json.dumps(text), text[: draw.randrange(len(text))], text[draw.randrange(len(text)) :], f"{text}."),
        )
        return draw.choice(wrappings)
    if kind < 0.85:
        return "".join(draw.choices(_FRAGMENTS, k=draw.randrange(12)))
    return draw.choice(_LONG) if kind < 0.87 else _text(draw)


def _object(draw: random.Random) -> str:
    """Nearly, or really, what a judge should answer."""
    pairs = [('"reasoning"', _reasoning(draw)), (_key(draw), draw.choice(_VALUES))]
    shape = draw.random()
    if shape < 0.05:
        pairs.reverse()
    elif shape < 0.1:
        pairs.append((_key(draw), draw.choice(_VALUES)))
    elif shape < 0.15:
        pairs.pop(0)
    elif shape < 0.2:
        pairs.insert(draw.randrange(3), ('"confidence"', draw.choice(_VALUES)))
    elif shape < 0.22:
        pairs.clear()
    space = lambda: draw.choice(_SPACES[:7] if shape < 0.9 else _SPACES)  # noqa: E731
    return f"{{{space()}" + f"{space()},{space()}".join(f"{k}{space()}:{space()}{v}" for k, v in pairs) + f"{space()}}}"


def _key(draw: random.Random) -> str:
    return '"verdict"' if draw.random() < 0.8 else draw.choice(_KEYS)


def _reasoning(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.6:
        return json.dumps(_text(draw), ensure_ascii=kind < 0.3)
    return draw.choice(_REASONINGS) if kind < 0.8 else f'"{_text(draw)}"'


def _text(draw: random.Random) -> str:
    """Any code points, surrogates and control characters included."""
    top = draw.choice((128, 128, 256, 0x110000))
    return "".join(chr(draw.randrange(top)) for _ in range(draw.randrange(20)))


def literal_verdict(text: str, finish_reason: str) -> str | None:
    """The verdict that the last object of ``text`` literally holds, found from behind by a JSON parser.

    Every line that begins with a brace is tried; the answer is what Python's own parser reads from there to the end, if
    it is exactly two keys in the right order, spelt without escapes, with text and a word or a whole number.
    """
    if finish_reason != "stop":
        return None
    blank = " \t\r\n"
    text = text.strip(blank)
    if text.endswith("```"):
        text = text[:-3].rstrip(blank)
    position = len(text)
    while (position := text.rfind("{", 0, position)) >= 0:
        line_start = text.rfind("\n", 0, position) + 1
        if text[line_start:position].strip(" \t"):
            continue
        try:
            pairs = json.loads(text[position:], object_pairs_hook=list, parse_int=lambda digits: ("int", digits))
        except (ValueError, RecursionError):
            continue
        if not isinstance(pairs, list) or [pair[0] for pair in pairs if isinstance(pair, tuple)] != [
            "reasoning",
            "verdict",
        ]:
            return None
        (_, reasoning), (_, verdict) = pairs
        first = text[position + 1 :].lstrip(blank)
        value = text[:-1].rstrip(blank)
        if not isinstance(reasoning, str) or not first.startswith('"reasoning"'):
            return None
        word, literal = (verdict[1],) * 2 if isinstance(verdict, tuple) else (verdict, f'"{verdict}"')
        if not isinstance(word, str) or (isinstance(verdict, tuple) and verdict[0] != "int"):
            return None
        key = value.removesuffix(literal).rstrip(blank + ":")
        return word.lower() if value.endswith(literal) and key.endswith('"verdict"') else None
    return None
