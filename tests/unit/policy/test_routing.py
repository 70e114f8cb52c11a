"""Replayed routing and load balancing of experts, against plain transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families_on_disk import LAYERS, save_family
from llamas import make_examples, same, settings, weights_of
from transformers import AutoModelForCausalLM

from megatron_rlpt.config import Decay, Recompute, RolloutConfig
from megatron_rlpt.objectives import Example, build_objective
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.types import Routing

FAMILIES = ("qwen3_moe", "mixtral", "qwen3_moe-plain-softmax")
EXPERTS, PER_TOKEN = 4, 2
Forced = dict[tuple[int, ...], torch.Tensor]
"""A sequence of tokens -> its experts, [tokens, layers, per token]; -1 where the router decides."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("mixtures")
    return {
        "qwen3_moe": save_family(base / "qwen", "qwen3_moe"),
        "mixtral": save_family(base / "mixtral", "mixtral"),
        "qwen3_moe-plain-softmax": save_family(base / "plain", "qwen3_moe", norm_topk_prob=False),
    }


def make_policy(folder: Path, name: str = "rf_nll", *, replay: bool = False, **parts: Any) -> Policy:
    config = replace(settings(folder, name, **parts), rollout=RolloutConfig(router_replay=replay))
    return Policy(config, build_objective(config.objective), DeviceRuntime())


def routed(example: Example, experts_of: Callable[[tuple[int, ...]], torch.Tensor]) -> Example:
    """Record experts for all sequences of ``example``; the last token of a completion has none."""
    sequences, count = [], len(example.episode.prefix)
    prefix = experts_of(example.episode.prefix)[:count]
    for candidate in example.sequences:
        experts = experts_of(example.episode.prefix + candidate.tokens)[count:-1]
        data = [bytes(part.flatten().tolist()) for part in (prefix, experts)]
        sequences.append(replace(candidate, routing=Routing(*data, LAYERS, PER_TOKEN, 1)))
    return replace(example, sequences=tuple(sequences))


def drawn_experts(tokens: tuple[int, ...]) -> torch.Tensor:
    """Two different experts for every token and layer, the same for the same tokens so far."""
    rows = []
    for end in range(1, len(tokens) + 1):
        draw = torch.Generator().manual_seed(hash(tokens[:end]) % 2**31)
        rows.append(torch.rand(LAYERS, EXPERTS, generator=draw).topk(PER_TOKEN).indices)
    return torch.stack(rows)


@dataclass
class PlainRun:
    """What transformers computes for a sequence."""

    logprobs: torch.Tensor
    """[tokens - 1] of each token after the first."""
    probabilities: torch.Tensor
    """[layers, tokens, experts] of the routers."""
    chosen: torch.Tensor
    """[layers, tokens, per token]."""


