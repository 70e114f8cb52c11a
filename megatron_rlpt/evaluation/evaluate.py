"""``rlpt evaluate``: let models continue the same prompts, ask judges, and write ``evaluation.json``.

models, sets --> engines --> continuations --> judges, counts --> columns --> results
(models.py)   (engines.py)  (generation.py)    (measures.py)             (estimates.py)
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from megatron_rlpt import __version__
from megatron_rlpt.config import Config, engine_facts, flatten
from megatron_rlpt.config.evaluation_sets import PERPLEXITY
from megatron_rlpt.data import HeldOut, kept_from_training, survey_corpus
from megatron_rlpt.distributed.ranks import Ranks, read_launcher_environment
from megatron_rlpt.errors import ConfigError, RlptError, not_written
from megatron_rlpt.evaluation.engines import write_all
from megatron_rlpt.evaluation.estimates import agreement, diversity, estimate
from megatron_rlpt.evaluation.example_texts import build_examples
from megatron_rlpt.evaluation.hygiene import check_hygiene, training_sources, without_known
from megatron_rlpt.evaluation.hygiene_text import hygiene_notes
from megatron_rlpt.evaluation.in_sample import recorded_training
from megatron_rlpt.evaluation.judges import NamedJudge, open_judges
from megatron_rlpt.evaluation.likelihood import likelihood_results
from megatron_rlpt.evaluation.measures import MeasureColumn, SetJudging, Written, counted
from megatron_rlpt.evaluation.models import EvaluatedModel, find_models
from megatron_rlpt.evaluation.prompt_sets import PromptSet, load_sets
from megatron_rlpt.evaluation.provenance import describe_machine, describe_versions
from megatron_rlpt.evaluation.results import EVALUATION_FILE, Evaluation, JudgeRecord, ModelFacts, Result, SetFacts
from megatron_rlpt.evaluation.standard_tasks import LoadedTask, open_tasks, standard_results
from megatron_rlpt.files import write_atomically
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.observe import get_logger, setup_logging
from megatron_rlpt.observe.precision import resolve_dtypes, with_dtypes
from megatron_rlpt.observe.run_json import RunRecord
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer

_log = get_logger(__name__)


@dataclass
class _Work:
    """What an evaluation consists of, and what it has found so far."""

    config: Config
    out: Path
    cache: Path
    ranks: Ranks
    models: list[EvaluatedModel]
    sets: list[PromptSet]
    tokenizer: PolicyTokenizer
    tasks: list[LoadedTask]
    left_out: HeldOut | None
    """Documents that training left out, as far as that is on record."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage."""


def evaluate(config: Config, out: Path, models: Sequence[str] = (), reference: str = "") -> Path | None:
    """Compare models with a reference on the same prompts; every rank calls this.

    If neither configuration, prompts nor weights have changed since the last evaluation in ``out``, nothing is done.
    What was generated or judged before is read from the cache.

    Args:
        config: of the run, or any other with prompts, lengths and judges.
        out: folder for ``evaluation.json``, the log and, by default, the cache.
        models: ``[NAME=]PATH`` of each; empty are the export of the run and that of its next-token baseline.
        reference: ``[NAME=]PATH``; empty is ``model.path``.

    Returns:
        ``out`` on the rank that writes, None on others.

    Raises:
        RlptError: anything that a user can fix. Started again, the evaluation goes on where it was.
    """
    if any(source.prompts for source in config.data.heldout):
        raise ConfigError(
            "data.heldout has prompts, whose answers are evaluated while a run trains (evaluation.every); measure a "
            "judge with rlpt judge calibrate, or give documents to continue"
        )
    ranks = _join(config)
    with ranks.contact():
        config = resolve_dtypes(config)
        # Machines may differ: rank 0 decides for all.
        config = with_dtypes(config, *ranks.broadcast((config.model.dtype, config.teacher.dtype)))
        cache = Path(config.evaluation.cache or out / "cache")
        found = ranks.on_main(lambda: find_models(config, models, reference, cache))
        work = ranks.run_on_all_ranks(lambda: _prepare(config, out, cache, ranks, found), "the end of reading prompts")
        fingerprint = _fingerprint(work)
        if ranks.on_main(lambda: read_finished(out, fingerprint)) is None:
            ranks.run_on_all_ranks(lambda: setup_logging(out, rank=ranks.rank), "the opening of its log")
            _warn(config)
            evaluation = _measure(work, fingerprint)
            ranks.on_main(lambda: _write(out, evaluation))
    return out if ranks.is_main else None


