"""Whether the prompts of an evaluation are in the training text, or in each other.

Whole held-out documents are kept out of training by their content (``data/overlap.py``). Here single prompts are
compared, of all sets: *overlap* is the share of a prompt's n-grams of ``evaluation.overlap_ngram`` words that occur
anywhere in the training text; a *near-duplicate* has four fifths of its 5-grams in one training document, or in one
other prompt. The training text is read once, up to ``evaluation.overlap_limit``; only the prompts' n-grams are held.
"""

from __future__ import annotations

import glob
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rlpt.config import Config, HeldOutOverlap, SourceConfig
from megatron_rlpt.data import Document, HeldOut, open_source
from megatron_rlpt.data.ngrams import NgramIndex, hashed
from megatron_rlpt.errors import DataError, RlptError, first_line
from megatron_rlpt.evaluation.hygiene_text import size_of
from megatron_rlpt.evaluation.in_sample import Recorded
from megatron_rlpt.evaluation.prompt_sets import PromptSet
from megatron_rlpt.files import write_atomically
from megatron_rlpt.observe import get_logger
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import stable_id

_log = get_logger(__name__)

NEAR_NGRAM = 5
"""Words of the n-grams that near-duplicates share."""
NEAR = 0.8
"""Least share of its 5-grams that a near-duplicate has in the other text."""
_EXAMPLES = 5
_EVERY = 15.0
"""Seconds between two lines about progress."""
_GIB = 2**30


@dataclass(frozen=True)
class _Prompt:
    set: str
    id: str
    text: str


def check_hygiene(
    config: Config,
    sets: Sequence[PromptSet],
    tokenizer: PolicyTokenizer,
    models: Mapping[str, Recorded | None],
    cache: Path | None = None,
    left_out: HeldOut | None = None,
) -> dict[str, Any]:
    """Return what prompts, training text and each other share, for ``Evaluation.hygiene``.

    Args:
        config: gives the training text (``data.sources``), n-grams and limit.
        sets: all sets of the evaluation.
        tokenizer: of the models.
        models: names of the models -> ``in_sample.recorded_training`` of each; their training text is compared too.
        cache: folder for the result, which is used again as long as prompts and training files are the same.
        left_out: documents that training left out of its text (``data.heldout_overlap=skip``), so that they do not
            count.

    Returns:
        ``ngram``, ``near_ngram``, ``near``, ``limit_gib``; ``sources``: fields of ``ScannedSource``; ``sets``: name ->
        ``prompts``, ``too_short`` (for an n-gram), ``overlapping`` (with at least one n-gram in the training text),
        ``overlap`` (mean share of n-grams), ``near_training`` and ``near_prompts`` (near-duplicates), ``known``
        (positions of the near-duplicates of training text in the set), ``dropped`` (whether they were left out),
        ``examples`` (``prompt``, ``share``, ``in``).
    """
    prompts = list(_prompts(sets, tokenizer))
    sources = training_sources(config, models)
    settings = config.evaluation
    if config.data.heldout_overlap is not HeldOutOverlap.skip:
        left_out = None  # training would have stopped at the first of them
    place = cache / f"hygiene-{_key(prompts, sources, config, left_out)}.json" if cache else None
    if place and place.is_file():
        try:
            known: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
            return known
        except (OSError, ValueError):
            pass  # compared again
    texts = [one.text for one in prompts]
    comparison = _Comparison(texts, settings.overlap_ngram)
    most = settings.overlap_limit * _GIB / max(1, len(sources))
    scanned = [
        asdict(comparison.scan(_Reading(source, config, tokenizer, most, left_out)))
        for source in (sources if settings.overlap_limit else ())
    ]
    found = {
        "ngram": settings.overlap_ngram,
        "near_ngram": NEAR_NGRAM,
        "near": NEAR,
        "limit_gib": settings.overlap_limit,
        "sources": scanned,
        "sets": comparison.by_set(prompts),
    }
    if place:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, json.dumps(found))
    return found


