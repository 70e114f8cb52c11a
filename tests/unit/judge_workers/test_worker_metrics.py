"""Prometheus metrics of a worker."""

from dataclasses import replace

import pytest

from megatron_rlpt.judge_workers.client.faults import Fault, ServerProblem
from megatron_rlpt.judge_workers.metrics import WorkerMetrics
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source

REFUSED = ServerProblem(Fault.REJECTED, {"status": 400, "message": "unsupported parameter\n max_tokens"}).failed()
UNDECIDED = Failed("no comparison decided").because_of(REFUSED)
GROUP = Group(Episode("e", (1,), (2,), "c", "d", 0), (Candidate(Source.ROLLOUT, (3,)),) * 2)
CAUSE = "request rejected: 400: unsupported parameter max_tokens"


def cause_of(metrics: WorkerMetrics) -> str | None:
    (family,) = [one for one in metrics.registry.collect() if one.name == "rlpt_last_failure"]
    return next((sample.labels.get("cause") for sample in family.samples), None)


@pytest.mark.parametrize(
    ("group", "told"),
    [
        (replace(GROUP, rewards=(Reward(1.0, "j", "p"), UNDECIDED)), f"no comparison decided: {CAUSE}"),
        (replace(GROUP, rewards=(Reward(1.0, "j", "p"),) * 2, rewrite_failure=REFUSED), CAUSE),
        (replace(GROUP, rewards=(Reward(1.0, "j", "p"),) * 2), None),
    ],
)
def test_the_cause_of_a_failure_is_told_in_the_servers_own_words(group, told):
    metrics = WorkerMetrics()
    metrics.completed(group, 1.0)
    assert cause_of(metrics) == told
    reasons = {"reason": "request rejected"}
    assert metrics.registry.get_sample_value("rlpt_failed_judgments_total", reasons) == (1.0 if told else None)


def test_the_cause_for_which_a_group_went_back_is_told_in_one_short_line():
    metrics = WorkerMetrics()
    metrics.given_back("stopped or lease lost")
    assert cause_of(metrics) is None
    metrics.given_back("server error", "server error: 500: \x1b[31mout of memory" + " again" * 1000)
    assert cause_of(metrics).startswith("server error: 500: \\x1b[31mout of memory again")
    assert len(cause_of(metrics)) <= 300
    assert metrics.registry.get_sample_value("rlpt_groups_given_back_total", {"reason": "server error"}) == 1