def read_finished(folder: Path, fingerprint: str) -> Evaluation | None:
    """Return the evaluation in ``folder`` if it has this fingerprint."""
    try:
        found = Evaluation.from_json(json.loads((folder / EVALUATION_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, AttributeError, RlptError):
        return None  # missing, foreign or damaged: evaluate again
    return found if found.fingerprint == fingerprint else None


def _join(config: Config) -> Ranks:
    """Return the ranks that torchrun or srun has started."""
    world = read_launcher_environment().world
    if world == 1:
        return Ranks()
    from megatron_rlpt.policy.device_runtime import DeviceRuntime
    from megatron_rlpt.policy.layout import Layout

    runtime = DeviceRuntime()
    setup_logging(rank=runtime.rank)
    return runtime.init_distributed(Layout(world=world), config.parallel.timeout)


def _warn(config: Config) -> None:
    if not engine_facts(config).serves_exports:
        _log.warning(
            "evaluation generates with vLLM, not with the engine of the run", engine=config.rollout.engine.value
        )


def _prepare(config: Config, out: Path, cache: Path, ranks: Ranks, models: list[EvaluatedModel]) -> _Work:
    tokenizer = PolicyTokenizer(config.model.path)
    survey_corpus(config.data.heldout + config.evaluation.second_corpus, config.data.max_bad_fraction)
    runs = [folder for model in models if (folder := run_folder(model.path)) is not None]
    left_out = require_held_out(config, tokenizer, runs)
    sets = load_sets(config, tokenizer)
    return _Work(config, out, cache, ranks, models, sets, tokenizer, open_tasks(config.evaluation), left_out)


def run_folder(path: Path) -> Path | None:
    """Return the folder of the run that a model is of: a run folder, its export, or one of its checkpoints."""
    inside = path.resolve()
    return next((one for one in (inside, *inside.parents[:3]) if (one / "run.json").is_file()), None)


def require_held_out(config: Config, tokenizer: PolicyTokenizer, runs: Sequence[Path]) -> HeldOut | None:
    """Refuse to compare policies on documents that one of them may have been trained on.

    Args:
        config: of the run; its held-out documents may differ from those held out during training.
        tokenizer: of the policies.
        runs: folders of the runs that trained the policies.

    Returns:
        The documents that all runs left out of their training text; None if that is not on record.

    Raises:
        DataError: a document of the corpus is held out now but was not in one of ``runs``, or too many held-out
            records are malformed.
    """
    held_out = kept_from_training(config, tokenizer.vocabulary, None)
    if held_out is None or not runs:
        return None
    records = [RunRecord.read(folder) for folder in runs]
    if all(record is not None and record.held_out == held_out.digest for record in records):
        return held_out
    recorded = {str(folder): record.config if record else None for folder, record in zip(runs, records, strict=True)}
    sources = training_sources(config, recorded)
    # What only a run's record names may be on another machine.
    known = [one for one in sources if one in config.data.sources or Path(one.path).exists()]
    _log.warning(
        "held-out documents have changed since training, or are not on record; comparing with the training text",
        sources=len(known),
        not_found=[one.path for one in sources if one not in known],
    )
    held_out.scan(known, skips=False)
    return None


def _fingerprint(work: _Work) -> str:
    """Return a digest of all that the evaluation depends on."""
    config = work.config
    facts = {
        "release": __version__,
        # The user's classes are in it by the digest of their source.
        "config": {key: str(value) for key, value in flatten(config).items() if key != "run.dir"},
        "models": [[one.name, one.digest, one.reference] for one in work.models],
        "sets": [[one.name, one.digest] for one in work.sets],
        "tasks": [task.digest for task in work.tasks],
        # A set holds only the middle of its documents, and perplexity reads them from their beginning.
        "documents": [
            _state(path)
            for one in work.sets
            if PERPLEXITY in one.measures
            for path in (one.path, *(source.path for source in config.data.heldout))
        ],
        "files": [_state(name) for name in _read_by_judges(config)],
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _read_by_judges(config: Config) -> list[str]:
    """Return the files and folders that judges read: corpora, models, and what options of classes name."""
    settings, judges = config.evaluation, config.evaluation.judges
    options = [config.teacher.options, settings.second_options, *(judge.options for judge in judges)]
    named = [value for values in options for value in values.values() if isinstance(value, str) and value]
    corpora = [source.path for source in settings.second_corpus]
    return [*corpora, config.teacher_path, *(judge.path for judge in judges if judge.path), *named]


def _state(name: str) -> list[list[object]]:
    """Return name, size and time of change of a file, or of the files of a folder; empty where there is none."""
    path = Path(name)
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return [[one.name, one.stat().st_size, one.stat().st_mtime_ns] for one in files if one.is_file()]
    except OSError:
        return []


def _measure(work: _Work, fingerprint: str) -> Evaluation:
    """Generate, judge and count; a collective."""
    config, ranks = work.config, work.ranks
    hygiene = _hygiene(work)
    if config.evaluation.drop_known:
        work.sets = without_known(work.sets, hygiene)
    started = time.monotonic()
    written = write_all(config, work.models, work.sets, work.cache, ranks)
    work.seconds["generation"] = time.monotonic() - started
    columns = [column for one in written for column in counted(one)]
    judges = _judges(work)
    for judge in judges:
        columns += _judge(work, written, judge)
    weights = {one.name: one.weight for one in work.sets}
    results, notes = estimate(columns, weights, config.run.seed)
    results += [result for one in written for result in diversity(one)]
    results += _likelihood(work)
    return Evaluation(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        versions=describe_versions(),
        config=flatten(config),
        models=tuple(_model_facts(one) for one in work.models),
        sets=(*map(_set_facts, work.sets), *(task.facts for task in work.tasks)),
        judges=_used(judges, results),
        results=tuple(results),
        agreements=tuple(agreement(columns, config.run.seed)),
        hygiene=hygiene,
        examples=tuple(build_examples(written, columns, work.tokenizer, config.evaluation.examples)),
        notes=(*notes, *hygiene_notes(hygiene)),
        fingerprint=fingerprint,
        seconds={name: round(value, 1) for name, value in work.seconds.items()},
    )


def _likelihood(work: _Work) -> list[Result]:
    """Measure by likelihood what sets ask for, and standard tasks."""
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = likelihood_results(work.config, work.models, work.sets, work.cache, device, work.ranks)
    results += standard_results(work.config, work.tasks, work.models, work.cache, device, work.ranks)
    if results:
        work.seconds["likelihood"] = time.monotonic() - started
    return results


def _judges(work: _Work) -> list[NamedJudge]:
    """Open the judges; each loads its model when the first verdict is missing."""
    trained = {model.name: recorded_training(model.path) for model in work.models}
    vocabulary = max(read_architecture(model.folder).vocab for model in work.models)
    return open_judges(work.config, trained, cache=work.cache / "verdicts", ranks=work.ranks, vocab_size=vocabulary)


def _judge(work: _Work, written: Sequence[Written], judge: NamedJudge) -> list[MeasureColumn]:
    started = time.monotonic()
    columns = [
        column
        for one in written
        for column in SetJudging(one, work.tokenizer, work.config.evaluation.seeds, work.ranks).columns(judge)
    ]
    judge.close()
    work.seconds[f"judging by {judge.facts.name}"] = seconds = time.monotonic() - started
    _log.info("judged", judge=judge.facts.name, seconds=f"{seconds:.1f}")
    return columns


def _hygiene(work: _Work) -> dict[str, Any]:
    """Compare prompts with training text and with each other; rank 0 does it for all."""
    started = time.monotonic()
    trained = {model.name: recorded_training(model.path) for model in work.models}
    found = work.ranks.on_main(
        lambda: check_hygiene(work.config, work.sets, work.tokenizer, trained, work.cache, work.left_out)
    )
    work.seconds["hygiene"] = time.monotonic() - started
    return found


def _used(judges: Sequence[NamedJudge], results: Sequence[Result]) -> tuple[JudgeRecord, ...]:
    names = {result.judge for result in results}
    return tuple(judge.facts for judge in judges if judge.facts.name in names)


def _model_facts(model: EvaluatedModel) -> ModelFacts:
    return ModelFacts(model.name, str(model.path), model.kind, model.digest, model.reference)


def _set_facts(one: PromptSet) -> SetFacts:
    return SetFacts(one.name, one.format, one.path, len(one.episodes) or len(one.questions), one.weight)


def _write(out: Path, evaluation: Evaluation) -> None:
    path = out / EVALUATION_FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(evaluation.to_json(), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise not_written(path, error) from error
