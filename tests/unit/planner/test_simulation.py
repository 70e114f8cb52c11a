"""The simulated run against results worked out by hand, and against the rules of the real one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_rlpt.errors import ConfigError
from megatron_rlpt.planner.simulation.scenario import optimal_checkpoint_interval
from megatron_rlpt.planner.simulation.setting import Failures, Judges, Rollouts, Service, SimulatedCluster, Workload
from megatron_rlpt.planner.simulation.simulate import simulate

BATCH = 16


def cluster(generate: float = 8.0, judge: float = 8.0, slots: int = 4, **changes) -> SimulatedCluster:
    """Rollouts of a batch take ``generate`` seconds alone, judging it ``judge``."""
    rollouts = Rollouts(per_episode=2, tokens=10, tokens_per_second=BATCH * 2 * 10 / generate)
    return SimulatedCluster(rollouts, Judges(slots, 1, Service(judge * slots / BATCH)), **changes)


def work(staleness: int = 0, update: float = 8.0, part: int = 4, **changes) -> Workload:
    return Workload(BATCH, part, staleness, Service(update), **changes)


def test_without_overlap_a_step_takes_the_sum_of_its_stages():
    result = simulate(cluster(), work(part=BATCH, sync=0.5), 20)
    assert result.step_seconds == pytest.approx(24.5, rel=0.03)
    assert result.staleness_highest == 0


def test_judges_begin_with_a_part_while_the_next_is_generated():
    whole = simulate(cluster(), work(part=BATCH), 20)
    parts = simulate(cluster(), work(part=4), 20)
    # All but the last part is judged meanwhile.
    assert whole.step_seconds - parts.step_seconds == pytest.approx(6.0, rel=0.05)


@pytest.mark.parametrize(("generate", "judge", "update"), [(8, 4, 4), (4, 8, 4), (4, 4, 8), (3, 5, 7)])
def test_with_overlap_a_step_takes_as_long_as_its_slowest_stage(generate, judge, update):
    names = {generate: "rollouts", judge: "judging", update: "training"}
    result = simulate(cluster(generate, judge), work(2, update), 40)
    assert result.step_seconds == pytest.approx(max(generate, judge, update), rel=0.05)
    assert result.bottleneck == names[max(generate, judge, update)]
    assert result.busy[result.bottleneck] > 0.9


def test_new_weights_wait_for_the_end_of_generation():
    # Neither may run during the weight sync.
    result = simulate(cluster(generate=8, judge=1), work(1, 2.0, sync=1.0), 40)
    assert result.step_seconds == pytest.approx(9.0, rel=0.03)
    assert result.wait_for_rollouts == pytest.approx(6.0, rel=0.1)


def test_where_nothing_runs_in_the_background_staleness_saves_no_generation():
    beside = simulate(cluster(judge=1), work(1), 30)
    in_turn = simulate(cluster(judge=1), work(1, background=False), 30)
    assert beside.step_seconds == pytest.approx(8, rel=0.05)
    assert in_turn.step_seconds == pytest.approx(16, rel=0.05)


def test_without_judges_a_step_is_rollouts_and_update():
    result = simulate(replace(cluster(), judges=None), work(), 20)
    assert result.step_seconds == pytest.approx(16, rel=0.01)


@pytest.mark.parametrize("staleness", [0, 1, 2, 5])
def test_no_rollout_is_older_than_the_bound(staleness):
    varied = replace(cluster(), judges=Judges(4, 1, Service(2.0, 1.0)))
    result = simulate(varied, work(staleness), 40)
    assert result.staleness_highest == staleness


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_the_buffer_never_holds_more_than_it_takes(staleness):
    result = simulate(cluster(generate=1, judge=4), work(staleness), 40)
    assert result.in_flight == (staleness + 1) * BATCH


def test_a_part_larger_than_the_batch_is_refused():
    with pytest.raises(ConfigError, match="part is 17 episodes"):
        work(part=BATCH + 1)


def test_the_same_seed_gives_the_same_run():
    varied = replace(
        cluster(), judges=Judges(4, 1, Service(2.0, 0.5)), failures=Failures(nodes=8, per_node_hour=0.5, restart=20)
    )
    step = work(1, checkpoint_every=3, checkpoint=1.0)
    assert simulate(varied, step, 60, seed=3) == simulate(varied, step, 60, seed=3)
    assert simulate(varied, step, 60, seed=3) != simulate(varied, step, 60, seed=4)


def test_slow_judges_cost_time_and_a_deadline_trades_it_for_groups_given_up():
    judges = Judges(workers=8, groups=2, service=Service(6.0))
    fast = simulate(replace(cluster(), judges=judges), work(1), 40)
    slow = replace(judges, slow_share=0.25, slowdown=8.0)
    slowed = simulate(replace(cluster(), judges=slow), work(1), 40)
    assert slowed.step_seconds > 1.5 * fast.step_seconds
    hurried = simulate(replace(cluster(), judges=replace(slow, deadline=12.0)), work(1), 40)
    assert fast.step_seconds < hurried.step_seconds < 0.85 * slowed.step_seconds
    strict = simulate(replace(cluster(), judges=replace(slow, deadline=12.0, max_attempts=1)), work(1), 40)
    assert slowed.given_up == 0 < strict.given_up
    assert hurried.given_up < strict.given_up


def test_rollouts_that_end_early_are_cheaper_but_the_longest_holds_up_the_others():
    full = Rollouts(per_episode=4, tokens=100, tokens_per_second=1000.0)
    early = replace(full, stop_probability=0.05)
    judges = Judges(16, 4, Service(0.1))
    step = work(1, update=0.1)
    seconds = {
        name: simulate(SimulatedCluster(rollouts, judges), step, 40).step_seconds
        for name, rollouts in {
            "full": full,
            "early": early,
            "held up": replace(early, sequence_tokens_per_second=50.0),
        }.items()
    }
    # Mean of min(geometric, 100) with 0.05: (1 - 0.95 ** 100) / 0.05 = 19.9 of 100 tokens.
    assert seconds["early"] / seconds["full"] == pytest.approx(0.199, rel=0.1)
    assert seconds["held up"] > 1.5 * seconds["early"]


def test_a_failure_costs_the_steps_since_the_checkpoint_and_the_restart():
    calm = simulate(cluster(), work(1, checkpoint_every=10), 600)
    failing = replace(cluster(), failures=Failures(nodes=10, per_node_hour=0.5, restart=30.0))
    broken = simulate(failing, work(1, checkpoint_every=10), 600)
    assert calm.failures == 0
    assert calm.lost == 0
    assert broken.failures > 5
    # On average half of the ten steps between checkpoints, and the restart; what was judged needs not be judged again.
    assert broken.lost / broken.failures == pytest.approx(30 + 5 * 8, rel=0.35)
    assert broken.seconds - calm.seconds == pytest.approx(broken.lost, rel=0.1)


def test_a_run_that_cannot_reach_its_next_checkpoint_says_so():
    failing = replace(cluster(), failures=Failures(nodes=1000, per_node_hour=100.0, restart=60.0))
    with pytest.raises(ConfigError, match="checkpoint"):
        simulate(failing, work(1, checkpoint_every=30), 60)


def test_too_few_steps_to_be_steady_are_refused():
    with pytest.raises(ConfigError, match="too few"):
        simulate(cluster(), work(3), 8)


def test_the_best_checkpoint_interval_is_near_the_least_simulated_time():
    seconds_a_step, cost = 1.0, 4.0
    failures = Failures(nodes=36, per_node_hour=0.5, restart=10.0)
    assert failures.seconds_between == 200
    best = optimal_checkpoint_interval(cost, failures.seconds_between)
    assert best == pytest.approx((2 * cost * 200) ** 0.5, rel=0.1)
    rollouts = Rollouts(per_episode=1, tokens=1, tokens_per_second=1e9)
    alone = SimulatedCluster(rollouts, None, failures)

    def seconds(every: int) -> float:
        step = Workload(1, 1, 0, Service(seconds_a_step), checkpoint=cost, checkpoint_every=every)
        return sum(simulate(alone, step, 4000, seed).seconds for seed in range(4))

    by_interval = {every: seconds(every) for every in (4, 10, round(best), 120, 360)}
    assert min(by_interval, key=by_interval.__getitem__) == round(best)


def test_where_nothing_fails_checkpoints_are_never_needed():
    assert optimal_checkpoint_interval(10.0, float("inf")) == float("inf")
    assert optimal_checkpoint_interval(100.0, 40.0) == 40.0
