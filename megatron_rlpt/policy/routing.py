"""The routers of the policy's experts: recorded routing, load balancing, and figures of both.

Megatron's router lets one object decide which experts a token gets (``megatron/core/transformer/moe/moe_utils.py:
topk_routing_with_score_function``, argument ``router_replay``). Ours follows the records of the rollout engine where
there are any (routing replay, arXiv 2510.11370, section 3): the experts are the recorded ones, their weights are the
router's own, with gradient. Megatron's class for it replays all tokens of a batch or none.

The load-balancing loss is that of Switch Transformers (arXiv 2101.03961, section 2.2) over all tokens of an update. For
every layer with E experts, of which a token gets k, it is ``E * sum of f_i * P_i``, where f_i is expert i's share of
all T * k choices and P_i its mean probability; 1 if every expert gets as much as any other. Megatron's own is that of
every micro-batch, so its gradient would depend on how an update is divided. f_i has no gradient: a pass without
gradients counts it first, and the loss is then a sum over tokens, to which any micro-batch on any rank adds its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.policy.batching import Batch
from megatron_rlpt.policy.layout import Layout
from megatron_rlpt.policy.model import HiddenStateModel

_TopK = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class RoutedTokens:
    """The tokens of a micro-batch in the order in which this rank's routers see them."""

    counted: torch.Tensor
    """[tokens] bool: the tokens that count, once each."""
    experts: torch.Tensor | None
    """[tokens, layers, per token] int16: recorded experts, -1 where there are none."""


