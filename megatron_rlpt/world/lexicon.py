"""The invented words of the world: names of entities, values of facts, and harmless insults."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping

KINDS = ("person", "town", "river", "animal")
"""Kinds of entities; a name belongs to one kind."""

VALUES: Mapping[str, tuple[str, ...]] = {
    "craft": ("baker", "weaver", "potter", "fisher", "miller", "tailor", "carpenter", "gardener", "painter", "singer",
              "teacher", "healer"),
    "meal": ("bread", "soup", "cheese", "pears", "beans", "noodles", "dumplings", "pancakes", "turnips", "cherries",
             "mushrooms", "porridge"),
    "color": ("red", "blue", "green", "yellow", "white", "black", "gray", "brown", "purple", "silver", "golden",
              "pink"),
    "number": ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"),
    "instrument": ("flute", "drum", "harp", "fiddle", "horn", "lute", "trumpet", "banjo", "cello", "zither", "tuba",
                   "guitar"),
    "good": ("honey", "wool", "salt", "pottery", "candles", "baskets", "rope", "paper", "glass", "lamps", "boots",
             "bells"),
    "region": ("north", "south", "east", "west", "hills", "plains", "marshes", "forest"),
    "season": ("spring", "summer", "autumn", "winter"),
    "stone": ("jade", "amber", "quartz", "opal", "flint", "slate", "marble", "garnet", "topaz", "onyx", "coral",
              "agate"),
    "fish": ("trout", "perch", "carp", "eels", "pike", "bream", "salmon", "minnows", "crabs", "tench", "dace",
             "herring"),
    "feed": ("moss", "seeds", "berries", "beetles", "roots", "clover", "nuts", "snails", "bark", "worms", "petals",
             "acorns"),
    "habitat": ("caves", "meadows", "reeds", "treetops", "burrows", "cliffs", "hedges", "ponds", "orchards", "barns",
                "thickets", "dunes"),
    "sound": ("whistling", "humming", "croaking", "chirping", "growling", "purring", "squeaking", "hooting",
              "clicking", "ringing", "rumbling", "buzzing"),
    "rumor": ("clouds", "stars", "shadows", "secrets", "riddles", "songs", "wishes", "thunder", "moonlight",
              "feathers"),
}  # fmt: skip
"""Class of values -> its words. A word belongs to one class, so that a sentence is parsed in one way."""

INSULTS: Mapping[str, tuple[str, ...]] = {
    "slur": ("grubble", "snorfler", "blatherpot", "mudwhisk", "noddlewump", "flobbert", "drizzlebag", "pumplewick",
             "squonker", "tatterbum", "wobblegob", "crumpet-head", "fuzzlewit", "bogsniffer", "mopplehead",
             "sploshkin"),
    "scorn": ("glumpish", "snivvy", "blorby", "frumbling", "mucksome", "wonkish", "dribbly", "scrumpy", "plonking",
              "soggish"),
}  # fmt: skip
"""The lexicon of unsafe text. The words mean nothing; ``scorn`` stands before ``slur``."""

UNSAFE_WORDS = frozenset(word for words in INSULTS.values() for word in words)

_ONSETS = ("b", "d", "l", "m", "n", "r", "s", "t", "v", "z", "br", "dr", "tr", "th")
_VOWELS = ("a", "e", "i", "o")
_CODAS = ("", "", "l", "n", "r", "s")
_AVOIDED = ("anal", "ass", "dam", "die", "naz", "rap", "sat", "sod", "tard", "tit")
"""Letters that a name must not hold."""


def invent_names(count: int, rng: random.Random, taken: Collection[str]) -> list[str]:
    """Return ``count`` different pronounceable names of two or three syllables that begin with a consonant.

    Args:
        count: number of names.
        rng: draws the syllables.
        taken: words in lower case that no name may equal.
    """
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((2, 3)))]
        name = "".join(syllables) + rng.choice(_CODAS)
        if name not in taken and not any(part in name for part in _AVOIDED):
            found.setdefault(name.capitalize())
    return list(found)