class PlainMixture:
    """A mixture of transformers whose experts can be forced."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.model.set_experts_implementation("eager")
        self.gates = [layer.mlp.gate for layer in self.model.model.layers]
        self.normalized = getattr(self.model.config, "norm_topk_prob", True)
        self._forced: torch.Tensor | None = None
        for number, gate in enumerate(self.gates):
            gate.forward = self._gate(number, gate)

    def _gate(self, number: int, gate: Any) -> Callable[..., tuple[torch.Tensor, ...]]:
        def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), gate.weight)
            probabilities = logits.softmax(-1)
            chosen = probabilities.topk(PER_TOKEN).indices
            if self._forced is not None:
                forced = self._forced[:, number].long()
                chosen = torch.where(forced >= 0, forced, chosen)
            weights = probabilities.gather(1, chosen)
            if self.normalized:
                weights = weights / weights.sum(1, keepdim=True)
            self._seen.append((probabilities, chosen))
            return logits, weights, chosen

        return forward

    def run(self, tokens: tuple[int, ...], forced: torch.Tensor | None = None) -> PlainRun:
        """Compute ``tokens`` with ``forced`` experts, [tokens, layers, per token], -1 where the router decides."""
        self._forced, self._seen = forced, []
        logits = self.model(torch.tensor([tokens])).logits[0]
        logprobs = logits[:-1].log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        probabilities, chosen = zip(*self._seen, strict=True)
        return PlainRun(logprobs, torch.stack(probabilities), torch.stack(chosen))

    def own_experts(self, tokens: tuple[int, ...]) -> torch.Tensor:
        """Return what its routers choose, [tokens, layers, per token]."""
        with torch.no_grad():
            return self.run(tokens).chosen.transpose(0, 1)

    def sequence_runs(self, example: Example) -> list[PlainRun]:
        """Compute all sequences of ``example`` with the experts of its records."""
        prefix = example.episode.prefix
        runs = []
        for candidate in example.sequences:
            forced = torch.full((len(prefix) + len(candidate.tokens), LAYERS, PER_TOKEN), -1)
            record = next((one.routing for one in example.sequences if one.routing), None)
            for part, start in ((record and record.prefix, 0), (candidate.routing, len(prefix))):
                data = part.completion if isinstance(part, Routing) else part or b""
                experts = torch.tensor(list(data), dtype=torch.int64).view(-1, LAYERS, PER_TOKEN)
                forced[start : start + len(experts)] = experts
            runs.append(self.run(prefix + candidate.tokens, forced))
        return runs

    def gradient_norm(self, loss: torch.Tensor) -> float:
        """Return the norm of the gradient of ``loss`` over all weights."""
        self.model.zero_grad()
        loss.backward()
        return math.sqrt(
            sum(float(p.grad.double().square().sum()) for p in self.model.parameters() if p.grad is not None)
        )


def nll(examples: Sequence[Example], runs: Sequence[Sequence[PlainRun]]) -> torch.Tensor:
    """The loss of rf_nll: the mean over examples of the token mean of the first sequence."""
    firsts = [len(example.episode.prefix) - 1 for example in examples]
    return torch.stack([-one[0].logprobs[first:].mean() for first, one in zip(firsts, runs, strict=True)]).mean()


def balancing_loss(examples: Sequence[Example], runs: Sequence[Sequence[PlainRun]]) -> torch.Tensor:
    """Switch Transformers' loss over all tokens of the examples, a prefix once, for every layer, [layers]."""
    probabilities, chosen = [], []
    for example, one in zip(examples, runs, strict=True):
        for number, run in enumerate(one):
            first = len(example.episode.prefix) if number else 0
            probabilities.append(run.probabilities[:, first:])
            chosen.append(run.chosen[:, first:])
    mean = torch.cat(probabilities, 1).mean(1)
    shares = torch.stack([layer.flatten().bincount(minlength=EXPERTS) for layer in torch.cat(chosen, 1)]).float()
    shares = shares / shares.sum(1, keepdim=True)
    return EXPERTS * (shares * mean).sum(1)