def without_known(sets: Sequence[PromptSet], found: dict[str, Any]) -> list[PromptSet]:
    """Return ``sets`` without the near-duplicates of training text, and say so in what ``check_hygiene`` ``found``.

    Raises:
        DataError: fewer than two prompts of a set are left.
    """
    kept = []
    for one in sets:
        of_set = found["sets"].get(one.name)
        if of_set is None or not of_set["known"]:
            kept.append(one)
            continue
        known, episodes = frozenset(of_set["known"]), len(one.episodes)
        stay = [index for index in range(episodes + len(one.questions)) if index not in known]
        if len(stay) < 2:
            raise DataError(
                f"{len(known)} of {of_set['prompts']} prompts of the set {one.name} are near-duplicates of training "
                "text and fewer than two are left; give other prompts, or set evaluation.drop_known=false"
            )
        of_set["dropped"] = True
        kept.append(
            replace(
                one,
                episodes=tuple(one.episodes[index] for index in stay if index < episodes),
                labels=tuple(one.labels[index] for index in stay if index < len(one.labels)),
                questions=tuple(one.questions[index - episodes] for index in stay if index >= episodes),
            )
        )
    return kept


def training_sources(config: Config, models: Mapping[str, Recorded | None]) -> list[SourceConfig]:
    """Return ``data.sources`` and those that the runs of ``models`` record, each once."""
    sources = {_identity(one): one for one in config.data.sources}
    for recorded in models.values():
        for one in _recorded_sources(recorded or {}):
            sources.setdefault(_identity(one), one)
    return list(sources.values())


def _recorded_sources(recorded: Recorded) -> Iterator[SourceConfig]:
    numbers = sorted({int(key[13 : key.index("]")]) for key in recorded if key.startswith("data.sources[")})
    plain = {"path", "field", "split", "subset", "eod", "reader", "control_tokens"}
    for number in numbers:
        head = f"data.sources[{number}]."
        values = {name: recorded[head + name] for name in plain if head + name in recorded}
        options = {key[len(head) + 8 :]: value for key, value in recorded.items() if key.startswith(f"{head}options.")}
        source = SourceConfig(**values, options=options)
        if name := recorded.get(f"{head}format"):
            source.format = type(source.format)[name]
        yield source


def _identity(source: SourceConfig) -> tuple[str, ...]:
    return tuple(str(value) for name, value in sorted(asdict(source).items()) if name != "weight")


@dataclass(frozen=True)
class ScannedSource:
    """What of a source was compared."""

    path: str
    documents: int = 0
    gib: float = 0.0
    """GiB of text."""
    complete: bool = False
    left_out: int = 0
    """Further documents, which training left out because they are held out."""
    problem: str = ""
    """Why it could not be read."""


class _Comparison:
    """Compares prompts with training documents and with each other."""

    def __init__(self, texts: Sequence[str], ngram: int) -> None:
        self._texts = texts
        self._overlap = NgramIndex(texts, ngram)
        self._near = NgramIndex(texts, NEAR_NGRAM)
        self._share = np.zeros(len(texts))
        """Largest share of a prompt's 5-grams that is in one training document."""
        self._where = [""] * len(texts)

    def scan(self, reading: _Reading) -> ScannedSource:
        """Compare the texts of a source."""
        path = reading.path
        try:
            for words in hashed(reading):
                self._overlap.compare(words)
                documents, numbers, counts = self._near.compare(words)
                shares = counts / self._near.counts[numbers]
                for place in (shares > self._share[numbers]).nonzero()[0]:
                    prompt, share = int(numbers[place]), float(shares[place])
                    if share > self._share[prompt]:
                        self._share[prompt] = share
                        self._where[prompt] = f"{path} ({reading.ids[int(documents[place])]})"
                reading.forget(int(words.texts[-1]))
        except RlptError as error:
            return ScannedSource(path, problem=first_line(error))
        return ScannedSource(path, reading.documents, reading.characters / _GIB, reading.complete, reading.left_out)

    def by_set(self, prompts: Sequence[_Prompt]) -> dict[str, Any]:
        """Return the numbers of every set."""
        counts, seen = self._overlap.counts, self._overlap.seen()
        near_prompts = self._near_prompts()
        found = {}
        for name in dict.fromkeys(one.set for one in prompts):
            mine = np.array([index for index, one in enumerate(prompts) if one.set == name])
            long = mine[counts[mine] > 0]
            near = mine[self._share[mine] >= NEAR]
            worst = sorted(mine[self._share[mine] > 0], key=lambda index: -self._share[index])[:_EXAMPLES]
            found[name] = {
                "prompts": len(mine),
                "too_short": len(mine) - len(long),
                "overlapping": int((seen[long] > 0).sum()),
                "overlap": float((seen[long] / counts[long]).mean()) if len(long) else 0.0,
                "near_training": len(near),
                "known": np.searchsorted(mine, near).tolist(),
                "dropped": False,
                "near_prompts": int(sum(index in near_prompts for index in mine.tolist())),
                "examples": [
                    {"prompt": prompts[index].id, "share": float(self._share[index]), "in": self._where[index]}
                    for index in worst
                ],
            }
        return found

    def _near_prompts(self) -> set[int]:
        """Return the prompts that are near-duplicates of another one."""
        words = [" ".join(text.casefold().split()) for text in self._texts]
        times = Counter(words)
        found = {number for number, text in enumerate(words) if times[text] > 1}  # however short
        for batch in hashed(self._texts):
            ones, others, counts = self._near.compare(batch, note=False)
            near = (ones != others) & (counts >= NEAR * self._near.counts[others])
            found.update(others[near].tolist())
        return found


