"""GRPO on the policy's own rollouts: each is weighted by how much its reward exceeds the mean of its group.

Group-relative policy optimization is from arXiv 2402.03300 (section 4.1). Original suffix and rewrite take no part: the
policy never sampled them, so the ratio has no denominator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from megatron_rlpt.objectives.facts import ObjectiveFacts
from megatron_rlpt.objectives.objective import LossInputs, LossTerms
from megatron_rlpt.objectives.selection import TIE, Example, Selection
from megatron_rlpt.types import Group, Reward, Source

if TYPE_CHECKING:
    import torch

_LEAST_DEVIATION = 1e-6
"""Added to the standard deviation: rewards that differ by rounding alone are not blown up to a preference."""


def group_advantages(rewards: Sequence[float], *, normalize: bool) -> tuple[float, ...]:
    """Subtract the mean of a group from each of its rewards.

    Args:
        rewards: of one group, at least two.
        normalize: divide by the group's standard deviation (of a sample, n - 1), as in GRPO (arXiv 2402.03300,
            section 4.1.2). Without, as in Dr. GRPO (arXiv 2503.20783, section 3): dividing gives groups whose
            rewards hardly differ the same say as the others.

    Returns:
        One number per reward; they add up to 0.
    """
    mean = fmean(rewards)
    scale = stdev(rewards) + _LEAST_DEVIATION if normalize else 1.0
    return tuple((reward - mean) / scale for reward in rewards)


def clipped_ratio_loss(
    ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the clipped surrogate objective (arXiv 1707.06347, equation 7), with separate bounds on each side.

    A wider upper bound leaves unlikely tokens room to grow (arXiv 2503.14476, section 3.1).

    Args:
        ratio: probability of each token under the policy over that under the policy that sampled it.
        advantages: of the same shape or one that broadcasts to it.
        clip_low: the ratio counts no lower than 1 - clip_low where the advantage is negative.
        clip_high: the ratio counts no higher than 1 + clip_high where the advantage is positive.

    Returns:
        Loss of each token, and 1.0 where the clip took its gradient away (else 0.0).
    """
    import torch

    free = ratio * advantages
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    return -torch.minimum(free, bounded), (bounded < free).float()


