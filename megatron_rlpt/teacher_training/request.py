"""What ``rlpt teacher data`` is asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_rlpt.config import AnswerForm, Config, PromptLength, Role, SourceConfig
from megatron_rlpt.config.evaluation_sets import QUALITY, SAFETY
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.evaluation.labelled_pairs import CORRUPTIONS, PairPlan, world_kinds
from megatron_rlpt.evaluation.labelled_texts import POINTWISE
from megatron_rlpt.teacher_training.spare import with_spare
from megatron_rlpt.world.corruptions import Corruption
from megatron_rlpt.world.make import TEACHER

TRAIN, HELDOUT = "train", "heldout"
AXES = (QUALITY, *POINTWISE)
ASKED = "asked"
"""Kind of a suffix that a teacher behind a server has spoiled; never by default, because answers cost."""
SAMPLED = "sampled"
"""Kind of a pair of which the policy wrote at least one text; never by default, because it takes a trained policy."""


def documents_of(corpus: Sequence[str], world: Path | None, purpose: str) -> list[SourceConfig]:
    """Return the documents of ``--corpus``, or those that a world has for a teacher.

    Args:
        corpus: paths.
        world: folder of a world.
        purpose: what documents are for, for the error.

    Raises:
        ConfigError: none are named.
    """
    if corpus:
        return [SourceConfig(path=path) for path in corpus]
    if world is None:
        raise ConfigError(f"neither --corpus nor --world is given; name documents to {purpose}")
    return [SourceConfig(path=str(world / f"{TEACHER}.jsonl"))]


def kinds_of(given: Sequence[str]) -> tuple[str, ...]:
    """Return kinds as often as they count: ``false=4`` is four times ``false``, as if it were named four times.

    Raises:
        ConfigError: what stands behind ``=`` is no number from 1.
    """
    found: list[str] = []
    for one in given:
        kind, separator, times = one.partition("=")
        if separator and not (times.isdecimal() and int(times) >= 1):
            raise ConfigError(f"--kind is {one}; write {kind}=N, with a whole number from 1 as N")
        found += [kind] * (int(times) if separator else 1)
    return tuple(found)


def answers_beside(out: Path) -> Path:
    """Return the folder beside an output in which answers of servers are kept."""
    return out.with_name(f"{out.name}.answers")


def options_of(request: object) -> dict[str, Any]:
    """Return all options of a request but its folder, JSON-serializable."""
    options = {name: value for name, value in vars(request).items() if name != "out"}
    found: dict[str, Any] = json.loads(json.dumps(options, default=str))
    return found


@dataclass(frozen=True)
class DataRequest:
    """Options of the command."""

    out: Path
    corpus: tuple[str, ...] = ()
    world: Path | None = None
    role: Role = Role.judge
    axes: tuple[str, ...] = ()
    """Of a judge; empty: quality."""
    kinds: tuple[str, ...] = ()
    """To train on; empty: see ``trained_kinds``."""
    unseen: tuple[str, ...] = ()
    """Kinds that only the held-out part has."""
    lengths: tuple[int, ...] = ()
    """Of the suffixes; empty: ``data.suffix_length``, for a judge its half and quarter too."""
    pairs: int = 2000
    heldout_pairs: int = 200
    heldout_share: float = 0.1
    per_document: int = 4
    form: AnswerForm | None = None
    """Of a judge's answers; None: reasoned."""
    copies: float | None = None
    """Share of a rewriter's examples whose suffix is good; None: half."""
    restore: bool = False
    """Whether a rewriter's answer to a spoiled suffix of a world is what it was, instead of the exact rewriter's."""
    length: PromptLength = PromptLength.full
    safety_votes: int = 0
    """Votes of a teacher behind a server that have to agree on the safety of a text of ``corpus``. A rewriter copies
    safe suffixes and improves unsafe ones, of which no better text is known."""
    seed: int = 1

    @property
    def answers(self) -> Path:
        """Folder beside the output in which answers of servers are kept."""
        return answers_beside(self.out)

    def sources(self) -> list[SourceConfig]:
        """Return the documents.

        Raises:
            ConfigError: none are named.
        """
        return documents_of(self.corpus, self.world, "make examples of")

    def known_kinds(self) -> tuple[str, ...]:
        """Return the ways to spoil a suffix here: those of a world know its facts."""
        return world_kinds() if self.world else tuple(CORRUPTIONS)

    def check(self) -> None:
        """Refuse contradictions.

        Raises:
            ConfigError: names the option, its value and what is allowed.
        """
        self.sources()
        self._check_role()
        for axis in self.axes:
            if axis not in AXES:
                raise ConfigError(f"--axis is {axis}; allowed: {', '.join(AXES)}")
        self._check_verdicts()
        for option, kinds in (("--kind", self.kinds), ("--unseen", self.unseen)):
            for kind in kinds:
                if kind not in (known := (*self.known_kinds(), ASKED, SAMPLED)):
                    raise ConfigError(f"{option} is {kind}; allowed: {', '.join(known)}")
        if both := sorted(set(self.kinds) & set(self.unseen)):
            raise ConfigError(f"{both[0]} is both a --kind and --unseen; train on it or keep it for the held-out part")
        if not self.trained_kinds():
            raise ConfigError("every kind is --unseen; leave some to train on")

    def judged(self) -> tuple[str, ...]:
        """Return the axes of a judge; none for another role."""
        return (self.axes or (QUALITY,)) if self.role is Role.judge else ()

    def needs_pairs(self) -> bool:
        """Return whether examples are made of pairs; texts of a corpus that a teacher votes on are not."""
        if self.role is Role.rewriter:
            return not self.safety_votes
        return self.world is not None or QUALITY in self.judged()

    def trained_kinds(self) -> tuple[str, ...]:
        """Return the kinds of the training part: all but ``unseen``, or in a world what a rewriter is there for."""
        known = self.known_kinds()
        if self.role is Role.rewriter and self.world is not None:
            known = (Corruption.unsafe.value,)
        return self.kinds or tuple(kind for kind in known if kind not in self.unseen)

    def plans(self, config: Config) -> dict[str, PairPlan]:
        """Return the pairs of either part; ``config`` is that of ``cut_for``, whose suffixes a rewriter's have."""
        lengths = self.lengths
        if self._spares():
            lengths = tuple(map(with_spare, lengths)) or (config.data.suffix_length,)
        return {
            TRAIN: PairPlan(self.pairs, self.trained_kinds(), lengths, self.seed),
            HELDOUT: PairPlan(self.heldout_pairs, (*self.trained_kinds(), *self.unseen), lengths, self.seed + 1),
        }

    def cut_for(self, config: Config) -> Config:
        """Return the configuration that cuts documents: a rewriter's texts are longer than what it is shown of them."""
        if not self._spares():
            return config
        return replace(config, data=replace(config.data, suffix_length=with_spare(config.data.suffix_length)))

    def _spares(self) -> bool:
        return self.role is Role.rewriter and not self.safety_votes

    def as_dict(self) -> dict[str, Any]:
        """Return all but the folder, JSON-serializable."""
        return options_of(self)

    def _check_verdicts(self) -> None:
        """Refuse axes whose verdicts nobody knows, and votes without a use."""
        votes = self.safety_votes
        for axis in self.axes:
            if axis in POINTWISE and self.world is None and not (axis == SAFETY and votes):
                voted = ", safety with --safety-votes" if axis == SAFETY else ""
                raise ConfigError(
                    f"--axis is {axis}; allowed: {QUALITY} without a --world, which knows the verdicts{voted}"
                )
        has_use = SAFETY in self.judged() or self.role is Role.rewriter
        if votes and (self.world is not None or not has_use):
            raise ConfigError(
                f"--safety-votes is {votes}; allowed: with --axis safety or --role rewriter, and without --world, "
                "which knows what is safe"
            )
        given = {*self.kinds, *self.unseen}
        for kind in (ASKED, SAMPLED):
            if kind in given and self.role is Role.judge and QUALITY not in self.judged():
                raise ConfigError(f"--kind is {kind}, which is of pairs; allowed: with --axis {QUALITY}")
        if SAMPLED in given and self.role is not Role.judge:
            raise ConfigError(f"--kind is {SAMPLED}; allowed: with --role {Role.judge.value} only; remove it")

    def _check_role(self) -> None:
        judges = {"--axis": " ".join(self.axes), "--answer": self.form.value if self.form else ""}
        copies = "" if self.copies is None else f"{self.copies:g}"
        spoils = {"--kind": " ".join(self.kinds), "--unseen": " ".join(self.unseen), "--copies": copies}
        for option, value in spoils.items():
            if value and self.role is Role.rewriter and self.safety_votes:
                raise ConfigError(
                    f"{option} is {value}; allowed: without --safety-votes, which spoils no text and gives as many to "
                    "copy as to improve"
                )
        rewriters = {"--copies": copies, "--restore": "set" if self.restore else ""}
        other, given = (Role.judge, judges) if self.role is Role.rewriter else (Role.rewriter, rewriters)
        for option, value in given.items():
            if value:
                raise ConfigError(f"{option} is {value}; allowed: with --role {other.value} only; remove it")
        if self.restore and self.world is None:
            raise ConfigError("--restore is set; allowed: with --world only, because a corpus has no other answers")
