"""N-grams that texts share, against sets of tuples of words."""

from __future__ import annotations

import random
import re

import pytest

from megatron_rlpt.data import ngrams
from megatron_rlpt.data.ngrams import NgramIndex, hashed


def reference(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"[^\W_]+", text.casefold())
    return {tuple(words[start : start + n]) for start in range(len(words) - n + 1)}


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    marks = (" ", ", ", "\n", "_", "-")
    return [
        "".join(draw.choice("aBcdÄ") + draw.choice(marks) for _ in range(draw.randint(0, 40))) for _ in range(count)
    ]


@pytest.mark.parametrize("n", [1, 3, 5])
def test_every_shared_ngram_is_counted_once(n):
    mine, others = texts(40, 1), texts(40, 2)
    index = NgramIndex(mine, n)
    assert index.counts.tolist() == [len(reference(text, n)) for text in mine]
    found = {}
    for words in hashed(others):
        found |= {(int(a), int(b)): int(count) for a, b, count in zip(*index.compare(words), strict=True)}
    expected = {
        (a, b): len(shared)
        for a, other in enumerate(others)
        for b, text in enumerate(mine)
        if (shared := reference(other, n) & reference(text, n))
    }
    assert found == expected
    anywhere = set().union(*(reference(other, n) for other in others))
    assert index.seen().tolist() == [len(reference(text, n) & anywhere) for text in mine]


def test_parts_of_a_long_text_lose_nothing(monkeypatch):
    long = " ".join(str(number) for number in range(4000))
    monkeypatch.setattr(ngrams, "_BATCH", 5000)
    monkeypatch.setattr(ngrams, "_SEAM", 200)
    ngrams._powers.cache_clear()
    try:
        index = NgramIndex([long], 13)
        (words, *more) = hashed(["and", long])
        assert more
        shared = [index.compare(part)[2].sum() for part in (words, *more)]
    finally:
        ngrams._powers.cache_clear()
    # A part may begin or end inside a number, which then is another word.
    assert 4000 - 12 <= index.counts[0] <= 4000 - 12 + 30 * len(shared)
    assert sum(shared) >= 4000 - 12


def test_scripts_without_spaces_have_words():
    assert [len(words.hashes) for words in hashed(["你好 world", "สวัสดี", "x_y"])] == [3 + 4 + 2]
    index = NgramIndex(["我们明天去北京看长城"], 5)
    (words,) = hashed(["他说我们明天去北京", "别的"])
    documents, prompts, shared = index.compare(words)
    assert (documents.tolist(), prompts.tolist(), shared.tolist()) == ([0], [0], [3])


def test_nothing_to_compare():
    assert NgramIndex([], 3).counts.tolist() == []
    index = NgramIndex(["a b"], 3)
    (words,) = hashed(["a b c d"])
    assert index.compare(words)[0].tolist() == []
    assert index.seen().tolist() == [0]
    assert list(hashed([""])) == []
