"""Resolve ``model.dtype`` and ``teacher.dtype`` where they are ``auto``: once per run, before anything is loaded.

1. An explicit value wins.
2. Else the value that the run folder records, so that a resumed or evaluated run keeps its precision.
3. Else bf16 on a machine with a GPU or with CPU kernels for bf16, and fp32 on any other.

Rank 0 of the trainer resolves for all ranks. ``rlpt launch`` resolves for all components: on this machine by the same
rules, on Slurm ``teacher.dtype`` by the GPUs that the cluster file requests; only the trainer uses ``model.dtype``.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_rlpt.config import Config, Dtype, Fp8
from megatron_rlpt.errors import CheckpointError
from megatron_rlpt.observe.machine import bf16_is_slow
from megatron_rlpt.observe.run_json import RunRecord


def resolve_dtypes(config: Config, *, teacher: bool = True, fresh: bool = False) -> Config:
    """Return ``config`` with bf16 or fp32 in place of ``auto``.

    Args:
        config: of the run.
        teacher: whether this process loads or serves the teacher; else ``teacher.dtype`` stays as it is.
        fresh: ignore what the run folder records.
    """
    recorded = {} if fresh else _recorded(Path(config.run.dir))
    here = Dtype.fp32 if bf16_is_slow() else Dtype.bf16
    policy = here if config.model.fp8 is Fp8.off else Dtype.bf16
    model_dtype = _resolved(config.model.dtype, recorded.get("model.dtype"), policy)
    teacher_dtype = _resolved(config.teacher.dtype, recorded.get("teacher.dtype"), here)
    return with_dtypes(config, model_dtype, teacher_dtype if teacher else config.teacher.dtype)


def with_dtypes(config: Config, model: Dtype, teacher: Dtype) -> Config:
    """Return ``config`` with these precisions."""
    return replace(config, model=replace(config.model, dtype=model), teacher=replace(config.teacher, dtype=teacher))


def recorded_teacher_dtype(config: Config) -> Dtype | None:
    """Return the precision of the teacher that the run folder records; None without one."""
    found = _resolved(Dtype.auto, _recorded(Path(config.run.dir)).get("teacher.dtype"), Dtype.auto)
    return None if found is Dtype.auto else found


def _resolved(chosen: Dtype, recorded: Any, here: Dtype) -> Dtype:
    if chosen is not Dtype.auto:
        return chosen
    return Dtype(recorded) if recorded in (Dtype.bf16.name, Dtype.fp32.name) else here


def _recorded(folder: Path) -> dict[str, Any]:
    """Read the recorded configuration; empty where there is none. The trainer reports a damaged record itself."""
    with contextlib.suppress(CheckpointError):
        if (record := RunRecord.read(folder)) is not None:
            return record.config
    try:  # a run from before run folders had a record
        found = OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "model.dtype")
    except Exception:  # yaml and OmegaConf raise families of their own
        return {}
    return {"model.dtype": found}
