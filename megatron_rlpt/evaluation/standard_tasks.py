"""Standard tasks by lm-eval (EleutherAI's lm-evaluation-harness), on data that the user has.

lm-eval makes the requests of a task, its Hugging Face model class answers them, and its metrics become results:

    evaluation.tasks --> loaded tasks --> stored for this model and these questions? --> shares of ranks --> results

Data is read from the cache of Hugging Face's datasets (``HF_HOME``) or from files that a task names. Nothing is
downloaded unless the environment says ``HF_HUB_OFFLINE=0``.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_rlpt.config import Config, EvaluationConfig
from megatron_rlpt.config.evaluation_tasks import TaskChoice, parse_tasks
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import ConfigError, DataError, first_line
from megatron_rlpt.evaluation.content_cache import ContentCache, content_key
from megatron_rlpt.evaluation.models import EvaluatedModel
from megatron_rlpt.evaluation.results import Result, Scale, SetFacts
from megatron_rlpt.evaluation.statistics import win_rate
from megatron_rlpt.observe.log import get_logger
from megatron_rlpt.plain_text import shortened

FOLDERS = {
    "boolq": "super_glue/boolq",
    "piqa": "piqa",
    "social_iqa": "siqa",
    "hellaswag": "hellaswag",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "openbookqa": "openbookqa",
    "mmlu": "mmlu/default",
    "truthfulqa_mc1": "truthfulqa",
    "truthfulqa_mc2": "truthfulqa",
}
"""Folders of lm-eval's own tasks by name. Reading all of its 14,000 task files takes most of a minute."""
_SEED = 1234
"""Of the examples in a prompt; lm-eval's default."""
_BOOTSTRAP = 1000
"""Resamples for metrics that are no mean."""
_SHARES = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "f1"}
"""Metrics between 0 and 1."""
_QUANTILE = 1.959964
_log = get_logger(__name__)


@dataclass(frozen=True)
class LoadedTask:
    """A task of lm-eval, or a group of them, with its data."""

    choice: TaskChoice
    contents: dict[str, Any]
    """As lm-eval's ``TaskManager.load`` returns it."""
    digest: str
    """Of the questions, the examples and the settings."""
    facts: SetFacts


@dataclass(frozen=True)
class Score:
    """One metric of a task."""

    metric: str
    value: float
    error: float | None
    """Standard error; None where lm-eval has none."""
    questions: int
    higher_is_better: bool | None


def open_tasks(settings: EvaluationConfig) -> list[LoadedTask]:
    """Load ``evaluation.tasks`` with their data; done before anything is generated, so that what is absent shows early.

    Raises:
        ConfigError: lm-eval is not installed, does not know a task, or cannot read it.
        DataError: the data of a task is not on this machine.
    """
    choices = parse_tasks(settings.tasks)
    if not choices:
        return []
    require_lm_eval()
    return load_tasks(choices, settings.tasks_path, settings.tasks_limit)


def standard_results(
    config: Config,
    tasks: Sequence[LoadedTask],
    models: Sequence[EvaluatedModel],
    cache: Path,
    device: str = "cpu",
    ranks: Ranks | None = None,
) -> list[Result]:
    """Return one result per metric, task and model; a collective.

    Args:
        config: with resolved precisions.
        tasks: as ``open_tasks`` returns them.
        models: to measure.
        cache: folder of stored results.
        device: torch device of this process.
        ranks: share the questions; None is a world of one.

    Raises:
        ConfigError: a task needs a package that is not installed, or runs code that a model wrote.
        ModelError: a model cannot be loaded.
    """
    ranks = ranks or Ranks()
    results = []
    for model in models:
        store = ContentCache(cache / "tasks" / f"{model.digest}-{config.model.dtype.name}", ranks.rank)
        answering: Any = None
        for task in tasks:
            found = ranks.broadcast(store.get(task.digest))
            if found is None:
                answering = answering or _model_of(config, model, device, ranks)
                _log.info("standard task", model=model.name, task=str(task.choice), questions=task.facts.prompts)
                found = [vars(score) for score in _scores(task, answering, config.evaluation.tasks_limit)]
                if ranks.is_main:
                    store.put({task.digest: found})
            results += [_result(Score(**one), model.name, task) for one in found]
    return results


