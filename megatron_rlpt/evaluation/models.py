"""The models that an evaluation compares: what a path holds, and the Hugging Face folder that engines load."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rlpt.config import Config
from megatron_rlpt.convert.convert import convert
from megatron_rlpt.convert.formats import Format, recognise
from megatron_rlpt.errors import CheckpointError, ConfigError, ModelError
from megatron_rlpt.models.digest import folder_digest
from megatron_rlpt.observe import get_logger
from megatron_rlpt.observe.run_json import RunRecord
from megatron_rlpt.tokens.loading import tokenizer_facts

START, TRAINED, BASELINE = "start", "trained", "baseline"
"""Names of the models of a run: what it started from, what it made, and the same with next-token training."""
BASELINE_FOLDER = "baseline_ntp"
"""Run folder of the next-token baseline, inside the run folder of the policy."""

_EXPORT = "export"
_log = get_logger(__name__)


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate."""

    name: str
    path: Path
    """As the user gave it."""
    kind: str
    """``hf``, ``megatron``, ``gguf`` or ``run``."""
    folder: Path
    """Hugging Face folder with its weights."""
    digest: str
    """Of the files of its weights, configuration and tokenizer."""
    reference: bool = False
    """Whether the others are compared with it."""


def find_models(config: Config, models: Sequence[str], reference: str, cache: Path) -> list[EvaluatedModel]:
    """Return the models to evaluate, the reference first.

    Args:
        config: of the run; its ``export`` and that of its baseline are the models where ``models`` is empty.
        models: ``[NAME=]PATH`` of each.
        reference: ``[NAME=]PATH``; empty is ``model.path``.
        cache: folder for converted checkpoints, made on demand.

    Raises:
        ConfigError: two models have one name, or the run has exported nothing yet.
        ModelError: a path holds no model, or another tokenizer than the reference.
    """
    named = [_named(one) for one in models] or _of_run(Path(config.run.dir))
    first = _named(reference) if reference else (START, Path(config.model.path))
    names = [name for name, _ in (first, *named)]
    if double := next((name for name in names if names.count(name) > 1), ""):
        raise ConfigError(f"two models have the name {double!r}; name them, as in --model NAME=PATH")
    found = [_found(name, path, cache, name == first[0]) for name, path in (first, *named)]
    for model in found:
        _require_tokenizer(model, Path(config.model.path))
    return found


def _named(spec: str) -> tuple[str, Path]:
    """Split ``[NAME=]PATH``; without a name it is that of the folder."""
    name, equals, path = spec.partition("=")
    if equals and name and path and not Path(spec).exists():
        return name, Path(path)
    folder = Path(os.path.abspath(spec))  # a link has a name of its own
    return (folder.parent.name if folder.name == _EXPORT else folder.name) or spec, Path(spec)


def _of_run(folder: Path) -> list[tuple[str, Path]]:
    if not (folder / _EXPORT).is_dir():
        raise ConfigError(
            f"run.dir {folder} has no {_EXPORT}/ to evaluate; run 'rlpt train' with this configuration first, or name "
            "models with --model"
        )
    baseline = folder / BASELINE_FOLDER / _EXPORT
    return [(TRAINED, folder / _EXPORT)] + ([(BASELINE, baseline)] if baseline.is_dir() else [])


def _found(name: str, path: Path, cache: Path, is_reference: bool) -> EvaluatedModel:
    is_run = RunRecord.read(path) is not None
    source = path / _EXPORT if is_run and (path / _EXPORT).is_dir() else path
    held = recognise(source)
    digest = folder_digest(held.path) if held.path.is_dir() else folder_digest(held.path.parent, (held.path.name,))
    kind = "run" if is_run else held.format.value
    folder = held.path if held.format is Format.HF else _converted(source, cache / "models" / digest)
    return EvaluatedModel(name, path, kind, folder, digest, is_reference)


def _converted(source: Path, target: Path) -> Path:
    """Return ``target``, the checkpoint ``source`` as a Hugging Face folder; convert it unless that was done before."""
    if (target / "config.json").is_file():
        return target
    _log.info("converting", checkpoint=source, to=target)
    try:
        convert(source, target, Format.HF)
    except (CheckpointError, ConfigError):
        # Another process may have been faster: the folder appears whole or not at all.
        if not (target / "config.json").is_file():
            raise
    return target


def _require_tokenizer(model: EvaluatedModel, wanted: Path) -> None:
    if model.folder.resolve() == wanted.resolve():
        return
    own, other = tokenizer_facts(model.folder), tokenizer_facts(wanted)
    differ = [
        part
        for part in ("model", "added_tokens", "normalizer", "pre_tokenizer")
        if own.layout.get(part) != other.layout.get(part)
    ]
    if differ or own.bos_id != other.bos_id:
        raise ModelError(
            f"{model.path} has another tokenizer ({', '.join(differ) or 'bos_token'}) than model.path {wanted}; models "
            "are compared on the same tokens, so set model.path to the folder of one of them and compare only models "
            "with its tokenizer"
        )


def same_architecture(one: Path, other: Path) -> bool:
    """Return whether an engine that serves one of two folders can take the weights of the other."""
    from megatron_rlpt.models.architecture import read_architecture
    from megatron_rlpt.models.families import expected_shapes

    with contextlib.suppress(ModelError):
        first, second = read_architecture(one), read_architecture(other)
        return first == second and expected_shapes(first) == expected_shapes(second)
    return False
