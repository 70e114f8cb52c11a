"""Continuations to read side by side."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rlpt.evaluation.comparison import Comparison, Continuations, Decoding
from megatron_rlpt.tokens.tokenizer import TextTokens


def build_examples(
    prefixes: Sequence[Sequence[int]],
    originals: Sequence[Sequence[int]],
    policies: Mapping[str, Continuations],
    comparison: Comparison,
    text: TextTokens,
    count: int,
) -> list[dict[str, Any]]:
    """The first ``count`` held-out prefixes, not the best ones, with what every policy wrote.

    Each has ``prefix``, ``original`` and one text per policy (greedy), the same under ``sampled`` (first sample), and
    the judge's scores under ``reward``.
    """
    examples = []
    for index in range(min(count, len(prefixes))):
        prefix = prefixes[index]

        def shown(tokens: Sequence[int], prefix: Sequence[int] = prefix) -> str:
            return readable(text.text_of(tokens, prefix))

        texts = {
            mode: {name: shown(written.takes(mode)[0][index]) for name, written in policies.items()}
            for mode in Decoding
        }
        examples.append(
            {
                "prefix": readable(text.text_of(prefix, within=True)),
                "original": shown(originals[index]),
                **texts[Decoding.GREEDY],
                "sampled": texts[Decoding.SAMPLED],
                "reward": {
                    mode.value: {name: comparison.rewards[name][mode][0][index] for name in policies}
                    for mode in Decoding
                },
            }
        )
    return examples


def readable(text: str) -> str:
    """``text`` without what a terminal or a browser would act on instead of show.

    Control characters (escape sequences for terminals), direction overrides (Unicode "format" characters) and lone
    surrogates (half a character, which cannot be written as UTF-8) become the replacement character. Newlines and
    tabs stay (a Windows line end becomes a newline), as do the joiners that scripts and emoji need.
    """
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if _acts(character) else character for character in text.replace("\r\n", "\n")
    )


def _acts(character: str) -> bool:
    if character in "\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}\N{SOFT HYPHEN}":
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Cs")