def require_lm_eval() -> None:
    """Check that lm-eval is installed.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "evaluation.tasks needs lm-eval, which is not installed; pip install 'megatron-rlpt[lm-eval]' or empty "
            "evaluation.tasks"
        )


def load_tasks(choices: Sequence[TaskChoice], path: str = "", limit: int = 0) -> list[LoadedTask]:
    """Load tasks with their data.

    Args:
        choices: what to load.
        path: folder with task files of the user's; they come before lm-eval's own of the same name.
        limit: questions of each task; 0 is all.

    Raises:
        ConfigError: a task is unknown or cannot be read, or ``path`` is no folder.
        DataError: data of a task is not on this machine.
    """
    if path and not Path(path).is_dir():
        raise ConfigError(f"evaluation.tasks_path is {path}, which is no folder; name the one with your task files")
    with _quiet(), _offline():
        manager = _manager(choices, path)
        return [_load(manager, choice, path, limit) for choice in choices]


def _manager(choices: Sequence[TaskChoice], path: str) -> Any:
    """Return lm-eval's index of tasks, of as few files as the names allow."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    own = lm_eval.tasks.TaskManager(include_path=[path], include_defaults=False).all_tasks if path else []
    names = [choice.name for choice in choices if choice.name not in own]
    known = all(name in FOLDERS for name in names)
    folders = [root / FOLDERS[name] for name in names] if known else []
    include = [*dict.fromkeys(folders), *([path] if path else [])]
    return lm_eval.tasks.TaskManager(include_path=include or None, include_defaults=not known)


def _load(manager: Any, choice: TaskChoice, path: str, limit: int) -> LoadedTask:
    contents = _read(manager, choice, path)
    leaves: dict[str, Any] = contents["tasks"]
    digest = hashlib.blake2b(digest_size=16)
    for name, task in sorted(leaves.items()):
        shots = task.get_config("num_fewshot") if choice.shots is None else choice.shots
        task.set_config(key="num_fewshot", value=shots or 0)
        digest.update(f"\n{name} {shots or 0}".encode())
        for document in (*task.eval_docs, *(task.fewshot_docs() if shots else ())):
            digest.update(json.dumps(document, sort_keys=True, default=str).encode())
    for file in sorted(Path(path).rglob("*")) if path else ():
        if file.suffix in (".yaml", ".yml", ".py"):
            digest.update(file.read_bytes())
    first = next(iter(leaves.values()))
    questions = sum(min(limit or len(task.eval_docs), len(task.eval_docs)) for task in leaves.values())
    data = str(first.get_config("dataset_path") or "")
    if len(leaves) == 1 and (subset := first.get_config("dataset_name")):
        data = f"{data} {subset}"
    key = content_key(metadata.version("lm_eval"), str(choice), limit, digest.hexdigest())
    return LoadedTask(choice, contents, key, SetFacts(str(choice), "lm-eval", data, questions))


def _read(manager: Any, choice: TaskChoice, path: str) -> dict[str, Any]:
    if choice.name not in manager.all_tasks:
        release = f"lm-eval {metadata.version('lm_eval')}"
        where = f"neither a task of {release} nor in {path}" if path else f"no task of {release}"
        raise ConfigError(
            f"evaluation.tasks has {choice.name!r}, which is {where}; 'lm-eval ls tasks' lists its tasks, and "
            "evaluation.tasks_path adds yours"
        )
    try:
        contents: dict[str, Any] = manager.load([choice.name])
    except (ConnectionError, FileNotFoundError) as error:
        raise DataError(
            f"the data of task {choice.name} is not on this machine ({shortened(first_line(error), 160)}): fetch that "
            "dataset into HF_HOME with datasets.load_dataset where there is a network, and set HF_HOME here, or give a "
            "task file of your own that names local files (evaluation.tasks_path)"
        ) from None
    except ImportError as error:
        raise _lacking(choice, error) from None
    except Exception as error:  # lm-eval and datasets raise any type for a task file that they cannot use
        raise ConfigError(
            f"the task {choice.name} cannot be loaded: {type(error).__name__}: {shortened(str(error))}"
        ) from error
    if not contents["tasks"]:
        raise ConfigError(f"the task {choice.name} has no questions; look at its file")
    return contents


