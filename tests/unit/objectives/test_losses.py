from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_rlpt.config import ObjectiveConfig
from megatron_rlpt.objectives import LossInputs, build_objective
from megatron_rlpt.objectives.nll import token_mean_nll
from megatron_rlpt.objectives.online_dpo import dpo_loss


def online_dpo(beta: float):
    return build_objective(ObjectiveConfig(name="online_dpo", beta=beta))


def inputs(logprobs: torch.Tensor, mask: torch.Tensor, sizes: tuple[int, ...], **others: torch.Tensor) -> LossInputs:
    """What an objective is given that reads neither engine nor advantages, unless ``others`` has them."""
    unknown = {"engine_logprobs": torch.full_like(mask, torch.nan), "advantages": torch.full((len(mask),), torch.nan)}
    return LossInputs(logprobs, mask, sizes=sizes, max_length=mask.shape[1], **unknown | others)


def test_dpo_loss_on_a_case_done_by_hand():
    """Margin 0.5 * ((-10 + 12) - (-8 + 7)) = 1.5, and -ln sigmoid(1.5) = ln(1 + e^-1.5) = 0.201413."""
    loss, margin = dpo_loss(*torch.tensor([[-10.0], [-8.0], [-12.0], [-7.0]]), beta=0.5)
    assert margin.tolist() == [1.5]
    assert loss.tolist() == pytest.approx([0.2014132780])


def test_dpo_loss_is_ln_2_where_the_policy_is_the_reference():
    sums = torch.tensor([-3.0, -40.0])
    loss, _ = dpo_loss(sums, sums * 2, sums, sums * 2, beta=0.1)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_dpo_loss_equals_the_published_formula(beta):
    """-log sigmoid(beta log(pi(c) / ref(c)) - beta log(pi(r) / ref(r))), from probabilities as in the paper."""
    draw = np.random.default_rng(3)
    chosen, rejected, reference_chosen, reference_rejected = draw.uniform(-9, -1, (4, 50))
    chosen_ratio = (np.exp(chosen) / np.exp(reference_chosen)) ** beta
    rejected_ratio = (np.exp(rejected) / np.exp(reference_rejected)) ** beta
    ratio = chosen_ratio / rejected_ratio
    expected = -np.log(ratio / (1 + ratio))
    loss, _ = dpo_loss(*map(torch.tensor, (chosen, rejected, reference_chosen, reference_rejected)), beta=beta)
    assert np.allclose(loss.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_loss_equals_the_sigmoid_loss_of_trl(beta):
    """TRL's DPOTrainer, ``loss_type="sigmoid"`` without label smoothing: -logsigmoid(beta * (logratios - ref))."""
    chosen, rejected, reference_chosen, reference_rejected = torch.randn(4, 20, dtype=torch.float64) * 30
    logratios = chosen - rejected
    reference_logratios = reference_chosen - reference_rejected
    expected = -torch.nn.functional.logsigmoid(beta * (logratios - reference_logratios))
    loss, _ = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta)
    assert torch.allclose(loss, expected)


def test_dpo_gradient_raises_chosen_and_lowers_rejected_by_beta_times_the_error():
    """d loss / d chosen = -beta * sigmoid(-margin) = minus the gradient of the rejected one."""
    chosen = torch.tensor([-10.0, -5.0], requires_grad=True)
    rejected = torch.tensor([-8.0, -9.0], requires_grad=True)
    loss, margin = dpo_loss(chosen, rejected, torch.tensor([-12.0, -5.0]), torch.tensor([-7.0, -6.0]), beta=0.3)
    loss.sum().backward()
    expected = [-0.3 / (1 + math.exp(value)) for value in margin.tolist()]
    assert chosen.grad.tolist() == pytest.approx(expected)
    assert rejected.grad.tolist() == pytest.approx([-value for value in expected])


def test_dpo_loss_stays_finite_far_from_the_reference():
    loss, _ = dpo_loss(*torch.tensor([[-5000.0], [-1.0], [-1.0], [-5000.0]]), beta=1.0)
    assert loss.tolist() == pytest.approx([9998.0])


def test_the_objective_sums_tokens_under_the_mask_and_alternates_chosen_and_rejected():
    """Rows: chosen and rejected of pair 0, then of pair 1. Masked places hold rubbish that must not count."""
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, 99.0], [-1.0, -1.0], [-2.0, -2.0]], requires_grad=True)
    reference = torch.tensor([[-2.0, -2.0], [-2.0, -77.0], [-1.5, -1.5], [-1.0, -2.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    terms = online_dpo(2.0).loss(inputs(logprobs, mask, (2, 2), reference=reference))
    # Pair 0: 2 * ((-3 + 4) - (-3 + 2)) = 4; pair 1: 2 * ((-2 + 3) - (-4 + 3)) = 4.
    assert terms.loss.tolist() == pytest.approx([math.log1p(math.exp(-4.0))] * 2)
    assert terms.metrics["dpo/margin"].tolist() == [4.0, 4.0]
    assert terms.metrics["dpo/accuracy"].tolist() == [1.0, 1.0]
    assert terms.metrics["dpo/chosen_logratio"].tolist() == [1.0, 1.0]
    assert terms.metrics["dpo/rejected_logratio"].tolist() == [-1.0, -1.0]
    terms.loss.sum().backward()
    assert logprobs.grad[1, 1] == 0.0
    assert (logprobs.grad[0] < 0).all()
    assert (logprobs.grad[3] > 0).all()
    assert not any(value.requires_grad for value in terms.metrics.values())


def test_dpo_accuracy_counts_pairs_the_policy_orders_as_the_judge_does():
    logprobs = torch.tensor([[-1.0], [-2.0], [-2.0], [-1.0]])
    terms = online_dpo(0.1).loss(inputs(logprobs, torch.ones(4, 1), (2, 2), reference=torch.zeros(4, 1)))
    assert terms.metrics["dpo/accuracy"].tolist() == [1.0, 0.0]


def test_nll_is_the_mean_over_real_tokens_of_each_row():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 55.0, 55.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    loss = token_mean_nll(logprobs, mask)
    assert loss.tolist() == [2.0, 4.0]
    loss.sum().backward()
    expected = torch.tensor([[-1 / 3, -1 / 3, -1 / 3], [-1.0, 0.0, 0.0]])
    assert torch.allclose(logprobs.grad, expected)


@pytest.mark.parametrize("name", ["ntp", "sft_rewrite", "sft_rollout", "rf_nll"])
def test_every_likelihood_objective_has_the_token_mean_loss(name):
    logprobs, mask = torch.tensor([[-1.0, -3.0], [-5.0, 0.0]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    terms = build_objective(ObjectiveConfig(name=name)).loss(inputs(logprobs, mask, (1, 1)))
    assert terms.loss.tolist() == [2.0, 5.0]
