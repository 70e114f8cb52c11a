"""The state that a checkpoint keeps of a run, written and read under the same keys.

``state.json`` holds what is listed in ``RunState``; the policy's own state (weights, optimizer) is in ``policy/``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from typing_extensions import override

from megatron_rlpt.checkpoint import Checkpoint, CheckpointStore
from megatron_rlpt.checkpoint.folders import step_of
from megatron_rlpt.config import Config, flatten
from megatron_rlpt.distributed.ranks import Ranks, is_lost_contact
from megatron_rlpt.errors import CheckpointError
from megatron_rlpt.observe import get_logger
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.trainer.fixed_evaluation import RepeatedEvaluation
from megatron_rlpt.trainer.learning import Learning
from megatron_rlpt.trainer.pipeline import Pipeline
from megatron_rlpt.trainer.train import Saver, Training

_log = get_logger(__name__)

_VERSION, _PIPELINE, _RANDOM, _LEARNING, _CONFIG = "version", "pipeline", "random", "learning", "config"
_EVALUATION = "evaluation"
"""Keys of ``state.json``; ``CheckpointStore`` adds ``step``."""


@dataclass(frozen=True)
class RunState:
    """The parts of a run that have state."""

    config: Config
    policy: Policy
    pipeline: Pipeline
    learning: Learning
    evaluation: RepeatedEvaluation | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the policy's own state, JSON-serializable."""
        return {
            _VERSION: self.policy.version,
            _PIPELINE: self.pipeline.state_dict(),
            _RANDOM: random_state(),
            _LEARNING: self.learning.state_dict(),
            _CONFIG: flatten(self.config),
        } | ({} if self.evaluation is None else {_EVALUATION: self.evaluation.state_dict()})

    def load(self, checkpoint: Checkpoint) -> None:
        """Load the state and the policy from ``checkpoint``.

        Raises:
            CheckpointError: the weights and the state are from different steps.
        """
        self.policy.load(checkpoint.policy)
        state = checkpoint.state
        self.pipeline.load_state_dict(state[_PIPELINE])
        self.learning.load_state_dict(state[_LEARNING])
        if self.evaluation is not None:
            self.evaluation.load_state_dict(state[_EVALUATION])
        set_random_state(state[_RANDOM])
        if self.policy.version != state[_VERSION]:
            raise CheckpointError(
                f"{checkpoint.folder} holds weights of version {self.policy.version} and a state of version "
                f"{state[_VERSION]}; delete it to resume from the checkpoint before"
            )


def config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the configuration, by dotted key, of the run that wrote ``checkpoint``."""
    return checkpoint.state[_CONFIG]


def restore(run: Training, checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Resume ``run`` from ``checkpoint``; a collective.

    Raises:
        CheckpointError: a part of the checkpoint is missing or unreadable on some rank; the same error on every rank.
    """
    ranks.run_on_all_ranks(lambda: _load(run, checkpoint), "the end of loading the checkpoint")
    run.done = checkpoint.step
    if run.engine:
        run.engine.update_weights(run.policy.weights(), run.policy.version)
    _log.info("resumed", checkpoint=checkpoint.folder, steps=run.done, version=run.policy.version)


def _load(run: Training, checkpoint: Checkpoint) -> None:
    try:
        RunState(run.config, run.policy, run.pipeline, run.learning, run.evaluation).load(checkpoint)
    except CheckpointError:
        raise
    except Exception as error:
        if is_lost_contact(error):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"checkpoint {checkpoint.folder} cannot be loaded ({type(error).__name__}: {reason}); delete it to resume "
            "from the checkpoint before, or start over with --fresh"
        ) from error


@dataclass(frozen=True)
class RunSaver(Saver):
    """Saves a run's state in its checkpoint store."""

    state: RunState
    store: CheckpointStore
    on_published: Callable[[], None]
    """Called on all ranks after every published checkpoint."""

    @override
    def save(self, done: int) -> None:
        model = Path(self.state.config.model.path)
        self._report(self.store.save(done, self.state.state_dict(), self.state.policy, model))

    @override
    def poll(self) -> None:
        self._report(self.store.poll())

    @override
    def finish(self) -> None:
        self._report(self.store.finish())

    def _report(self, published: Path | None) -> None:
        if published is not None:
            _log.info("checkpoint", path=published)
            self.on_published()
            self.state.pipeline.acknowledge(step_of(published))


def seed_all(seed: int) -> None:
    """Seed the process-wide generators, for libraries that draw from them; this package passes seeds explicitly."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Return the states of the process-wide generators, JSON-serializable."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = numpy.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, [int(key) for key in keys], position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        # This rank's GPU only: reading the state of another one would create a context on it.
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else "",
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the process-wide generators to a ``random_state``."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(_bytes_tensor(state["torch"]))
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(_bytes_tensor(state["cuda"]))


def _bytes_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
