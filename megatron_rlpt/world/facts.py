"""The world: invented entities, the hidden table of what is true about them, and the grammar that speaks of them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rlpt.errors import DataError, first_line
from megatron_rlpt.files import write_atomically
from megatron_rlpt.types import derive_seed
from megatron_rlpt.world.grammar import Grammar
from megatron_rlpt.world.lexicon import KINDS, VALUES, invent_names
from megatron_rlpt.world.phrases import RELATIONS, Relation

VERSION = "1"
"""Version of phrases and values: a world of another version has other sentences."""

_SHARES: Mapping[str, float] = {"person": 0.4, "town": 0.22, "river": 0.16, "animal": 0.22}
LEAST_ENTITIES = 16


def counts_of(entities: int) -> dict[str, int]:
    """Return kind -> number of entities, for ``entities`` (at least ``LEAST_ENTITIES``) in all."""
    counts = {kind: round(share * entities) for kind, share in _SHARES.items()}
    return counts | {"person": counts["person"] + entities - sum(counts.values())}


_RELATIONS = {kind: tuple(one for one in RELATIONS if one.kind == kind) for kind in KINDS}


class World:
    """Entities, facts and grammar. Equal seeds and counts give equal worlds."""

    def __init__(self, kinds: Mapping[str, str], table: Mapping[tuple[str, str], str]) -> None:
        """
        Args:
            kinds: name -> kind of every entity.
            table: (name, relation) -> value, for every entity and every relation of its kind.

        Raises:
            ValueError: a fact is missing, or its value is none that the relation can have.
        """
        self.kinds = dict(kinds)
        self.names = {kind: tuple(name for name, its in kinds.items() if its == kind) for kind in KINDS}
        self.grammar = Grammar(self.kinds)
        self._table = dict(table)
        for name, kind in self.kinds.items():
            for relation in _RELATIONS[kind]:
                value = self._table.get((name, relation.name))
                if value not in self.values(relation.values) or value == name:
                    raise ValueError(f"{relation.name} of {name} is {value!r}")

    @classmethod
    def make(cls, seed: int, counts: Mapping[str, int]) -> World:
        """Invent a world.

        Args:
            seed: of names and facts.
            counts: kind -> number of entities; at least 2 of each kind, so that there is something false to say.
        """
        rng = random.Random(derive_seed(seed, "world"))
        taken = set(Grammar({}).vocabulary)
        names = invent_names(sum(counts[kind] for kind in KINDS), rng, taken)
        kinds = dict(zip(names, (kind for kind in KINDS for _ in range(counts[kind])), strict=True))
        pools: dict[str, Sequence[str]] = {kind: [n for n in names if kinds[n] == kind] for kind in KINDS}
        pools |= VALUES
        return cls(
            kinds,
            {
                (name, relation.name): rng.choice([value for value in pools[relation.values] if value != name])
                for name in names
                for relation in _RELATIONS[kinds[name]]
            },
        )

    def values(self, group: str) -> Sequence[str]:
        """Return the words of a class of values, or the names of a kind."""
        return self.names[group] if group in self.names else VALUES[group]

    def relations(self, name: str) -> Sequence[Relation]:
        """Return everything that can be said about an entity."""
        return _RELATIONS[self.kinds[name]]

    def value(self, name: str, relation: Relation) -> str:
        """Return what is true."""
        return self._table[name, relation.name]

    def other_value(self, name: str, relation: Relation, rng: random.Random) -> str:
        """Return a value that is not true."""
        true = self.value(name, relation)
        return rng.choice([value for value in self.values(relation.values) if value not in (true, name)])

    def is_true(self, name: str, relation: Relation, value: str, negated: bool) -> bool:
        """Return whether a statement about an entity is true."""
        return (self.value(name, relation) == value) != negated

    @property
    def digest(self) -> str:
        """Digest of all facts and of the version of the phrases."""
        return hashlib.sha256(json.dumps(self._as_json(), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write the facts as JSON."""
        write_atomically(path, json.dumps(self._as_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> World:
        """Read a ``facts.json``, given as the file or its folder.

        Raises:
            DataError: it cannot be read, or is that of another version.
        """
        file = Path(path)
        file = file / "facts.json" if file.is_dir() else file
        advice = "make the world anew with rlpt world make"
        try:
            stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if (version := stored["version"]) != VERSION:
                raise DataError(f"{file} is a world of version {version}, this release has {VERSION}; {advice}")
            entities = stored["entities"]
            kinds = {name: entity["kind"] for name, entity in entities.items()}
            table = {(name, key): value for name, entity in entities.items() for key, value in entity["facts"].items()}
            return cls(kinds, table)
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}); give the facts.json of a world") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{file} is no table of facts ({first_line(error)}); {advice}") from None

    def _as_json(self) -> dict[str, Any]:
        entities = {
            name: {"kind": kind, "facts": {one.name: self.value(name, one) for one in _RELATIONS[kind]}}
            for name, kind in self.kinds.items()
        }
        return {"version": VERSION, "entities": entities}
