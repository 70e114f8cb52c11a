from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from largest_output import LargestOutput
from llamas import VARIANTS, VOCABULARY, load_llama, make_examples, make_policy, same, save_llama, settings, weights_of
from transformers import LlamaForCausalLM

from megatron_rlpt.config import Decay, Dtype, LengthNorm
from megatron_rlpt.errors import TrainingError
from megatron_rlpt.objectives import Example, LossTerms
from megatron_rlpt.objectives.online_dpo import OnlineDpo
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.policy import Policy

LN2 = math.log(2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "tied")


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "untied", **VARIANTS["untied-multiquery-wide-heads"])


def token_logprobs(model: LlamaForCausalLM, prefix: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """One sequence at a time: nothing is padded, nothing is batched."""
    logits = model(torch.tensor([prefix + completion])).logits[0, len(prefix) - 1 : -1]
    return torch.stack([torch.log_softmax(row, -1)[token] for row, token in zip(logits, completion, strict=True)])


class PlainTraining:
    """The same training with transformers and torch alone."""

    def __init__(self, folder: Path, objective: str, weight_decay: float, clip: float) -> None:
        self.model, self.reference = load_llama(folder), load_llama(folder)
        self.objective, self.clip = objective, clip
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=1.0,
            betas=(0.9, 0.95),
            eps=1e-8,
        )

    def update(self, examples: list[Example], lr: float, beta: float) -> tuple[float, float]:
        """Loss and gradient norm of one update at learning rate ``lr``."""
        losses = [self.example_loss(example, beta) for example in examples]
        loss = torch.stack(losses).mean()
        self.optimizer.zero_grad()
        loss.backward()
        parameters = list(self.model.parameters())
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))
        if self.clip and norm > self.clip:
            for parameter in parameters:
                parameter.grad *= self.clip / norm
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return float(loss), norm

    def example_loss(self, example: Example, beta: float) -> torch.Tensor:
        prefix = example.episode.prefix
        own = [token_logprobs(self.model, prefix, candidate.tokens) for candidate in example.sequences]
        if self.objective != "online_dpo":
            return -own[0].mean()
        with torch.no_grad():
            theirs = [token_logprobs(self.reference, prefix, candidate.tokens) for candidate in example.sequences]
        chosen, rejected = (mine.sum() - other.sum() for mine, other in zip(own, theirs, strict=True))
        return torch.log1p(torch.exp(-beta * (chosen - rejected)))


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("objective", ["online_dpo", "rf_nll"])
@pytest.mark.parametrize("model", ["llama", "untied"])
def test_three_updates_equal_plain_transformers_and_adamw(request, model, objective, clip):
    folder = request.getfixturevalue(model)
    policy = make_policy(
        folder,
        objective,
        objective={"beta": 0.4},
        optimizer={"lr": 3e-3, "warmup_steps": 3, "weight_decay": 1.0, "clip_grad": clip},
        train={"micro_batch": 3},
    )
    plain = PlainTraining(folder, objective, weight_decay=1.0, clip=clip)
    width = 2 if objective == "online_dpo" else 1
    for step, lr in enumerate([1e-3, 2e-3, 3e-3]):
        examples = make_examples(5, width, seed=step)
        figures = policy.update(examples)
        loss, norm = plain.update(examples, lr, beta=0.4)
        assert figures["loss"] == pytest.approx(loss, rel=1e-4)
        assert figures["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert figures["lr"] == pytest.approx(lr)
        assert policy.version == step + 1
    theirs, start = plain.model.state_dict(), load_llama(folder).state_dict()
    for name, ours in policy.weights():
        moved = (theirs[name] - start[name]).abs().max()
        assert moved > 1e-3, name
        assert (ours - theirs[name]).abs().max() < 0.02 * moved, name


def test_learning_rate_warms_up_from_its_first_share_then_decays_above_the_minimum(llama):
    """Warm-up of 2 of 6 updates, cosine from 1e-3 to 1e-4; the decay ends one update after the last."""
    policy = make_policy(llama, optimizer={"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2}, train={"steps": 6})
    rates = [policy.update(make_examples())["lr"] for _ in range(6)]
    cosine = [1e-4 + 9e-4 * (1 + math.cos(math.pi * k / 5)) / 2 for k in range(1, 5)]
    assert rates == pytest.approx([5e-4, 1e-3, *cosine])


def test_a_constant_learning_rate_is_in_force_from_the_first_update(llama):
    policy = make_policy(llama, optimizer={"lr": 2e-3, "decay": Decay.constant}, train={"steps": 3})
    assert [policy.update(make_examples())["lr"] for _ in range(3)] == pytest.approx([2e-3] * 3)


@pytest.mark.parametrize("objective", ["online_dpo", "rf_nll"])
def test_the_result_does_not_depend_on_the_micro_batch(llama, objective):
    """Micro-batches of 1 need no padding, one of 6 pads everything to the longest: padding has no effect."""
    width = 2 if objective == "online_dpo" else 1
    results = []
    for micro_batch in (6, 4, 1):
        policy = make_policy(llama, objective, train={"micro_batch": micro_batch}, optimizer={"lr": 1e-3})
        figures = [policy.update(make_examples(6, width, seed)) for seed in range(2)]
        results.append((figures, weights_of(policy)))
    for figures, weights in results[1:]:
        for got, expected in zip(figures, results[0][0], strict=True):
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert all((tensor - results[0][1][name]).abs().max() < 2e-5 for name, tensor in weights.items())


def test_logprobs_do_not_depend_on_what_else_is_in_the_batch(llama):
    policy, examples = make_policy(llama), make_examples(5)
    together = policy.logprobs(examples)
    for index, example in enumerate(examples):
        alone = policy.logprobs([example])
        length = alone.shape[1]
        assert torch.allclose(together[2 * index : 2 * index + 2, :length], alone, atol=1e-5)
        assert (together[2 * index : 2 * index + 2, length:] == 0).all()


def test_the_result_does_not_depend_on_the_chunk_of_the_logprobs(llama):
    results = []
    for chunk in (3, 1000):
        policy = make_policy(llama, train={"logprob_chunk": chunk}, optimizer={"lr": 1e-3})
        figures = policy.update(make_examples())
        results.append((figures["loss"], figures["grad_norm"]))
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_equal_policies_trained_side_by_side_stay_equal_bit_for_bit(llama):
    one, other = make_policy(llama), make_policy(llama)
    for seed in range(2):
        assert one.update(make_examples(seed=seed)) == other.update(make_examples(seed=seed))
    assert same(weights_of(one), weights_of(other))
    assert not same(weights_of(one), weights_of(make_policy(llama)))


@pytest.mark.parametrize(
    ("refresh", "at_the_reference"),
    [(0, [True, False, False, False, False]), (1, [True] * 5), (2, [True, False, True, False, True])],
)
def test_the_reference_is_frozen_or_renewed_every_n_updates(llama, refresh, at_the_reference):
    """If policy and reference are equal, the loss of any pair is ln 2 and its log-ratios are 0."""
    policy = make_policy(llama, objective={"reference_refresh": refresh}, optimizer={"decay": Decay.constant})
    figures = [policy.update(make_examples(seed=seed)) for seed in range(5)]
    assert [abs(step["loss"] - LN2) < 1e-6 for step in figures] == at_the_reference
    assert [abs(step["dpo/chosen_logratio"]) < 1e-5 for step in figures] == at_the_reference


def test_training_raises_the_chosen_over_the_rejected(llama):
    policy = make_policy(llama, optimizer={"lr": 3e-3})
    figures = [policy.update(make_examples()) for _ in range(5)]
    assert figures[-1]["loss"] < figures[0]["loss"]
    assert figures[-1]["dpo/margin"] > 0
    assert figures[-1]["dpo/accuracy"] == 1.0


def test_logprob_gap_is_the_mean_over_tokens_that_an_engine_generated(llama):
    """Chosen and rejected differ by 0.25 and 0.5 per token; tokens without engine log-probabilities are left out."""
    policy = make_policy(llama)
    examples = make_examples(3)
    ours = policy.logprobs(examples)

    def generated(row: int, example: Example, place: int, shift: float) -> Example:
        tokens = example.sequences[place].tokens
        said = tuple((ours[row, : len(tokens)] - shift).tolist())
        sequences = list(example.sequences)
        sequences[place] = dataclasses.replace(sequences[place], logprobs=said)
        return dataclasses.replace(example, sequences=tuple(sequences))

    examples[0] = generated(0, examples[0], 0, 0.25)
    examples[2] = generated(5, examples[2], 1, -0.5)
    first, second = len(examples[0].sequences[0].tokens), len(examples[2].sequences[1].tokens)
    gap = policy.update(examples)["logprob_gap"]
    assert gap == pytest.approx((0.25 * first + 0.5 * second) / (first + second), rel=1e-3)
    assert "logprob_gap" not in make_policy(llama).update(make_examples())


@pytest.mark.parametrize("worst", [-math.inf, math.inf, math.nan])
def test_an_engine_logprob_that_is_no_number_is_an_infinite_gap_and_not_left_out(llama, worst):
    (example,) = make_examples(1, width=1)
    candidate = example.sequences[0]
    said = (worst,) + (-1.0,) * (len(candidate.tokens) - 1)
    example = dataclasses.replace(example, sequences=(dataclasses.replace(candidate, logprobs=said),))
    assert make_policy(llama, "rf_nll").update([example])["logprob_gap"] == math.inf


@pytest.mark.parametrize("micro_batch", [1, 2, 6])
@pytest.mark.parametrize(("length_norm", "kl"), [(LengthNorm.sequence, 0.0), (LengthNorm.constant, 0.5)])
def test_grpo_on_groups_of_different_size_equals_its_formula_in_plain_transformers(llama, micro_batch, length_norm, kl):
    """Loss and gradient norm; the engine's log-probabilities differ from the model's, so that some tokens are
    clipped, and an update has moved the policy away from its reference."""
    policy = make_policy(
        llama,
        "grpo",
        objective={"clip_low": 0.1, "clip_high": 0.3, "length_norm": length_norm, "kl": kl},
        optimizer={"clip_grad": 0.0},
        train={"micro_batch": micro_batch},
    )
    policy.update(grpo_examples(load_llama(llama)))
    model, start = load_llama(llama), load_llama(llama)
    model.load_state_dict(weights_of(policy) | {"lm_head.weight": weights_of(policy)["model.embed_tokens.weight"]})
    examples = grpo_examples(model)
    losses = []
    for example in examples:
        parts = []
        for candidate, advantage in zip(example.sequences, example.advantages, strict=True):
            own = token_logprobs(model, example.episode.prefix, candidate.tokens)
            ratio = (own - torch.tensor(candidate.logprobs)).exp()
            free, bounded = ratio * advantage, ratio.clamp(0.9, 1.3) * advantage
            more = token_logprobs(start, example.episode.prefix, candidate.tokens).detach() - own
            tokens = -torch.where(free < bounded, free, bounded) + kl * (more.exp() - 1 - more)
            parts.append(tokens.sum() / (8 if length_norm is LengthNorm.constant else len(tokens)))
        losses.append(torch.stack(parts).mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in model.parameters()))
    figures = policy.update(examples)
    assert figures["loss"] == pytest.approx(float(loss), rel=1e-4, abs=1e-5)
    assert figures["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert 0.1 < figures["grpo/clip_fraction"] < 0.9
    assert figures.get("grpo/reference_kl", 0.0) > 0.01 or not kl
    assert (policy._reference is not None) == bool(kl)


def grpo_examples(model: LlamaForCausalLM) -> list[Example]:
    """Groups of two to five rollouts whose log-probabilities by the engine are about those of ``model``."""
    draw = torch.Generator().manual_seed(3)
    examples = []
    for number, width in enumerate([2, 4, 3, 2, 5, 2]):
        (example,) = make_examples(1, width, seed=number)
        advantages = tuple(torch.randn(width, generator=draw).tolist())
        sequences = []
        for candidate in example.sequences:
            own = token_logprobs(model, example.episode.prefix, candidate.tokens).detach()
            said = own + 0.3 * torch.randn(len(candidate.tokens), generator=draw)
            sequences.append(dataclasses.replace(candidate, logprobs=tuple(said.tolist())))
        examples.append(dataclasses.replace(example, sequences=tuple(sequences), advantages=advantages))
    return examples


class Faulty(OnlineDpo):
    """DPO that can fail on request: with a loss that is not finite, or with a finite loss and such a gradient."""

    fault = ""

    def loss(self, inputs) -> LossTerms:
        terms = super().loss(inputs)
        match self.fault:
            case "nan loss":
                return LossTerms(terms.loss * torch.nan, terms.metrics)
            case "infinite loss":
                return LossTerms(terms.loss + torch.inf, terms.metrics)
            case "gradient":
                zero = inputs.logprobs.sum() - inputs.logprobs.sum().detach()
                return LossTerms(terms.loss + zero.sqrt(), terms.metrics)  # d sqrt(0) is infinite
        return terms


@pytest.mark.parametrize(
    ("fault", "message"),
    [("nan loss", "loss is nan"), ("infinite loss", "loss is inf"), ("gradient", "a gradient is not finite")],
)
def test_an_update_that_is_not_finite_raises_and_leaves_the_policy_as_it_was(llama, fault, message):
    objective = Faulty(0.1)
    policy, untouched = Policy(settings(llama), objective, DeviceRuntime()), make_policy(llama)
    policy.update(make_examples())
    untouched.update(make_examples())
    objective.fault = fault
    with pytest.raises(TrainingError) as caught:
        policy.update(make_examples(seed=1))
    assert message in str(caught.value)
    assert "at version 1" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert policy.version == 1
    assert same(weights_of(policy), weights_of(untouched))
    objective.fault = ""
    assert policy.update(make_examples(seed=2)) == untouched.update(make_examples(seed=2)), "no trace"
    assert same(weights_of(policy), weights_of(untouched))


def test_an_update_never_holds_the_logits_of_all_completion_tokens(tmp_path):
    vocabulary = 40 * VOCABULARY
    folder = save_llama(tmp_path / "wide", vocab_size=vocabulary, hidden_size=16, intermediate_size=16)
    policy = make_policy(folder, train={"micro_batch": 32})
    examples = make_examples(32)
    tokens = sum(len(candidate.tokens) for example in examples for candidate in example.sequences)
    with LargestOutput() as watched:
        policy.update(examples)
    assert watched.largest < tokens * vocabulary / 8


def test_a_bf16_policy_learns_from_updates_smaller_than_a_bf16_step(llama):
    """The optimizer keeps fp32 weights: 40 updates of 2e-5 add up although each is lost on a bf16 weight near 1."""
    policy = make_policy(
        llama,
        model={"dtype": Dtype.bf16},
        optimizer={"lr": 2e-4, "decay": Decay.constant},
        train={"steps": 100},
    )
    start = weights_of(policy)["model.norm.weight"]
    assert start.dtype == torch.bfloat16
    examples = make_examples()
    for _ in range(40):
        policy.update(examples)
    moved = (weights_of(policy)["model.norm.weight"].float() - start.float()).abs()
    assert (moved > 0).float().mean() > 0.5


def test_delayed_scaling_is_calibrated_once_before_the_first_update_which_does_not_learn_from_it(llama):
    """On a CPU there is no FP8; what it needs is an additional pass with gradients before the reference's."""
    policy, plain = make_policy(llama), make_policy(llama)
    policy._uncalibrated = True
    events, forward_backward = [], policy._forward_backward
    for name in ("train", "logprobs"):
        call = getattr(forward_backward, name)

        def called(*given, name=name, call=call, **named):
            events.append(name)
            return call(*given, **named)

        setattr(forward_backward, name, called)
    for _ in range(2):
        assert policy.update(make_examples()) == plain.update(make_examples())
    assert events == ["train", "logprobs", "train", "logprobs", "train"]