class _Reading:
    """The texts of a source, up to a limit, with a line about progress now and then."""

    def __init__(
        self, source: SourceConfig, config: Config, tokenizer: PolicyTokenizer, most: float, held_out: HeldOut | None
    ) -> None:
        """
        Args:
            source: to read from its beginning.
            config: gives ``data.max_record_bytes``.
            tokenizer: for sources that hold tokens.
            most: characters after which no further document is read.
            held_out: documents to leave out.
        """
        self.path = source.path
        self._source = source
        self._held_out = held_out
        self._config = config
        self._tokenizer = tokenizer
        self._most = most
        self.documents = self.characters = self.left_out = 0
        self.complete = False
        self.ids: dict[int, str] = {}
        """Number of a text -> id of its document."""

    def forget(self, number: int) -> None:
        """Forget the ids of texts before ``number``."""
        self.ids = {key: value for key, value in self.ids.items() if key >= number}

    def __iter__(self) -> Iterator[str]:
        vocabulary = self._tokenizer.vocabulary
        reader = open_source(self._source, self._config.data.max_record_bytes, vocabulary)
        spoken = time.monotonic()
        while self.characters < self._most:
            record = reader.read()
            if record is None:
                self.complete = True
                return
            if not isinstance(record, Document):
                continue
            text = record.text if record.tokens is None else vocabulary.decode(record.tokens)
            if self._held_out is not None and self._held_out.find(text) is not None:
                self.left_out += 1
                continue
            self.ids[self.documents] = record.id
            self.documents += 1
            self.characters += len(text)
            if time.monotonic() - spoken > _EVERY:
                spoken = time.monotonic()
                _log.info(
                    "comparing prompts with training text",
                    source=self._source.path,
                    documents=self.documents,
                    read=size_of(self.characters / _GIB),
                    at_most=size_of(self._most / _GIB),
                )
            yield text


def _prompts(sets: Sequence[PromptSet], tokenizer: PolicyTokenizer) -> Iterator[_Prompt]:
    for one in sets:
        for episode in one.episodes:
            text = tokenizer.text_of(episode.prefix) + tokenizer.text_of(episode.suffix, episode.prefix)
            yield _Prompt(one.name, f"{episode.document}", text)
        for question in one.questions:
            yield _Prompt(one.name, question.id, question.text)


def _key(prompts: Sequence[_Prompt], sources: Sequence[SourceConfig], config: Config, left_out: HeldOut | None) -> str:
    settings = config.evaluation
    files = []
    for source in sources:
        named = [Path(one) for one in glob.glob(source.path, recursive=True)]
        found = sorted(inner for one in named for inner in (one.rglob("*") if one.is_dir() else [one]))
        files.append([(str(one), one.stat().st_size, one.stat().st_mtime_ns) for one in found if one.is_file()])
    known = left_out and left_out.digest
    identities = [_identity(one) for one in sources]
    return stable_id(3, known, prompts, files, identities, settings.overlap_ngram, settings.overlap_limit)
