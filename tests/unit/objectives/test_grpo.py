from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlpt.config import LengthNorm, ObjectiveConfig
from megatron_rlpt.objectives import LossInputs, build_objective
from megatron_rlpt.objectives.grpo import clipped_ratio_loss, group_advantages, truncated_ratio_loss
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source


def grpo(**settings):
    return build_objective(ObjectiveConfig(name="grpo", **settings))


def group_of(*rewards: float | None, others: tuple[Source, ...] = (), tokens: list[int] | None = None) -> Group:
    """A group of rollouts with these rewards, behind candidates of ``others`` with a reward above all of them."""
    names = tokens or list(range(len(rewards)))
    rollouts = [Candidate(Source.ROLLOUT, (name,), logprobs=(-1.0,)) for name in names]
    rewards = [Failed("no verdict") if reward is None else Reward(reward, "j", "p") for reward in rewards]
    return Group(
        Episode("e", (7,), (8,), "c", "d", 0),
        (*(Candidate(source, (99,)) for source in others), *rollouts),
        (*(Reward(1000.0, "j", "p") for _ in others), *rewards),
    )


def test_advantages_on_a_case_done_by_hand():
    """Mean 4, standard deviation sqrt((9 + 1 + 16) / 2) = sqrt(13)."""
    assert group_advantages([1.0, 3.0, 8.0], normalize=False) == (-3.0, -1.0, 4.0)
    expected = [value / math.sqrt(13) for value in (-3.0, -1.0, 4.0)]
    assert group_advantages([1.0, 3.0, 8.0], normalize=True) == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=16), st.booleans(), st.floats(0.5, 20), st.floats(-50, 50))
def test_advantages_add_up_to_nothing_keep_the_order_and_ignore_a_shift(rewards, normalize, scale, shift):
    found = group_advantages(rewards, normalize=normalize)
    assert sum(found) == pytest.approx(0, abs=1e-6)
    for one, two in zip(
        sorted(rewards), [found[i] for i in sorted(range(len(rewards)), key=rewards.__getitem__)], strict=True
    ):
        assert (one - sum(rewards) / len(rewards)) * two >= -1e-6
    moved = group_advantages([reward * scale + shift for reward in rewards], normalize=normalize)
    if not normalize:
        assert moved == pytest.approx([value * scale for value in found], abs=1e-6)
    elif max(rewards) - min(rewards) > 1:
        assert moved == pytest.approx(found, rel=1e-4, abs=1e-5)


def test_rewards_that_differ_by_rounding_get_hardly_a_say():
    assert max(map(abs, group_advantages([0.1 + 0.2, 0.3], normalize=True))) < 1e-6


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.25, 2.0, -2.5, -2.0),  # inside the upper clip of 0.3
        (1.5, 2.0, -2.6, 0.0),  # raised enough
        (0.5, 2.0, -1.0, -2.0),  # lowered though it is good: no clip
        (0.9, -2.0, 1.8, 2.0),
        (0.5, -2.0, 1.6, 0.0),  # below 0.8: lowered enough
        (1.5, -2.0, 3.0, 2.0),  # raised though it is bad: no clip
    ],
)
def test_clip_by_hand(ratio, advantage, loss, gradient):
    ratio = torch.tensor([ratio], requires_grad=True)
    got, clipped = clipped_ratio_loss(ratio, torch.tensor([advantage]), 0.2, 0.3)
    got.sum().backward()
    assert got.tolist() == pytest.approx([loss])
    assert ratio.grad.tolist() == pytest.approx([gradient])
    assert clipped.tolist() == [float(gradient == 0)]


def test_all_scored_rollouts_of_a_group_are_one_example_with_the_best_first_and_the_worst_behind_it():
    group = group_of(2.0, None, 5.0, -4.0, 1.0)
    (example,) = grpo(normalize_advantage=False).select([group]).examples
    assert example.indices == (2, 3, 4, 0)
    assert example.sequences == tuple(group.candidates[index] for index in example.indices)
    assert example.advantages == (4.0, -5.0, 0.0, 1.0)
    assert example.margin == 9.0


def test_what_the_policy_never_sampled_is_neither_trained_on_nor_compared_with():
    group = group_of(1.0, 3.0, others=(Source.ORIGINAL, Source.REWRITE))
    (example,) = grpo(normalize_advantage=False).select([group]).examples
    assert example.indices == (3, 2)
    assert example.advantages == (1.0, -1.0)