@pytest.mark.parametrize("objective", ["rf_nll", "online_dpo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_the_policy_s_own_choice_changes_no_bit(folders, family, objective):
    width = 2 if objective == "online_dpo" else 1
    plain = PlainMixture(folders[family])

    def shuffled(tokens: tuple[int, ...]) -> torch.Tensor:
        return plain.own_experts(tokens).flip(-1)  # the order among a token's experts must not matter

    bare = make_examples(5, width)
    recorded = [routed(example, shuffled) for example in bare]
    results = []
    for replay, examples in ((False, bare), (True, recorded)):
        policy = make_policy(folders[family], objective, replay=replay, train={"micro_batch": 2})
        results.append((policy.update(examples), weights_of(policy)))
    (own, own_weights), (replayed, replayed_weights) = results
    assert replayed.pop("router/replay_changed") == 0
    assert 0.7 < replayed.pop("router/replayed") < 1, "all but the last tokens"
    assert replayed == own
    assert same(replayed_weights, own_weights)


@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.full, Recompute.mlp])
@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_other_experts_equals_transformers_with_these_experts_forced(folders, family, recompute):
    plain = PlainMixture(folders[family])
    examples = [routed(example, drawn_experts) for example in make_examples(5, 1)]
    runs = [plain.sequence_runs(example) for example in examples]
    loss = nll(examples, runs)
    norm = plain.gradient_norm(loss)
    figures = make_policy(
        folders[family], replay=True, train={"micro_batch": 2, "recompute": recompute}, optimizer={"clip_grad": 0.0}
    ).update(examples)
    assert figures["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert figures["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert figures["router/replay_changed"] > 0.5
    ignored = make_policy(folders[family], replay=False).update(examples)
    assert abs(ignored["loss"] - float(loss)) > 1e-3, "the experts matter"
    assert "router/replayed" not in ignored


def test_sequences_without_a_record_follow_the_router_behind_the_recorded_prefix(folders):
    plain = PlainMixture(folders["qwen3_moe"])
    examples = [routed(example, drawn_experts) for example in make_examples(4, 2)]
    bare = [replace(one, sequences=(replace(one.sequences[0], routing=None), one.sequences[1])) for one in examples]
    policy = make_policy(folders["qwen3_moe"], "online_dpo", replay=True)
    rows = iter(policy.logprobs(bare))
    with torch.no_grad():
        for example in bare:
            for run, candidate in zip(plain.sequence_runs(example), example.sequences, strict=True):
                expected = run.logprobs[len(example.episode.prefix) - 1 :]
                assert torch.allclose(next(rows)[: len(candidate.tokens)], expected, atol=1e-5)


def test_the_reference_routes_by_itself(folders):
    """It has weights of its own; at its version the log-ratios are 0 only where the routing is the same."""
    examples = [routed(example, drawn_experts) for example in make_examples(4, 2)]
    policy = make_policy(folders["qwen3_moe"], "online_dpo", replay=True)
    assert abs(policy.update(examples)["dpo/chosen_logratio"]) > 1e-3


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_load_balancing_loss_has_the_gradient_of_its_definition(folders, family, micro_batch):
    """Over all tokens of the update, a prefix once, whatever the micro-batches; replayed tokens count as replayed."""
    coefficient, plain = 0.5, PlainMixture(folders[family])
    examples = make_examples(5, 2)
    examples[1] = routed(examples[1], drawn_experts)
    runs = [plain.sequence_runs(example) for example in examples]
    balance = balancing_loss(examples, runs)
    figures = make_policy(
        folders[family],
        "online_dpo",
        replay=True,
        objective={"beta": 1e-9},
        train={"micro_batch": micro_batch, "router_aux_loss": coefficient},
        optimizer={"clip_grad": 0.0},
    ).update(examples)
    # With such a beta the gradient of the objective is nothing beside it.
    norm = plain.gradient_norm(coefficient * balance.sum())
    assert figures["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert figures["router/aux_loss"] == pytest.approx(float(balance.mean()), rel=1e-5)
    assert figures["loss"] == pytest.approx(math.log(2)), "the loss is the objective's alone"


def test_the_load_balancing_loss_is_added_to_the_objective(folders):
    coefficient, plain = 0.5, PlainMixture(folders["qwen3_moe"])
    examples = make_examples(5, 1)
    runs = [plain.sequence_runs(example) for example in examples]
    total = nll(examples, runs) + coefficient * balancing_loss(examples, runs).sum()
    norm = plain.gradient_norm(total)
    for recompute in (Recompute.none, Recompute.full, Recompute.mlp):
        figures = make_policy(
            folders["qwen3_moe"],
            train={"micro_batch": 2, "router_aux_loss": coefficient, "recompute": recompute},
            optimizer={"clip_grad": 0.0},
        ).update(examples)
        assert figures["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_run_becomes_balanced_with_the_loss_and_stays_as_it_is_without(tmp_path):
    """All hidden states have a direction in common, and one of eight experts its router along it."""
    folder = save_family(tmp_path / "uneven", "qwen3_moe", num_experts=8)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.3
        for layer in model.model.layers:
            layer.mlp.gate.weight[0] += 0.2
    model.save_pretrained(folder)
    loads = {}
    for coefficient in (0.0, 0.5):
        policy = make_policy(
            folder, train={"router_aux_loss": coefficient}, optimizer={"lr": 3e-3, "decay": Decay.constant}
        )
        loads[coefficient] = [policy.update(make_examples(8, 1, seed))["router/max_load"] for seed in range(10)]
    assert loads[0.0][0] == loads[0.5][0], "measured before the update"
    assert min(loads[0.0]) > 3.6, "the largest possible is 4: every token, among two experts each of eight"
    assert max(loads[0.5][-3:]) < 2.8, loads
