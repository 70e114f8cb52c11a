"""Loading the policy's weights into the rollout layout.

A source with a Megatron model is resharded from the training layout by ``megatron.core.resharding``. Other sources (a
folder on disk) stream Hugging Face tensors, which the rules of the model's family map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.resharding import execute_reshard_plan, get_or_create_service

from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import EngineError
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.models.families import OUTPUT, Rule, expected_shapes, mapping
from megatron_rlpt.models.sharding import Sharding, shard
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.layout import Layout
from megatron_rlpt.policy.megatron_compat import plan_transfers
from megatron_rlpt.policy.weights import named_parameters
from megatron_rlpt.rollout.weight_sync.manifest import WeightManifest, Weights


@runtime_checkable
class MegatronModelSource(Protocol):
    """A source of weights that also exposes the Megatron model that holds them."""

    @property
    def model_chunks(self) -> Sequence[GPTModel]:
        """This rank's model chunks in the training layout, one per virtual stage."""
        ...


class RolloutWeights:
    """The weights of one rollout model and both ways of replacing them; its methods are collectives of all ranks."""

    def __init__(self, model: GPTModel, arch: Architecture, runtime: DeviceRuntime, ranks: Ranks) -> None:
        """Manage the weights of ``model``, built by ``rollout/megatron/model.py: build_rollout_model``."""
        self._arch = arch
        self._runtime = runtime
        self._ranks = ranks
        self._manifest = WeightManifest(expected_shapes(arch), next(model.parameters()).dtype)
        self._rules = {rule.megatron: rule for rule in mapping(arch)}
        self._parameters = named_parameters([model], arch, Layout())
        assert self._parameters.keys() == self._rules.keys(), "every tensor-parallel group holds a whole dense model"
        self._tensor = model.pg_collection.tp
        self._target = _View(self._parameters, model)
        self._mark(self._parameters)
        self._plan: Any = None

    def load(self, weights: Weights) -> None:
        """Load whole Hugging Face tensors, in any order, the same on every rank; each rank keeps its shard.

        Raises:
            EngineError: names or shapes differ from the model's, which is then partly overwritten.
        """
        parts: dict[str, torch.Tensor] = {}
        owner = {name: rule for rule in self._rules.values() for name in rule.hf}
        rank, size = self._tensor.rank(), self._tensor.size()
        for name, tensor in self._manifest.checked(weights):
            rule = owner[name]
            parts[name] = tensor
            if all(part in parts for part in rule.hf):
                whole = rule.merge(self._arch, [parts.pop(part) for part in rule.hf])
                with torch.no_grad():
                    self._parameters[rule.megatron].copy_(shard(whole, rule.sharding, rank, size))

    def reshard(self, model_chunks: Sequence[GPTModel]) -> None:
        """Load the weights of a model in the training layout.

        Transfers are planned once. Tensors move between ranks through NCCL on GPUs and gloo on CPUs, and are copied
        within a rank. This needs memory for one more copy of this rank's rollout weights.

        Raises:
            EngineError: names, shapes or precision of the two models differ.
            TrainingError: a rank did not arrive in time; names it.
        """
        self._ranks.barrier("the exchange of weights")
        parameters = named_parameters(model_chunks, self._arch, Layout())
        self._require_same(parameters)
        self._mark(parameters)
        with self._runtime.megatron(), torch.no_grad():
            source = _View(parameters, model_chunks[0])
            if self._plan is None:
                self._plan = plan_transfers(source, self._target)
            service = get_or_create_service("nccl" if self._runtime.on_cuda else "gloo")
            execute_reshard_plan(self._plan, source, self._target, service=service)

    def randomise(self) -> None:
        """Replace every weight by random values."""
        generator = torch.Generator(self._runtime.device).manual_seed(0)
        with torch.no_grad():
            for parameter in self._parameters.values():
                parameter.uniform_(-0.05, 0.05, generator=generator)

    def digests(self) -> dict[str, str]:
        """Return Megatron name -> digest of this rank's shard of every weight."""
        return {
            name: hashlib.blake2b(
                parameter.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes(), digest_size=16
            ).hexdigest()
            for name, parameter in self._parameters.items()
        }

    def _require_same(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Raise on all ranks if one finds a difference, so that no rank waits for transfers that never come.

        Megatron's planner only looks for missing weights, and up to 0.18 raises on rank 0 alone.
        """
        planned = self._plan is not None
        names = [] if planned else list(parameters)
        everything = self._ranks.all_gather((next(self._differences(parameters), None), names))
        problem = next((found for found, _ in everything if found), None)
        absent = self._rules.keys() - {name for _, names in everything for name in names}
        if absent and not problem and not planned:
            problem = f"{len(absent)} weights were not sent, the first is {min(absent)!r}"
        if problem:
            raise EngineError(problem)

    def _differences(self, parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[str]:
        for name, parameter in parameters.items():
            own = self._parameters.get(name)
            if own is None:
                # The last pipeline stage has a copy of a tied embedding, under the output layer's name.
                if not (name == OUTPUT and self._arch.tied_embeddings):
                    yield f"weight {name!r} is not part of the engine's model"
            elif parameter.shape != own.shape:
                yield f"weight {name!r} was sent as {tuple(parameter.shape)}; the engine's is {tuple(own.shape)}"
            elif parameter.dtype != own.dtype:
                yield f"weight {name!r} was sent as {parameter.dtype}; the engine's is {own.dtype}"

    def _mark(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Mark how each weight is sharded, for the planner.

        Megatron sets these marks when it draws random weights (``megatron/core/tensor_parallel/layers.py:
        _initialize_affine_weight_cpu``). A model built without would be treated as replicated.
        """
        for name, parameter in parameters.items():
            rule = self._rules.get(name)
            if rule is not None and rule.sharding is not Sharding.WHOLE:
                _set_marks(parameter, rule)


def _set_marks(parameter: Any, rule: Rule) -> None:
    parameter.tensor_model_parallel = True
    parameter.partition_dim = 1 if rule.sharding is Sharding.COLUMNS else 0
    parameter.partition_stride = 2 if rule.sharding is Sharding.HALVES else 1


class _View(torch.nn.Module):
    """The parameters of all model chunks under their names in the whole model, as one module for Megatron's planner."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], model: GPTModel) -> None:
        super().__init__()
        self.config = model.config
        self.pg_collection: ProcessGroupCollection = model.pg_collection
        self._by_name = dict(parameters)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return iter(self._by_name.items())