def truncated_ratio_loss(
    difference: torch.Tensor, advantages: torch.Tensor, bound: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the policy gradient with truncated importance weights (arXiv 1802.01561, section 4.1).

    Engine and trainer never have quite the same probabilities, in FP8 less so. The weight corrects for that, and its
    bound keeps a token that the engine thought unlikely from deciding the update.

    This is the clipped objective with a correction for the engine: the old policy's probability over the engine's,
    truncated, times the clipped ratio of the policy to the old one. A batch gets one update, so the old policy is the
    policy before it, and a ratio of 1 is never clipped. With ``train.staleness`` it is the decoupled objective (arXiv
    2110.00641, section 3) whose proximal policy is renewed before every update.

    Args:
        difference: log-probability of each token under the policy less that under the engine that sampled it, nats.
        advantages: of the same shape or one that broadcasts to it.
        bound: largest weight.

    Returns:
        Loss of each token, and 1.0 where the weight was truncated (else 0.0).
    """
    ratio = difference.detach().exp()
    # The last factor is 1, and has the gradient of the log-probability.
    loss = -ratio.clamp(max=bound) * advantages * (1.0 + difference - difference.detach())
    return loss, (ratio > bound).float()


def k3_divergence(log_ratio: torch.Tensor) -> torch.Tensor:
    """Estimate the Kullback-Leibler divergence of q from p at every token sampled from p, in nats.

    The k3 estimator (arXiv 2402.03300, equation 4): without bias, and never below 0.

    Args:
        log_ratio: log q - log p of each token.
    """
    import torch

    return torch.expm1(log_ratio) - log_ratio


class Grpo:
    """Clipped policy gradient on all scored rollouts of an episode, which form one example.

    The loss of a sequence is the sum over its tokens, divided by its length (arXiv 2402.03300, equation 3) or, as in
    Dr. GRPO (arXiv 2503.20783, section 3), by the same constant for all: the longest completion that is allowed. By
    its own length, a long bad completion is pushed away less per token than a short one. The loss of an example is the
    mean over its sequences.

    With ``kl`` every token adds that much times the divergence of the policy from the reference. A group whose rewards
    all tie is skipped then as well.
    """

    facts = ObjectiveFacts(
        trains_on=frozenset({Source.ROLLOUT}),
        sequences=None,
        least_rollouts=2,
        on_policy=True,
        settings=("clip_low", "clip_high", "normalize_advantage", "length_norm", "truncate_ratio", "kl"),
    )

    def __init__(
        self,
        clip_low: float,
        clip_high: float,
        normalize_advantage: bool,
        length_norm: str = "sequence",
        truncate_ratio: float = 0.0,
        kl: float = 0.0,
    ) -> None:
        """Configure the loss; arguments as in the section ``objective`` of the configuration."""
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.normalize_advantage = normalize_advantage
        self.length_norm = length_norm
        self.truncate_ratio = truncate_ratio
        self.kl = kl
        if kl:
            self.facts = replace(self.facts, needs_reference=True)

    def select(self, groups: Sequence[Group]) -> Selection:
        """Take every scored rollout of a group, the best first and the others from the worst up.

        Copies of one text all count: they are as many draws from the policy. A group with fewer than two scored
        rollouts, or with one reward for all of them (a tie), has no advantages and is skipped.
        """
        selection = Selection()
        for group in groups:
            entries = [
                (reward.value, index, candidate)
                for index, (candidate, reward) in enumerate(zip(group.candidates, group.rewards, strict=True))
                if candidate.source is Source.ROLLOUT and isinstance(reward, Reward) and not candidate.blank
            ]
            if len(entries) < 2:
                selection.skipped[group.episode.id] = "fewer than two scored rollouts"
                continue
            entries.sort(key=lambda entry: entry[0])
            rewards, indices, candidates = zip(*(entries[-1:] + entries[:-1]), strict=True)
            if rewards[0] == rewards[1]:
                selection.skipped[group.episode.id] = TIE
                continue
            assert all(candidate.logprobs is not None for candidate in candidates), "a rollout without the engine's"
            selection.examples.append(
                Example(
                    group.episode,
                    candidates,
                    indices,
                    margin=rewards[0] - rewards[1],
                    advantages=group_advantages(rewards, normalize=self.normalize_advantage),
                )
            )
        return selection

    def loss(self, inputs: LossInputs) -> LossTerms:
        """Compute the loss; the engine's log-probabilities are those of the sampling policy."""
        import torch

        real = inputs.mask.bool()
        # Before exp: a NaN of the padding would spoil the gradient even where the mask multiplies it by 0.
        difference = torch.where(real, inputs.logprobs - inputs.engine_logprobs, 0.0)
        ratio = difference.exp()
        advantages = inputs.advantages[:, None]
        if self.truncate_ratio:
            loss, clipped = truncated_ratio_loss(difference, advantages, self.truncate_ratio)
        else:
            loss, clipped = clipped_ratio_loss(ratio, advantages, self.clip_low, self.clip_high)
        lengths = inputs.mask.sum(dim=1)

        def per_example(values: torch.Tensor, divisor: torch.Tensor | int = lengths) -> torch.Tensor:
            return inputs.example_means((values * inputs.mask).sum(dim=1) / divisor)

        metrics = {
            "grpo/ratio": per_example(ratio.detach()),
            "grpo/clip_fraction": per_example(clipped),
            "grpo/kl": per_example(k3_divergence(difference.detach())),
        }
        if self.kl:
            assert inputs.reference is not None
            divergence = k3_divergence(torch.where(real, inputs.reference - inputs.logprobs, 0.0))
            loss = loss + self.kl * divergence
            metrics["grpo/reference_kl"] = per_example(divergence.detach())
        return LossTerms(per_example(loss, inputs.max_length if self.length_norm == "constant" else lengths), metrics)
