"""Computes the metrics of one step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

from megatron_rlpt.objectives import Selection
from megatron_rlpt.teacher.good_rewrite import rewrite_metrics
from megatron_rlpt.teacher.judge import rewrite_failure_rate
from megatron_rlpt.teacher.judge_metrics import by_reason, judge_health
from megatron_rlpt.teacher.right_verdict import answer_metrics
from megatron_rlpt.types import Group, Source


def step_metrics(
    groups: Sequence[Group],
    selection: Selection,
    update: Mapping[str, float],
    failure_rate: float,
    empty_share: float,
    seconds: Mapping[str, float],
    background: Mapping[str, float],
) -> dict[str, float]:
    """Return the metrics by name.

    - ``reward/<source>``: mean reward of a source's candidates that have one.
    - ``<source>_chosen_rate``: share of the update's examples whose chosen candidate came from that source (paper,
      Figure 8, for rollouts).
    - ``rollout/length``: mean number of tokens; ``rollout/stop_rate``: share that ended with end-of-sequence;
      ``rollout/blank_rate``: share without any text, which is neither judged nor learned.
    - ``sync/<group>_mib``: MiB of weights that rank 0 received over process groups of that kind.
    - ``answers/...``: see ``teacher/right_verdict.py``; ``rewrites/...``: see ``teacher/good_rewrite.py``.
    - ``judge/...``: see ``teacher/judge_metrics.py``.

    Args:
        groups: the judged groups of the step.
        selection: the examples of the update, and the skipped episodes.
        update: metrics of the optimizer update; empty if the step had no example.
        failure_rate: share of failed judgments.
        empty_share: share of recent steps without an example.
        seconds: seconds by stage.
        background: seconds of work in background threads.
    """
    metrics = dict(update)
    examples = selection.examples
    for source in Source:
        rewards = [reward.value for group in groups if group.rewards for candidate, reward in group.rewarded()
                   if candidate.source is source]  # fmt: skip
        if rewards:
            metrics[f"reward/{source.value}"] = fmean(rewards)
        if examples and any(candidate.source is source for group in groups for candidate in group.candidates):
            chosen = sum(example.sequences[0].source is source for example in examples)
            metrics[f"{source.value}_chosen_rate"] = chosen / len(examples)
    margins = [example.margin for example in examples if example.margin is not None]
    if margins:
        metrics["reward_margin"] = fmean(margins)
    metrics["examples"] = len(examples)
    metrics["skipped"] = len(selection.skipped)
    for reason, count in selection.skip_counts().items():
        metrics[f"skipped/{reason.replace(' ', '_')}"] = count
    metrics["duplicates"] = selection.duplicates
    metrics["failure_rate"] = failure_rate
    metrics["rewrite_failure_rate"] = rewrite_failure_rate(groups)
    metrics["failed_rewrites"] = sum(group.rewrite_failure is not None for group in groups)
    metrics |= by_reason("failed_rewrites", Counter(g.rewrite_failure.reason for g in groups if g.rewrite_failure))
    metrics["empty_share"] = empty_share
    metrics["rollouts"] = fmean(sum(candidate.source is Source.ROLLOUT for candidate in group.candidates)
                                for group in groups)  # fmt: skip
    metrics |= _rollouts(groups)
    metrics |= answer_metrics(groups)
    metrics |= rewrite_metrics(groups)
    metrics |= judge_health(groups)
    metrics |= {f"seconds/{stage}": value for stage, value in seconds.items()}
    metrics["seconds/total"] = sum(seconds.values())
    metrics |= {f"background/{what}": value for what, value in background.items()}
    return metrics


def _rollouts(groups: Sequence[Group]) -> dict[str, float]:
    """Return the metrics of all rollouts, judged or not; nothing without rollouts."""
    rollouts = [candidate for group in groups for candidate in group.candidates if candidate.source is Source.ROLLOUT]
    if not rollouts:
        return {}
    return {
        "rollout/length": fmean(len(rollout.tokens) for rollout in rollouts),
        "rollout/stop_rate": fmean(rollout.finish_reason == "stop" for rollout in rollouts),
        "rollout/blank_rate": fmean(rollout.blank for rollout in rollouts),
    }
