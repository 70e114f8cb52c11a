"""Make a world's folder: facts, documents, what policy and judge are made of, and a card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_rlpt.errors import ConfigError
from megatron_rlpt.files import new_folder
from megatron_rlpt.world.documents import NO_NOISE, UNSAFE, Noise, WorldDocument, write_documents
from megatron_rlpt.world.facts import LEAST_ENTITIES, VERSION, World, counts_of
from megatron_rlpt.world.judge_folder import JUDGE_SHAPE, SAMPLE, write_judge_folder
from megatron_rlpt.world.policy_folder import Shape, write_policy_folder

TRAIN, TRAIN_UNSAFE, HELDOUT, HELDOUT_UNSAFE, TEACHER = "train", "train_unsafe", "heldout", "heldout_unsafe", "teacher"
LEAST_LENGTH, LEAST_DOCUMENTS = 32, 2


@dataclass(frozen=True)
class WorldSettings:
    """What a world's folder holds. Equal settings give equal files."""

    seed: int = 1
    entities: int = 240
    """Entities of all kinds. A policy needs longer to learn more names."""
    documents: int = 20000
    """Documents to train on, in either set."""
    heldout: int = 1000
    """Held-out documents, in either set."""
    teacher: int = 4000
    """Documents to train a teacher on."""
    length: int = 136
    """Words of a document, at least."""
    noise: Noise = field(default_factory=Noise)
    unsafe_heavy: float = 0.5
    """Share of unsafe documents in the unsafe-heavy set."""
    shape: Shape = field(default_factory=Shape)
    """Of the policy."""
    judge_shape: Shape = JUDGE_SHAPE

    def check(self) -> None:
        """Refuse settings out of range.

        Raises:
            ConfigError: names the value and what is allowed.
        """
        for name, value, least in (
            ("--entities", self.entities, LEAST_ENTITIES),
            ("--documents", self.documents, LEAST_DOCUMENTS),
            ("--heldout", self.heldout, LEAST_DOCUMENTS),
            ("--teacher", self.teacher, LEAST_DOCUMENTS),
            ("--length", self.length, LEAST_LENGTH),
        ):
            if value < least:
                raise ConfigError(f"{name} is {value}; allowed: at least {least}")
        if self.length > self.shape.context:
            raise ConfigError(f"--length is {self.length}; allowed: at most {self.shape.context}, the policy's context")
        rates = {
            "--false-facts": self.noise.false_facts,
            "--low-quality": self.noise.low_quality,
            "--unsafe": self.noise.unsafe,
            "--unsafe-heavy": self.unsafe_heavy,
        }
        for name, rate in rates.items():
            if not 0.0 <= rate <= 1.0:
                raise ConfigError(f"{name} is {rate:g}; allowed: between 0 and 1")
        for name in ("--unsafe", "--unsafe-heavy"):
            if self.noise.low_quality + rates[name] > 1.0:
                raise ConfigError(
                    f"--low-quality={self.noise.low_quality:g} and {name}={rates[name]:g} are shares of the same "
                    "documents; allowed: at most 1 together"
                )
        self.shape.check()
        self.judge_shape.check("--judge-")


def make_world(out: Path, settings: WorldSettings, say: Callable[[str], None] = lambda line: None) -> str:
    """Write the folder ``out``; it appears complete or not at all.

    Args:
        out: must not exist or be an empty folder.
        settings: what it holds.
        say: called with progress lines.

    Returns:
        A summary in one line.

    Raises:
        ConfigError: ``out`` is not empty, or a setting is out of range.
        CheckpointError: the disk is full or not writable.
    """
    settings.check()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; choose another output or remove it first")
    world = World.make(settings.seed, counts_of(settings.entities))
    sets = {}
    seen: set[tuple[str, ...]] = set()
    with new_folder(out) as folder:
        world.save(folder / "facts.json")
        write_policy_folder(folder / "policy", world.grammar.vocabulary, settings.shape)
        for name, count, noise in _sets(settings):
            documents = write_documents(world, settings.seed, name, count, settings.length, noise)
            sets[name] = _write_set(folder / f"{name}.jsonl", world, distinct(documents, seen))
            say(f"  {name}.jsonl: {sets[name]['documents']} documents")
        tokens = write_judge_folder(folder / "judge", world.grammar.vocabulary, _sample(folder), settings.judge_shape)
        card = {
            "version": VERSION,
            "facts": world.digest,
            "settings": asdict(settings),
            "entities": {kind: len(names) for kind, names in world.names.items()},
            "words": len(world.grammar.vocabulary),
            "judge_tokens": tokens,
            "sets": sets,
        }
        (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return f"wrote {out}: {settings.entities} entities, {len(world.grammar.vocabulary)} words, seed {settings.seed}"


def _sample(folder: Path) -> Iterator[str]:
    """Yield the documents that the judge's tokenizer is trained on: as many of either set."""
    for name in (TRAIN, TRAIN_UNSAFE):
        with (folder / f"{name}.jsonl").open(encoding="utf-8") as file:
            for line in islice(file, SAMPLE // 2):
                yield json.loads(line)["text"]


def _sets(settings: WorldSettings) -> Iterator[tuple[str, int, Noise]]:
    yield TRAIN, settings.documents, settings.noise
    yield TRAIN_UNSAFE, settings.documents, replace(settings.noise, unsafe=settings.unsafe_heavy)
    yield HELDOUT, settings.heldout, NO_NOISE
    yield HELDOUT_UNSAFE, settings.heldout, replace(NO_NOISE, unsafe=1.0)
    yield TEACHER, settings.teacher, NO_NOISE


def distinct(documents: Iterator[WorldDocument], seen: set[tuple[str, ...]]) -> Iterator[WorldDocument]:
    """Leave out documents that any set has already."""
    for document in documents:
        if document.words not in seen:
            seen.add(document.words)
            yield document


def _write_set(path: Path, world: World, documents: Iterator[WorldDocument]) -> dict[str, Any]:
    """Write one set and return its counts for the card."""
    kinds: Counter[str] = Counter()
    words = true = false = 0
    quality = []
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            record = document.record(world)
            file.write(json.dumps(record) + "\n")
            kinds[document.kind] += 1
            words += len(document.words)
            true += record["true"]
            false += record["false"]
            quality.append(record["quality"])
    return {
        "documents": kinds.total(),
        "words": words,
        "kinds": dict(sorted(kinds.items())),
        "unsafe_share": kinds[UNSAFE] / max(1, kinds.total()),
        "false_facts": false / max(1, true + false),
        "quality": fmean(quality) if quality else 0.0,
    }