def test_copies_of_one_rollout_all_count():
    (example,) = grpo(normalize_advantage=False).select([group_of(0.0, 0.0, 3.0, tokens=[5, 5, 6])]).examples
    assert example.advantages == (2.0, -1.0, -1.0)


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        (group_of(1.0, 1.0, 1.0, others=(Source.ORIGINAL,)), "tie"),
        (group_of(1.0, None, others=(Source.ORIGINAL, Source.REWRITE)), "fewer than two scored rollouts"),
        (group_of(), "fewer than two scored rollouts"),
    ],
)
def test_groups_without_a_difference_are_skipped_with_the_reason(group, reason):
    selection = grpo().select([group])
    assert selection.examples == []
    assert selection.skipped == {"e": reason}


def test_loss_is_the_mean_over_tokens_then_over_the_rollouts_of_each_example():
    """Examples of two and three rollouts; the padding holds rubbish and NaN that must not count."""
    ratios = torch.tensor([[1.0, 1.5], [0.5, 99.0], [1.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    engine = torch.full((5, 2), -1.0).masked_fill(mask == 0, torch.nan)
    logprobs = (ratios.log() - 1.0).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 3.0, 0.0, -3.0])
    terms = grpo().loss(LossInputs(logprobs, mask, engine, advantages, (2, 3), 9))
    # Rollouts: -(1 + 1.2) / 2, 0.8; then -3, 0, 3 * (2 + 1) / 2.
    assert terms.loss.tolist() == pytest.approx([(-1.1 + 0.8) / 2, (-3.0 + 0.0 + 4.5) / 3])
    assert terms.metrics["grpo/ratio"].tolist() == pytest.approx([(1.25 + 0.5) / 2, (1.0 + 1.0 + 1.5) / 3])
    assert terms.metrics["grpo/clip_fraction"].tolist() == pytest.approx([(0.5 + 1.0) / 2, 0.0])
    divergence = [[(0.5 - math.log(1.5)) / 2, -0.5 - math.log(0.5)], [0.0, 0.0, (1.0 - math.log(2.0)) / 2]]
    assert terms.metrics["grpo/kl"].tolist() == pytest.approx([sum(part) / len(part) for part in divergence])
    assert not any(value.requires_grad for value in terms.metrics.values())
    terms.loss.sum().backward()
    # d loss / d logprob = -ratio * advantage, shared out; nothing where clipped or padded.
    expected = [[-1 / 4, 0.0], [0.0, 0.0], [-3 / 6, -3 / 6], [0.0, 0.0], [6 / 6, 3 / 6]]
    assert torch.allclose(logprobs.grad, torch.tensor(expected))


def test_on_policy_the_gradient_is_that_of_the_advantage_weighted_likelihood():
    logprobs = torch.randn(4, 3).sub(2).requires_grad_()
    advantages, mask = torch.tensor([1.0, -1.0, 0.5, -0.5]), torch.ones(4, 3)
    grpo().loss(LossInputs(logprobs, mask, logprobs.detach(), advantages, (4,), 9)).loss.sum().backward()
    got = logprobs.grad.clone()
    logprobs.grad = None
    (-(advantages[:, None] * logprobs).mean(dim=1)).mean().backward()
    assert torch.allclose(got, logprobs.grad)


def test_a_truncated_weight_corrects_for_the_engine_up_to_its_bound():
    """By hand: the gradient of a token is its weight times its advantage, downwards."""
    difference = torch.tensor([0.0, math.log(1.5), math.log(8.0), math.log(0.25)], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 1.0, 1.0])
    loss, truncated = truncated_ratio_loss(difference, advantages, 2.0)
    loss.sum().backward()
    weights = torch.tensor([1.0, 1.5, 2.0, 0.25])
    torch.testing.assert_close(difference.grad, -weights * advantages)
    torch.testing.assert_close(loss.detach(), -weights * advantages)
    assert truncated.tolist() == [0.0, 0.0, 1.0, 0.0]


def test_the_objective_truncates_instead_of_clipping_where_it_is_set():
    logprobs = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]], requires_grad=True)
    engine = torch.tensor([[-3.0, -1.0], [-1.0, -1.0]])
    inputs = LossInputs(logprobs, torch.ones(2, 2), engine, torch.tensor([1.0, -1.0]), (2,), 2)
    terms = grpo(truncate_ratio=3.0).loss(inputs)
    terms.loss.sum().backward()
    # e squared is above 3; the mean over two tokens and two sequences is a quarter of each.
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-0.75, -0.25], [0.25, 0.25]]))
    assert float(terms.metrics["grpo/clip_fraction"]) == 0.25
    logprobs.grad = None
    grpo().loss(inputs).loss.sum().backward()
    assert logprobs.grad[0, 0] == 0, "the clip takes the gradient away"


