"""``rlpt evaluate``: the trained policy and the next-token baseline against the policy both started from."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from megatron_rlpt.config import Config, EngineName, HeldOutOverlap, to_yaml
from megatron_rlpt.data import (
    Document,
    Location,
    Quarantine,
    heldout_episodes,
    kept_from_ngrams,
    kept_from_training,
    open_source,
    overlap_error,
    survey_corpus,
)
from megatron_rlpt.distributed.ranks import read_launcher_environment
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.evaluation.comparison import (
    BASELINE,
    START,
    TRAINED,
    Continuations,
    Tokens,
    compare,
    continue_prefixes,
)
from megatron_rlpt.evaluation.examples import build_examples
from megatron_rlpt.evaluation.ngram_model import NgramModel
from megatron_rlpt.evaluation.report import HTML_FILE, JSON_FILE, build_report, write_report
from megatron_rlpt.evaluation.terminal import print_report
from megatron_rlpt.evaluation.training_curves import read_training_curves
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.models.huggingface import WeightFolder
from megatron_rlpt.observe import get_logger, setup_logging, terminal
from megatron_rlpt.rollout.engine import RolloutEngine, RolloutPrompt
from megatron_rlpt.rollout.vllm.engine import start_policy_engine
from megatron_rlpt.teacher.build import build_judge, describe_judge
from megatron_rlpt.teacher.judge import Judge, check_failure_rate, failures, first_cause, most_frequent
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer, TextTokens
from megatron_rlpt.trainer.candidates import marked_if_blank, whole_characters
from megatron_rlpt.trainer.run_record import RunRecord
from megatron_rlpt.types import Candidate, Episode, Group, Reward, Source, derive_seed

BASELINE_FOLDER = "baseline_ntp"
"""Run folder of the next-token baseline, inside the run folder it is the baseline of."""

_log = get_logger(__name__)


def evaluate(config: Config) -> None:
    """Compare ``<run.dir>/export`` (and ``<run.dir>/baseline_ntp/export``, if there) with ``model.path``.

    Writes ``report.json`` and ``report.html`` into the run folder and prints the figures. When neither configuration
    nor weights have changed since the last report, that one is printed again.

    Raises:
        ConfigError: the run has no exported policy yet, no held-out documents are configured, or several processes
            were started.
        DataError, ModelError, TeacherError: a part of it cannot be used.
    """
    if (world := read_launcher_environment().world) > 1:
        raise ConfigError(f"rlpt evaluate is one process, and {world} were started; start it without torchrun or srun")
    if config.rollout.engine is not EngineName.vllm:
        _log.warning("continuations come from vLLM, whatever trained", engine=config.rollout.engine.value)
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
    """Policies to compare, by the name the report gives them."""
    models = {START: Path(config.model.path), TRAINED: folder / "export"}
    if not models[TRAINED].is_dir():
        raise ConfigError(f"run.dir {folder} has no export/ to evaluate; run 'rlpt train' with this config first")
    baseline = folder / BASELINE_FOLDER / "export"
    return models | ({BASELINE: baseline} if baseline.is_dir() else {})


def _measure(config: Config, folder: Path, models: dict[str, Path]) -> dict[str, Any]:
    tokenizer = PolicyTokenizer(config.model.path)
    survey_corpus(config.data.heldout + config.evaluation.ngram_corpus, config.data.max_bad_fraction)
    require_honest(config, tokenizer, [models[name].parent for name in (TRAINED, BASELINE) if name in models])
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
    second = _ngram_model(config, tokenizer, read_architecture(models[START]).vocab)
    _log.info("scoring", prefixes=len(prefixes), policies=len(policies))
    scorer = JudgeScorer(build_judge(config, "cpu"), episodes, tokenizer, config.teacher.max_failure_rate)
    comparison = compare(prefixes, originals, policies, scorer, second, seed=config.run.seed)
    return build_report(
        comparison,
        read_training_curves(folder),
        config,
        judge=describe_judge(config),
        second=None if second is None else _describe_ngram(second),
        examples=build_examples(prefixes, originals, policies, comparison, tokenizer, config.evaluation.examples),
    )


def _continue_all(
    config: Config, models: dict[str, Path], prefixes: Sequence[tuple[int, ...]]
) -> dict[str, Continuations]:
    """Continuations of every policy from one engine, whose weights are exchanged in between."""
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
    """Continues prefixes with the engine's weights of one version."""

    def __init__(self, engine: RolloutEngine, version: int, config: Config) -> None:
        self._engine = engine
        self._version = version
        self._length = config.data.suffix_length
        self._seed = config.run.seed

    def __call__(self, prefixes: Sequence[Tokens], greedy: bool, sample: int) -> list[tuple[int, ...]]:
        """One continuation per prefix. All policies draw with the same seeds."""
        prompts = [
            RolloutPrompt(tuple(prefix), derive_seed(self._seed, "evaluation", sample, index), greedy)
            for index, prefix in enumerate(prefixes)
        ]
        return [result.tokens for result in self._engine.generate(prompts, self._length, self._version)]


