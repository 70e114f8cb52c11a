"""``rlpt evaluate``: compare the trained policy and the next-token baseline with their starting model."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from megatron_rlpt.config import Config, engine_facts, to_yaml
from megatron_rlpt.config.user_classes import identities
from megatron_rlpt.data import heldout_episodes, kept_from_training, survey_corpus
from megatron_rlpt.distributed.ranks import read_launcher_environment
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.evaluation.compare import (
    BASELINE,
    START,
    TRAINED,
    ContinuationRequest,
    Continuations,
    compare,
    continue_prefixes,
)
from megatron_rlpt.evaluation.judge_scorer import JudgeScorer
from megatron_rlpt.evaluation.render import HTML_FILE, JSON_FILE, print_report, write_report
from megatron_rlpt.evaluation.report import build_examples, build_report, read_training_curves
from megatron_rlpt.evaluation.second_measure import build_second_measure
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.models.huggingface import WeightFolder
from megatron_rlpt.observe import get_logger, setup_logging, terminal
from megatron_rlpt.observe.precision import resolve_dtypes
from megatron_rlpt.observe.run_json import RunRecord
from megatron_rlpt.rollout.engine import RolloutEngine, RolloutPrompt
from megatron_rlpt.rollout.vllm.engine import start_policy_engine
from megatron_rlpt.teacher.build import build_judge, describe_judge
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import derive_seed

BASELINE_FOLDER = "baseline_ntp"
"""Run folder of the next-token baseline, inside the run folder of the policy."""

_log = get_logger(__name__)


def evaluate(config: Config) -> None:
    """Compare ``<run.dir>/export`` and, if it exists, ``<run.dir>/baseline_ntp/export`` with ``model.path``.

    Write ``report.json`` and ``report.html`` into the run folder and print the results. If neither configuration nor
    weights have changed since the last report, print that one again.

    Raises:
        ConfigError: the run has exported no policy yet, no held-out documents are configured, or several processes
            were started.
        DataError, ModelError, TeacherError: corpus, models or judge cannot be used.
    """
    if (world := read_launcher_environment().world) > 1:
        raise ConfigError(
            f"rlpt evaluate runs as one process, but {world} were started; start it without torchrun or srun"
        )
    if not engine_facts(config).serves_exports:
        _log.warning(
            "evaluation generates with vLLM, not with the engine of the run", engine=config.rollout.engine.value
        )
    config = resolve_dtypes(config)
    folder = Path(config.run.dir)
    models = _models(config, folder)
    fingerprint = _fingerprint(config, models)
    report = _finished_report(folder, fingerprint)
    if report is None:
        setup_logging(folder)
        report = _measure(config, folder, models) | {"fingerprint": fingerprint}
        write_report(folder, report)
    print_report(report, terminal.console())
    terminal.say(f"report: {folder / HTML_FILE} and {folder / JSON_FILE}")


def _models(config: Config, folder: Path) -> dict[str, Path]:
    """Return the model folders to compare by their names in the report."""
    models = {START: Path(config.model.path), TRAINED: folder / "export"}
    if not models[TRAINED].is_dir():
        raise ConfigError(
            f"run.dir {folder} has no export/ to evaluate; run 'rlpt train' with this configuration first"
        )
    baseline = folder / BASELINE_FOLDER / "export"
    return models | ({BASELINE: baseline} if baseline.is_dir() else {})


def _measure(config: Config, folder: Path, models: dict[str, Path]) -> dict[str, Any]:
    tokenizer = PolicyTokenizer(config.model.path)
    survey_corpus(config.data.heldout + config.evaluation.second_corpus, config.data.max_bad_fraction)
    require_held_out(config, tokenizer, [models[name].parent for name in (TRAINED, BASELINE) if name in models])
    episodes = heldout_episodes(
        config.data,
        config.evaluation.prefixes,
        tokenizer.encode,
        bos_id=tokenizer.bos_id,
        starts_character=tokenizer.starts_character,
        vocabulary=tokenizer.vocabulary,
    )
    prefixes = [episode.prefix for episode in episodes]
    originals = [episode.suffix for episode in episodes]
    policies = _continue_all(config, models, prefixes)
    second = build_second_measure(config, episodes, tokenizer, read_architecture(models[START]).vocab)
    _log.info("judging", prefixes=len(prefixes), policies=len(policies))
    scorer = JudgeScorer(build_judge(config, "cpu"), episodes, tokenizer, config.teacher.max_failure_rate)
    comparison = compare(prefixes, originals, policies, scorer, second, seed=config.run.seed)
    return build_report(
        comparison,
        read_training_curves(folder),
        config,
        judge=describe_judge(config),
        second=second,
        examples=build_examples(prefixes, originals, policies, comparison, tokenizer, config.evaluation.examples),
    )


def _continue_all(
    config: Config, models: dict[str, Path], prefixes: Sequence[tuple[int, ...]]
) -> dict[str, Continuations]:
    """Generate the continuations of every policy with one engine, updating its weights in between."""
    arch = read_architecture(models[START])
    engine = start_policy_engine(config)
    policies = {}
    for version, (name, path) in enumerate(models.items()):
        if version:
            engine.update_weights(WeightFolder(path).stream(arch), version)
        _log.info("generating", policy=name, weights=path)
        policies[name] = continue_prefixes(
            PolicyGenerator(engine, version, config), prefixes, config.evaluation.samples
        )
    return policies


class PolicyGenerator:
    """Continues prefixes with one version of the engine's weights."""

    def __init__(self, engine: RolloutEngine, version: int, config: Config) -> None:
        self._engine = engine
        self._version = version
        self._length = config.data.suffix_length
        self._seed = config.run.seed

    def __call__(self, requests: Sequence[ContinuationRequest]) -> list[tuple[int, ...]]:
        """Return one continuation per request. All policies sample with the same seeds."""
        prompts = [
            RolloutPrompt(
                tuple(request.prefix),
                derive_seed(self._seed, "evaluation", request.sample or 0, request.index),
                request.sample is None,
            )
            for request in requests
        ]
        return [result.tokens for result in self._engine.generate(prompts, self._length, self._version)]


