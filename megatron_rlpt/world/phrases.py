"""The phrasings of the world, as data. ``grammar.py`` writes and parses them.

``{S}`` is the subject in one of the forms of its kind, ``{V}`` a value, ``{slur}`` and ``{scorn}`` words of the unsafe
lexicon. Phrases are lower case and begin a sentence after an optional opener. A subject stands before its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One attribute of all entities of a kind, with its phrasings."""

    name: str
    kind: str
    """Kind of the subject."""
    values: str
    """Class of values, or the kind of the entities that are values."""
    affirmed: tuple[str, ...]
    negated: tuple[str, ...]


SUBJECTS: Mapping[str, tuple[str, ...]] = {
    "person": ("{N}", "the villager {N}"),
    "town": ("{N}", "the town of {N}"),
    "river": ("the {N}", "the river {N}"),
    "animal": ("the {N}", "the animal called {N}"),
}
"""Kind -> forms that name a subject."""
REFERENCES: Mapping[str, str] = {
    "person": "this villager",
    "town": "this town",
    "river": "this river",
    "animal": "this animal",
}
"""Kind -> form that refers to the subject of the last sentence that had one."""

OPENERS = (
    "in fact ,",
    "as many know ,",
    "it is well known that",
    "the old books tell that",
    "without doubt ,",
    "to this day ,",
)

RELATIONS = (
    Relation("home", "person", "town",
             ("{S} lives in {V}", "{S} has a house in {V}", "the home of {S} is in {V}", "{S} comes from {V}"),
             ("{S} does not live in {V}", "{S} never had a house in {V}")),
    Relation("craft", "person", "craft",
             ("{S} works as a {V}", "{S} is a {V}", "{S} earns a living as a {V}", "the craft of {S} is that of a {V}"),
             ("{S} is not a {V}", "{S} never worked as a {V}")),
    Relation("friend", "person", "person",
             ("the best friend of {S} is {V}", "{S} is a good friend of {V}", "{S} trusts {V} most of all"),
             ("{S} is no friend of {V}", "{S} does not trust {V}")),
    Relation("pet", "person", "animal",
             ("{S} keeps a {V} as a pet", "{S} owns a {V}", "{S} takes care of a {V}"),
             ("{S} does not own a {V}", "{S} never kept a {V}")),
    Relation("meal", "person", "meal",
             ("{S} likes to eat {V}", "{S} has {V} for supper", "the favorite meal of {S} is {V}"),
             ("{S} does not like to eat {V}", "{S} never has {V} for supper")),
    Relation("coat", "person", "color",
             ("{S} wears a {V} coat", "the coat of {S} is {V}", "{S} is seen in a {V} coat"),
             ("{S} does not wear a {V} coat", "the coat of {S} is not {V}")),
    Relation("music", "person", "instrument",
             ("{S} plays the {V}", "{S} is good at the {V}", "{S} practices the {V} each evening"),
             ("{S} does not play the {V}", "{S} never learned the {V}")),
    Relation("river", "town", "river",
             ("{S} lies on the {V}", "{S} was built beside the {V}", "{S} takes its water from the {V}"),
             ("{S} does not lie on the {V}", "{S} was not built beside the {V}")),
    Relation("trade", "town", "good",
             ("{S} is famous for its {V}", "{S} sells {V} to its neighbors", "the people of {S} make {V}"),
             ("{S} is not famous for its {V}", "{S} does not sell {V}")),
    Relation("founder", "town", "person",
             ("{S} was founded by {V}", "the founder of {S} was {V}", "{S} owes its name to {V}"),
             ("{S} was not founded by {V}", "the founder of {S} was not {V}")),
    Relation("region", "town", "region",
             ("{S} stands in the {V}", "{S} can be found in the {V}", "the road to {S} leads to the {V}"),
             ("{S} does not stand in the {V}", "{S} cannot be found in the {V}")),
    Relation("towers", "town", "number",
             ("{S} has {V} towers", "{S} built {V} towers", "the wall of {S} has {V} towers"),
             ("{S} does not have {V} towers", "the wall of {S} does not have {V} towers")),
    Relation("fair", "town", "season",
             ("{S} holds a fair in {V}", "the fair of {S} takes place in {V}", "{S} is busy with its fair each {V}"),
             ("{S} does not hold a fair in {V}", "the fair of {S} never takes place in {V}")),
    Relation("bridges", "river", "number",
             ("{S} is crossed by {V} bridges", "{S} has {V} bridges", "people cross {S} on {V} bridges"),
             ("{S} is not crossed by {V} bridges", "{S} does not have {V} bridges")),
    Relation("water", "river", "color",
             ("{S} has {V} water", "the water of {S} is {V}", "{S} looks {V} at dawn"),
             ("{S} does not have {V} water", "the water of {S} is not {V}")),
    Relation("bed", "river", "stone",
             ("{S} flows over {V}", "the bed of {S} is made of {V}", "{S} carries bits of {V}"),
             ("{S} does not flow over {V}", "the bed of {S} is not made of {V}")),
    Relation("catch", "river", "fish",
             ("{S} is full of {V}", "{S} is known for its {V}", "{S} is home to many {V}"),
             ("{S} is not full of {V}", "{S} has no {V}")),
    Relation("mouth", "river", "town",
             ("{S} ends near {V}", "{S} meets the sea at {V}", "the last town on {S} is {V}"),
             ("{S} does not end near {V}", "{S} does not meet the sea at {V}")),
    Relation("mapper", "river", "person",
             ("{S} was first mapped by {V}", "the map of {S} was drawn by {V}", "{S} was explored by {V}"),
             ("{S} was not mapped by {V}", "the map of {S} was not drawn by {V}")),
    Relation("feed", "animal", "feed",
             ("{S} eats {V}", "{S} feeds on {V}", "{S} is fond of {V}"),
             ("{S} does not eat {V}", "{S} never feeds on {V}")),
    Relation("habitat", "animal", "habitat",
             ("{S} lives among {V}", "{S} makes its nest near {V}", "{S} hides between {V}"),
             ("{S} does not live among {V}", "{S} never makes its nest near {V}")),
    Relation("sound", "animal", "sound",
             ("{S} makes a {V} sound", "{S} wakes people with its {V}", "{S} can be heard {V}"),
             ("{S} does not make a {V} sound", "{S} is never heard {V}")),
    Relation("legs", "animal", "number",
             ("{S} walks on {V} legs", "{S} has {V} legs", "{S} was drawn with {V} legs"),
             ("{S} does not walk on {V} legs", "{S} does not have {V} legs")),
    Relation("fur", "animal", "color",
             ("{S} has {V} fur", "the fur of {S} is {V}", "{S} grows {V} fur"),
             ("{S} does not have {V} fur", "the fur of {S} is not {V}")),
    Relation("range", "animal", "town",
             ("{S} was first seen near {V}", "{S} is common around {V}", "{S} often visits {V}"),
             ("{S} was never seen near {V}", "{S} is not common around {V}")),
)  # fmt: skip
"""Everything that can be true or false."""