class JudgeScorer:
    """The training judge as a scorer: continuations of one prefix are judged as one group, as rollouts are."""

    def __init__(self, judge: Judge, episodes: Sequence[Episode], text: TextTokens, max_failure_rate: float) -> None:
        self._judge = judge
        self._text = text
        self._max_failure_rate = max_failure_rate
        self._episodes = {episode.prefix: episode for episode in episodes}

    def score(self, prefixes: Sequence[Tokens], continuations: Sequence[Tokens]) -> list[float | None]:
        """One score per continuation; None where the judge failed, or nothing was written.

        Raises:
            TeacherError: it failed on a larger share than the limit.
        """
        groups = []
        for prefix, rivals in groupby(zip(prefixes, continuations, strict=True), key=lambda pair: tuple(pair[0])):
            episode = self._episodes[prefix]
            written = (Candidate(Source.ROLLOUT, tuple(tokens)) for _, tokens in rivals)
            whole = (whole_characters(candidate, episode, self._text) for candidate in written)
            groups.append(Group(episode, tuple(marked_if_blank(candidate, self._text) for candidate in whole)))
        judged = self._judge.judge(groups)
        if check_failure_rate(judged, self._max_failure_rate):
            failed = failures(judged)
            _log.warning("the judge failed", reasons=most_frequent(failed), cause=first_cause(failed))
        return [reward.value if isinstance(reward, Reward) else None for group in judged for reward in group.rewards]


def _ngram_model(config: Config, tokenizer: PolicyTokenizer, vocab: int) -> NgramModel | None:
    """``vocab`` is the model's: it may be padded beyond the tokenizer's, and a policy may sample from the padding."""
    if not config.evaluation.ngram_corpus:
        return None
    return NgramModel(list(_ngram_documents(config, tokenizer)), vocab)


def _ngram_documents(config: Config, tokenizer: PolicyTokenizer) -> Iterator[Sequence[int]]:
    """What the n-gram model is fitted to: nothing that policies are compared on.

    Raises:
        DataError: a document is held out, and not to be left out.
    """
    data, left_out = config.data, 0
    held_out = kept_from_ngrams(config, tokenizer.vocabulary)
    for index, source in enumerate(config.evaluation.ngram_corpus):
        reader = open_source(source, data.max_record_bytes, tokenizer.vocabulary)
        bad = Quarantine(None, data.max_bad_fraction)
        bad.expect([(source.path, reader.sizes())])
        while (record := reader.read()) is not None:
            bad.count(record)
            if not isinstance(record, Document):
                continue
            if held_out and (place := held_out.find(held_out.text_of(record))):
                if data.heldout_overlap is HeldOutOverlap.refuse:
                    used = Location(f"evaluation.ngram_corpus[{index}]", source.path, record.id)
                    raise overlap_error(used, place, "the n-gram model")
                left_out += 1
                continue
            yield tokenizer.encode(record.text, source.control_tokens) if record.tokens is None else record.tokens
        bad.check()
    if left_out:
        _log.warning("documents of evaluation.ngram_corpus are held out as well; the n-gram model does without them",
                     documents=left_out)  # fmt: skip


def require_honest(config: Config, tokenizer: PolicyTokenizer, runs: Sequence[Path]) -> None:
    """Refuse to compare policies on documents that one of them may have been trained on.

    Args:
        config: of the run; what it holds out need not be what was held out while it was trained.
        tokenizer: of the policies.
        runs: folders of the runs that trained them.

    Raises:
        DataError: a document of the corpus is held out now and was not in one of ``runs``, or too many records of what
            is held out are malformed.
    """
    held_out = kept_from_training(config, tokenizer.vocabulary, runs[0] / "quarantine.jsonl")
    if held_out is None:
        return
    records = [RunRecord.read(folder) for folder in runs]
    if all(record is not None and record.held_out == held_out.digest for record in records):
        return
    _log.warning("other documents are held out than while the policy was trained, or nobody knows; comparing them with "
                 "data.sources")  # fmt: skip
    held_out.scan(config.data.sources, skips=False)


def _describe_ngram(model: NgramModel) -> str:
    return f"a Kneser-Ney n-gram model fitted to {model.tokens:,} tokens that no policy was trained on or continued"


def _fingerprint(config: Config, models: dict[str, Path]) -> str:
    """Changes when the configuration or any weight file does."""
    digest = hashlib.blake2b(to_yaml(config).encode(), digest_size=16)
    for name, folder in models.items():
        for path in sorted(folder.glob("*.safetensors")):
            facts = path.stat()
            digest.update(f"{name} {path.name} {facts.st_size} {facts.st_mtime_ns}".encode())
    return digest.hexdigest()


def _finished_report(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    try:
        report = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
        if report["fingerprint"] != fingerprint or not (folder / HTML_FILE).is_file():
            return None
        print_report(report, terminal.console(file=io.StringIO()))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None  # none, one of something else, or a damaged one, which is made anew
    return cast(dict[str, Any], report)
