"""What an evaluation found, as in ``evaluation.json``: one flat list of results, from which every table is made."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_rlpt.errors import DataError

FORMAT = 1
"""Of ``evaluation.json``; raise it when a field changes its meaning."""
EVALUATION_FILE = "evaluation.json"


class Scale(enum.StrEnum):
    """What the number of a result is."""

    win_rate = "win_rate"
    """Share of comparisons won against another model, a tie counting half: 0 to 1, 0.5 is no difference."""
    difference = "difference"
    """Of two win rates against the same model: -1 to 1."""
    share = "share"
    """0 to 1."""
    value = "value"
    """Any other number, in ``unit``."""


@dataclass(frozen=True)
class Result:
    """One number with its interval."""

    measure: str
    """``quality``, ``coherence``, ``safety``, ``factuality``, ``perplexity``, ``distinct_2``, ``mc1``, ..."""
    scale: Scale
    model: str
    """Name of the model."""
    set: str
    """Name of the prompt set."""
    value: float
    ci95: tuple[float, float] | None = None
    """95 % interval, resampled over prompts."""
    against: str = ""
    """Name of the model that a win rate or difference is against; empty for a measure of one model."""
    judge: str = ""
    """Name of the judge; empty for a computed measure."""
    decoding: str = ""
    """``greedy`` or ``sampled``; empty where nothing is generated."""
    n: int = 0
    """Verdicts or comparisons that are decided."""
    prompts: int = 0
    """Prompts with at least one of them."""
    failed: int = 0
    """Verdicts or comparisons left out because a judge failed or a text is blank."""
    unit: str = ""
    higher_is_better: bool | None = True
    """None where neither is."""


@dataclass(frozen=True)
class ModelFacts:
    """A model that was evaluated."""

    name: str
    path: str
    kind: str
    """``hf``, ``megatron`` or ``run``."""
    digest: str
    """Of the weights."""
    reference: bool = False
    """Whether win rates are against this one."""


@dataclass(frozen=True)
class SetFacts:
    """A set of prompts."""

    name: str
    format: str
    path: str
    prompts: int
    weight: float = 1.0
    """In a mean over several sets."""


@dataclass(frozen=True)
class JudgeRecord:
    """A judge that decided results."""

    name: str
    description: str
    """Completes "The judge is"."""
    in_sample: bool
    """Whether it also rewarded, or rewrote for, the training of a model that it judges here."""
    trained: tuple[str, ...] = ()
    """Names of those models."""


@dataclass(frozen=True)
class Agreement:
    """How often two judges decide the same comparison alike."""

    judges: tuple[str, str]
    measure: str
    set: str
    share: float
    """Of comparisons that both decided, without ties."""
    ci95: tuple[float, float] | None
    kappa: float | None
    """Cohen's: agreement beyond chance; None where one judge always says the same."""
    n: int


@dataclass(frozen=True)
class Evaluation:
    """Everything that ``rlpt evaluate`` found."""

    created: str
    """ISO 8601, UTC."""
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    models: tuple[ModelFacts, ...]
    sets: tuple[SetFacts, ...]
    judges: tuple[JudgeRecord, ...]
    results: tuple[Result, ...]
    agreements: tuple[Agreement, ...] = ()
    hygiene: Mapping[str, Any] = field(default_factory=dict)
    """Overlap with training text, near-duplicates."""
    examples: tuple[Mapping[str, Any], ...] = ()
    """``set``, ``prompt`` (id), ``prefix``, ``original``, ``label``, ``continuations`` (``[decoding][model]`` -> text),
    ``scores`` (``[judge][decoding][model]`` -> number or None), ``wins`` (the same against the reference: 0 to 1)."""
    notes: tuple[str, ...] = ()
    """Sentences about what is missing or limited."""
    fingerprint: str = ""
    """Of all that it depends on: an evaluation with the same one need not be made again."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Stage -> wall time, without what was stored before."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``evaluation.json``."""
        return {"format": FORMAT} | asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evaluation:
        """Return what ``to_json`` gave.

        Raises:
            DataError: it is of another format, or damaged.
        """
        if data.get("format") != FORMAT:
            raise DataError(
                f"the evaluation has format {data.get('format')!r}, needed: {FORMAT}; run rlpt evaluate again"
            )
        try:
            return cls(
                created=data["created"],
                machine=data["machine"],
                versions=data["versions"],
                config=data["config"],
                models=tuple(ModelFacts(**one) for one in data["models"]),
                sets=tuple(SetFacts(**one) for one in data["sets"]),
                judges=tuple(JudgeRecord(**{**one, "trained": tuple(one["trained"])}) for one in data["judges"]),
                results=tuple(
                    Result(**{**one, "scale": Scale(one["scale"]), "ci95": _interval(one["ci95"])})
                    for one in data["results"]
                ),
                agreements=tuple(
                    Agreement(**{**one, "judges": tuple(one["judges"]), "ci95": _interval(one["ci95"])})
                    for one in data["agreements"]
                ),
                hygiene=data["hygiene"],
                examples=tuple(data["examples"]),
                notes=tuple(data["notes"]),
                fingerprint=data.get("fingerprint", ""),
                seconds=data.get("seconds", {}),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the evaluation is damaged ({error}); run rlpt evaluate again") from None

    def find(self, **wanted: object) -> list[Result]:
        """Return the results whose fields equal ``wanted``."""
        return [one for one in self.results if all(getattr(one, key) == value for key, value in wanted.items())]


def _interval(bounds: list[float] | None) -> tuple[float, float] | None:
    return None if bounds is None else (bounds[0], bounds[1])