class Routers:
    """The routers of this rank's model chunks."""

    def __init__(
        self,
        model_chunks: Sequence[HiddenStateModel],
        arch: Architecture,
        layout: Layout,
        *,
        replay: bool,
        aux_loss: float,
    ) -> None:
        """Take over the choice of experts.

        Args:
            model_chunks: this rank's model chunks.
            arch: a mixture of experts.
            layout: the training layout.
            replay: follow the records of a batch.
            aux_loss: coefficient of the load-balancing loss of every layer.
        """
        assert arch.experts is not None
        self._layers, self._experts, self._per_token = arch.layers, arch.experts.count, arch.experts.per_token
        self._layout, self._replays, self._aux_loss = layout, replay, aux_loss
        device = next(model_chunks[0].parameters()).device
        self._tallies = torch.zeros(arch.layers, 2 * self._experts + 2, dtype=torch.float64, device=device)
        self._slopes = torch.zeros(arch.layers, self._experts, device=device)
        self._tokens: list[RoutedTokens] = []
        self._number: int | None = None
        self._counts = self._balances = False
        self._hooks = []
        for model_chunk in model_chunks:
            for layer in model_chunk.decoder.layers:
                hook = _Router(self, layer.layer_number - 1, already_softmax=not arch.experts.normalized)
                layer.mlp.router.router_replay = hook
                self._hooks.append(hook)

    @contextlib.contextmanager
    def over(self, batches: Sequence[Batch], *, replay: bool, count: bool, balance: bool = False) -> Iterator[None]:
        """Route the tokens of ``batches`` inside the block.

        Args:
            batches: the micro-batches, in the order in which their backward passes run.
            replay: follow their records, if the policy does.
            count: count choices and probabilities anew, for ``metrics`` and ``aim``.
            balance: add the load-balancing loss as ``aim`` set it.
        """
        self._tokens = [self._local(batch, replay=replay and self._replays) for batch in batches]
        self._counts, self._balances = count, balance
        for hook in self._hooks:
            hook.repeated = 0
        if count:
            self._tallies.zero_()
        try:
            yield
        finally:
            self._tokens = []

    @contextlib.contextmanager
    def micro_batch(self, number: int) -> Iterator[None]:
        """Run the forward pass of one of the batches inside the block.

        Whatever is routed outside is computed again in a backward pass.
        """
        self._number = number
        try:
            yield
        finally:
            self._number = None

    def aim(self, tokens: int, examples: int) -> None:
        """Set the load-balancing loss by the choices that were counted; a collective of all ranks.

        Args:
            tokens: number of all counted tokens of the update, on all ranks.
            examples: number of its examples, by which gradients are divided in the end.
        """
        chosen = self._totals()[:, : self._experts]
        # The derivative of the loss with respect to the sum of the probabilities of an expert.
        shares = chosen / (tokens * self._per_token)
        self._slopes.copy_(examples * self._aux_loss * self._experts * shares / tokens)

    def metrics(self, tokens: int) -> dict[str, float]:
        """Return what was counted; a collective of all ranks.

        Args:
            tokens: number of all counted tokens, on all ranks.

        Returns:
            ``router/max_load`` (load of the fullest expert over the mean load) and ``router/aux_loss`` (the
            load-balancing loss without its coefficient), means over layers; and if any token has a record,
            ``router/replayed`` (share of all choices for a token in a layer that were recorded) and
            ``router/replay_changed`` (share of those in which the router would have chosen other experts).
        """
        totals, experts = self._totals().cpu(), self._experts
        shares = totals[:, :experts] / (tokens * self._per_token)
        probabilities = totals[:, experts : 2 * experts] / tokens
        found = {
            "router/max_load": float(experts * shares.amax(1).mean()),
            "router/aux_loss": float(experts * (shares * probabilities).sum(1).mean()),
        }
        recorded, changed = totals[:, 2 * experts :].sum(0).tolist()
        if recorded:
            found["router/replayed"] = recorded / (tokens * self._layers)
            found["router/replay_changed"] = changed / recorded
        return found

    def current(self, hook: _Router) -> tuple[RoutedTokens, bool] | None:
        """Return the tokens that ``hook`` routes now, and whether for the first time; None outside of ``over``."""
        if not self._tokens:
            return None
        if self._number is not None:
            return self._tokens[self._number], True
        # Every layer computes its micro-batches again in their order (Megatron's schedules run the backward passes of
        # a model chunk in that of the forward passes).
        hook.repeated += 1
        return self._tokens[hook.repeated - 1], False

    def tally(self, layer: int, chosen: torch.Tensor, probabilities: torch.Tensor, replayed: torch.Tensor) -> None:
        """Add to the counts of a layer: choices and probabilities by expert, recorded and changed tokens."""
        if self._counts:
            self._tallies[layer] += torch.cat([chosen, probabilities, replayed])

    def loss(self, layer: int, probabilities: torch.Tensor) -> torch.Tensor | None:
        """Return the load-balancing loss of tokens whose probabilities add up to these, [experts]; None without."""
        return (self._slopes[layer] * probabilities).sum() if self._balances and self._aux_loss else None

    def _totals(self) -> torch.Tensor:
        """Return the counts of all ranks, [layers, 2 * experts + 2]."""
        totals = self._tallies.clone()
        if self._layout.world > 1:
            torch.distributed.all_reduce(totals)
        return totals

    def _local(self, batch: Batch, *, replay: bool) -> RoutedTokens:
        experts = batch.experts if replay else None
        if experts is not None:
            assert experts.shape[2:] == (self._layers, self._per_token), "records of another model"
        return RoutedTokens(self._seen(batch.counted), None if experts is None else self._seen(experts))

    def _seen(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of [rows, length, ...], [tokens, ...] in the order of Megatron's hidden states."""
        flat = tokens.transpose(0, 1).flatten(0, 1)
        if not self._layout.sequence:
            return flat
        return flat.chunk(self._layout.tensor)[parallel_state.get_tensor_model_parallel_rank()]


class _Router:
    """What Megatron's router of one layer asks, in place of its ``RouterReplay``."""

    def __init__(self, routers: Routers, layer: int, *, already_softmax: bool) -> None:
        self._routers = routers
        self._layer = layer
        self._already_softmax = already_softmax
        self.repeated = 0
        """Micro-batches computed again so far."""

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: _TopK = torch.topk,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the experts of every token.

        Args:
            scores: [tokens, experts], probabilities if they are computed before the choice, else logits.
            topk: experts per token.
            num_groups: passed on, as the next.
            group_topk: passed on.
            default_compute_topk: the router's own choice.

        Returns:
            Scores and numbers of the chosen experts, [tokens, topk] each.
        """
        values, experts = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        found = self._routers.current(self)
        if found is None:
            return values, experts
        tokens, is_first = found
        replayed = torch.zeros(2, dtype=torch.float64, device=scores.device)
        if tokens.experts is not None:
            recorded = tokens.experts[:, self._layer].long()
            has_record = recorded[:, 0] >= 0
            # Where the sets agree, the router's own order stays, and with it every bit of the result.
            changed = has_record & (recorded.sort(1).values != experts.sort(1).values).any(1)
            experts = torch.where(changed[:, None], recorded, experts)
            values = scores.gather(1, experts)
            replayed = torch.stack([(one & tokens.counted).sum() for one in (has_record, changed)]).double()
        probabilities = scores if self._already_softmax else scores.softmax(-1, dtype=torch.float32)
        summed = (probabilities * tokens.counted[:, None]).sum(0)
        if is_first:
            counted = tokens.counted[:, None].expand_as(experts).to(scores.dtype)
            chosen = torch.zeros_like(scores).scatter_(1, experts, counted).sum(0)
            self._routers.tally(self._layer, chosen.double(), summed.detach().double(), replayed)
        loss = self._routers.loss(self._layer, summed)
        if loss is not None and torch.is_grad_enabled():
            values = MoEAuxLossAutoScaler.apply(values, loss)
        return values, experts