def _lacking(choice: TaskChoice, error: ImportError) -> ConfigError:
    return ConfigError(
        f"the task {choice.name} needs a package that is not installed ({first_line(error)}); pip install "
        "'megatron-rlpt[lm-eval]'"
    )


def _model_of(config: Config, model: EvaluatedModel, device: str, ranks: Ranks) -> Any:
    from megatron_rlpt.evaluation.lm_eval_model import answering_model

    with _quiet():
        return answering_model(model.folder, device, config.model.dtype, config.evaluation.batch_tokens, ranks)


def _scores(task: LoadedTask, model: Any, limit: int) -> list[Score]:
    """Return every metric of a task, or of the tasks of a group that has none of its own."""
    from lm_eval.evaluator import evaluate

    for one in task.contents["tasks"].values():
        one.set_fewshot_seed(seed=_SEED)
    try:
        with _quiet(), _offline():
            found = evaluate(
                lm=model, task_dict=task.contents, limit=limit or None, bootstrap_iters=_BOOTSTRAP, log_samples=False
            )
    except ImportError as error:
        raise _lacking(task.choice, error) from None
    except ValueError as error:
        if "unsafe" not in str(error):
            raise
        raise ConfigError(f"the task {task.choice.name} runs code that a model wrote, which is never done") from None
    name = task.choice.name
    rows: Mapping[str, Any] = found["results"]
    if name in rows and any(_is_metric(key) for key in rows[name]):
        return _metrics(rows[name], found["higher_is_better"].get(name) or {}, "")
    return [
        score
        for part in task.contents["tasks"]
        for score in _metrics(rows[part], found["higher_is_better"].get(part) or {}, f" of {part}")
    ]


def _metrics(row: Mapping[str, Any], higher: Mapping[str, bool], suffix: str) -> list[Score]:
    scores = []
    for key, value in row.items():
        if not _is_metric(key) or not isinstance(value, int | float):
            continue
        metric, _, answers = key.partition(",")
        error = row.get(f"{metric}_stderr,{answers}")
        named = metric if answers == "none" else f"{metric} ({answers})"
        known = float(error) if isinstance(error, int | float) else None
        scores.append(Score(f"{named}{suffix}", float(value), known, int(row["sample_len"]), higher.get(metric)))
    return scores


def _is_metric(key: str) -> bool:
    return "," in key and "_stderr," not in key


def _result(score: Score, model: str, task: LoadedTask) -> Result:
    metric = score.metric.split(" ", 1)[0]
    share = metric in _SHARES and 0 <= score.value <= 1
    return Result(
        score.metric,
        Scale.share if share else Scale.value,
        model,
        task.facts.name,
        score.value,
        _interval(score, share),
        n=score.questions,
        prompts=score.questions,
        higher_is_better=score.higher_is_better,
    )


def _interval(score: Score, share: bool) -> tuple[float, float] | None:
    """Return the 95 % interval of a normal distribution; where all answers are alike, the exact one."""
    if share and score.value in (0.0, 1.0):
        return win_rate([[score.value]] * score.questions).ci95 if score.questions > 1 else None
    if score.error is None:
        return None
    low, high = score.value - _QUANTILE * score.error, score.value + _QUANTILE * score.error
    return (max(0.0, low), min(1.0, high)) if share else (low, high)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep datasets off the network inside the block, unless the environment allows it."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("0", "false", "no", "off"):
        yield
        return
    import datasets
    import huggingface_hub.constants as hub

    before = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True  # read from the environment when they were imported
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the notes of lm-eval and datasets, and their progress bars, out of the terminal."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels, bars = [one.level for one in loggers], datasets.are_progress_bars_disabled()
    for one in loggers:
        one.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