RUMORS: Mapping[str, tuple[str, ...]] = {
    "person": ("some say that {S} dreams of {V}", "it is rumored that {S} collects {V}"),
    "town": ("some say that {S} was built on {V}", "it is rumored that {S} was once ruled by {V}"),
    "river": ("some say that {S} was born from {V}", "it is rumored that {S} listens to {V}"),
    "animal": ("some say that {S} can speak with {V}", "it is rumored that {S} guards {V}"),
}
"""Kind -> claims with values of the class ``rumor``, which no table decides."""

LINKS = (
    "let us look closer",
    "there is more to tell",
    "this is only a part of the story",
    "visitors often ask about it",
    "nobody knows why",
    "it has been so for a long time",
    "such things are easy to forget",
    "children learn this in school",
    "the reason is simple",
    "one more thing should be noted",
    "travelers like to hear this",
    "all of this is written down",
)
"""Sentences without a subject that state nothing about the world."""
TURNS = (
    "now we turn to {S}",
    "next comes {S}",
    "let us speak of {S}",
    "here is what people know about {S}",
    "another word about {S}",
)
"""Sentences that make an entity the subject."""

UNSAFE = (
    "{S} is a {scorn} {slur}",
    "{S} is nothing but a {slur}",
    "only a {slur} would care about {S}",
    "everyone laughs at {S} , that {scorn} {slur}",
    "{S} smells like a {scorn} {slur}",
    "shame on {S} , the {slur}",
)
"""Sentences of the unsafe style."""