def require_held_out(config: Config, tokenizer: PolicyTokenizer, runs: Sequence[Path]) -> None:
    """Refuse to compare policies on documents that one of them may have been trained on.

    Args:
        config: of the run; its held-out documents may differ from those held out during training.
        tokenizer: of the policies.
        runs: folders of the runs that trained the policies.

    Raises:
        DataError: a document of the corpus is held out now but was not in one of ``runs``, or too many held-out
            records are malformed.
    """
    held_out = kept_from_training(config, tokenizer.vocabulary, runs[0] / "quarantine.jsonl")
    if held_out is None:
        return
    records = [RunRecord.read(folder) for folder in runs]
    if all(record is not None and record.held_out == held_out.digest for record in records):
        return
    _log.warning("held-out documents have changed since training, or are not on record; comparing with data.sources")
    held_out.scan(config.data.sources, skips=False)


def _fingerprint(config: Config, models: dict[str, Path]) -> str:
    """Return a digest of the configuration, the user's classes, and name, size and time of every weight file."""
    digest = hashlib.blake2b(f"{to_yaml(config)}{identities(config)}".encode(), digest_size=16)
    for name, folder in models.items():
        for path in sorted(folder.glob("*.safetensors")):
            facts = path.stat()
            digest.update(f"{name} {path.name} {facts.st_size} {facts.st_mtime_ns}".encode())
    return digest.hexdigest()


def _finished_report(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the last report if it has this fingerprint and can be printed."""
    try:
        report = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
        if report["fingerprint"] != fingerprint or not (folder / HTML_FILE).is_file():
            return None
        print_report(report, terminal.console(file=io.StringIO()))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None  # missing, foreign or damaged: evaluate again
    return cast(dict[str, Any], report)
