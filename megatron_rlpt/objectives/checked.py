"""A user's objective, with everything it returns checked: a mistake in it is one line, never a silent number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_rlpt.errors import TrainingError
from megatron_rlpt.extensions import describe_error
from megatron_rlpt.objectives.facts import ObjectiveFacts
from megatron_rlpt.objectives.objective import LossInputs, LossTerms, Objective
from megatron_rlpt.objectives.selection import Example, Selection
from megatron_rlpt.types import Group

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")


class CheckedObjective:
    """An ``Objective`` around one from outside of the package."""

    def __init__(self, inner: Objective, name: str) -> None:
        """
        Args:
            inner: the user's objective.
            name: of its class, for errors.
        """
        self.inner = inner
        self.name = name
        self.facts: ObjectiveFacts = inner.facts

    def select(self, groups: Sequence[Group]) -> Selection:
        """Have the inner objective select.

        Raises:
            TrainingError: it raises, or selects what is not there or not allowed.
        """
        selection = self._call("select", lambda: self.inner.select(groups))
        if not isinstance(selection, Selection):
            raise self._problem("select", f"returned {type(selection).__name__}, not a Selection")
        by_id = {group.episode.id: group for group in groups}
        seen = [example.episode.id for example in selection.examples] + list(selection.skipped)
        if sorted(seen) != sorted(by_id):
            raise self._problem(
                "select",
                f"accounted for {len(seen)} groups of {len(by_id)}, or for others; every group has to be an example or "
                "skipped with a reason",
            )
        for example in selection.examples:
            self._check(example, by_id[example.episode.id])
        return selection

    def loss(self, inputs: LossInputs) -> LossTerms:
        """Have the inner objective compute the loss.

        Raises:
            TrainingError: it raises, or returns no finite number per example.
        """
        terms = self._call("loss", lambda: self.inner.loss(inputs))
        if not isinstance(terms, LossTerms):
            raise self._problem("loss", f"returned {type(terms).__name__}, not LossTerms")
        self._check_tensor("loss", terms.loss, len(inputs.sizes))
        if not terms.loss.requires_grad:
            raise self._problem("loss", "returned a loss without a gradient; compute it from inputs.logprobs")
        for metric, values in terms.metrics.items():
            self._check_tensor(f"metric {metric!r}", values, len(inputs.sizes))
        return LossTerms(terms.loss, {name: values.detach() for name, values in terms.metrics.items()})

    def _check(self, example: Example, group: Group) -> None:
        count = len(example.sequences)
        most = self.facts.sequences if self.facts.sequences is not None else len(group.candidates)
        if not 1 <= count <= most:
            raise self._problem("select", f"selected {count} sequences for an example; its facts allow 1 to {most}")
        places = [index for index in example.indices if 0 <= index < len(group.candidates)]
        if [group.candidates[index] for index in places] != list(example.sequences):
            raise self._problem("select", "selected sequences that are not the candidates at example.indices")
        if example.advantages and len(example.advantages) != count:
            raise self._problem("select", f"set {len(example.advantages)} advantages for {count} sequences")
        for candidate in example.sequences:
            if candidate.blank or not candidate.tokens:
                raise self._problem("select", "selected a candidate without text")
            if candidate.source not in self.facts.trains_on:
                raise self._problem("select", f"selected a {candidate.source.value}, which its facts.trains_on lacks")

    def _check_tensor(self, what: str, values: Any, examples: int) -> None:
        import torch

        if not isinstance(values, torch.Tensor) or values.shape != (examples,):
            shape = list(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
            raise self._problem("loss", f"returned a {what} of {shape}; it has to be a tensor of [{examples}] examples")
        if not bool(torch.isfinite(values.detach()).all()):
            raise self._problem("loss", f"returned a {what} that is not finite: {values.detach().tolist()}")

    def _call(self, method: str, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except Exception as error:
            raise self._problem(method, f"raised {describe_error(error)}") from error

    def _problem(self, method: str, what: str) -> TrainingError:
        return TrainingError(f"objective {self.name}: {method} {what}")