def three_answers() -> LossInputs:
    """An example of an answer of three tokens and one of one, and a right answer of two beside a wrong one of one.

    Ratios to the engine are 1 but for a 1.5, which is clipped; the reference has twice or half of the probability of
    two tokens. Padding holds rubbish and NaN that must not count.
    """
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    logprobs = torch.full((4, 3), -1.0).masked_fill(mask == 0, 50.0)
    engine = logprobs.masked_fill(mask == 0, torch.nan)
    engine[2, 0] -= math.log(1.5)
    reference = logprobs.masked_fill(mask == 0, -70.0)
    reference[0, 1] += math.log(2.0)
    reference[3, 0] -= math.log(2.0)
    advantages = torch.tensor([-1.0, 1.0, 2.0, -2.0])
    return LossInputs(logprobs.requires_grad_(), mask, engine, advantages, (2, 2), 5, reference)


@pytest.mark.parametrize(
    ("length_norm", "divisors"), [(LengthNorm.sequence, (3, 1, 2, 1)), (LengthNorm.constant, (5, 5, 5, 5))]
)
@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_length_norm_and_pull_to_the_reference_by_hand(length_norm, divisors, kl):
    """A token's loss is -(ratio, clipped at 1.2) x advantage + kl x (q/p - 1 - ln q/p), q/p of the reference to p.

    Twice: 1 - ln 2, with a gradient of -(2 - 1) to ln p; half: ln 2 - 1/2, with 1/2. A sequence's sum is divided by
    its own length or by the longest one allowed, and an example is the mean of its two.
    """
    inputs = three_answers()
    terms = grpo(length_norm=length_norm, kl=kl).loss(inputs)
    twice, half = 1 - math.log(2), math.log(2) - 0.5
    sums = [3 + kl * twice, -1, -2 * 1.2 - 2, 2 + kl * half]
    parts = [total / divisor for total, divisor in zip(sums, divisors, strict=True)]
    assert terms.loss.tolist() == pytest.approx([(parts[0] + parts[1]) / 2, (parts[2] + parts[3]) / 2])
    terms.loss.sum().backward()
    gradients = [[1, 1 - kl, 1], [-1, 0, 0], [0, -2, 0], [2 + kl / 2, 0, 0]]
    expected = torch.tensor(gradients) / torch.tensor(divisors)[:, None] / 2
    torch.testing.assert_close(inputs.logprobs.grad, expected)
    assert terms.metrics["grpo/clip_fraction"].tolist() == [0.0, 0.25], "per token, whatever the loss is divided by"
    if kl:
        assert terms.metrics["grpo/reference_kl"].tolist() == pytest.approx([twice / 3 / 2, half / 2])
    else:
        assert "grpo/reference_kl" not in terms.metrics


def test_a_long_wrong_answer_is_pushed_away_as_hard_per_token_as_a_short_one_in_dr_grpo():
    pushes = {}
    for length_norm in LengthNorm:
        logprobs = torch.zeros(2, 4, requires_grad=True)
        mask = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
        inputs = LossInputs(logprobs, mask, torch.zeros(2, 4), torch.tensor([-1.0, -1.0]), (2,), 4)
        grpo(length_norm=length_norm).loss(inputs).loss.sum().backward()
        pushes[length_norm] = logprobs.grad[:, 0].tolist()
    assert pushes == {LengthNorm.sequence: [1 / 8, 1 / 2], LengthNorm.constant: [1 / 8, 1 / 8]}


def test_the_reference_pulls_besides_a_truncated_weight_and_not_by_it():
    logprobs = torch.zeros(2, 1, requires_grad=True)
    engine, reference = torch.tensor([[-3.0], [0.0]]), torch.tensor([[math.log(3.0)], [0.0]])
    inputs = LossInputs(logprobs, torch.ones(2, 1), engine, torch.tensor([1.0, -1.0]), (2,), 1, reference)
    grpo(truncate_ratio=2.0, kl=0.25).loss(inputs).loss.sum().backward()
    assert logprobs.grad.flatten().tolist() == pytest.approx([(-2.0 - 0.25 * (3 - 1)) / 2, 1 / 2])


def test_only_a_pull_to_the_reference_needs_one():
    assert not grpo().facts.needs_reference
    assert grpo(kl=0.01).facts.needs_reference
    assert not grpo().facts.needs_reference, "the class is as it was"
