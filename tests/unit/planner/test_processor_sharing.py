"""Groups that share servers, against results worked out by hand."""

from __future__ import annotations

import math

import pytest
import simpy

from megatron_rlpt.planner.simulation.processor_sharing import ProcessorSharing
from megatron_rlpt.planner.simulation.setting import Judges, Rollouts, Service, SimulatedCluster, Workload
from megatron_rlpt.planner.simulation.simulate import simulate


def times(arrivals, slowing=float, deadline=math.inf):
    """Return the seconds at which groups of (arrival, work) end, and the remaining work."""
    env, ends = simpy.Environment(), {}
    sharing = ProcessorSharing(env, slowing, deadline)

    def group(number, arrival, work):
        yield env.timeout(arrival)
        job = sharing.begin(work)
        yield job.over
        ends[number] = (env.now, job.left)

    for number, (arrival, work) in enumerate(arrivals):
        env.process(group(number, arrival, work))
    env.run()
    return [pytest.approx(ends[number], abs=1e-6) for number in range(len(arrivals))]


def test_one_alone_takes_its_work():
    assert times([(1.0, 3.0)]) == [(4.0, 0)]


def test_two_take_twice_as_long_until_the_shorter_is_done():
    assert times([(0.0, 1.0), (0.0, 2.0)]) == [(2.0, 0), (3.0, 0)]


def test_one_that_comes_later_slows_the_first_down_from_then_on():
    assert times([(0.0, 2.0), (1.0, 2.0)]) == [(3.0, 0), (4.0, 0)]


def test_where_there_is_room_nobody_is_slowed_down():
    # Two at full speed for half a second, three at two thirds of it until the first two are done.
    assert times([(0.0, 2.0), (0.0, 2.0), (0.5, 2.0)], lambda groups: max(1.0, groups / 2)) == [
        (2.75, 0),
        (2.75, 0),
        (3.25, 0),
    ]


def test_what_is_out_of_time_goes_and_leaves_its_share_to_others():
    assert times([(0.0, 4.0), (2.0, 2.0)], deadline=4.0) == [(4.0, 1.0), (5.0, 0)]


def test_servers_do_the_same_work_however_much_groups_differ():
    """Nobody waits for the slowest while others have nothing to do: what is left gets the servers."""
    rollouts = Rollouts(per_episode=1, tokens=1, tokens_per_second=1e9)
    step = Workload(16, 16, 2, Service(1.0))
    slowing = tuple(float(groups) for groups in range(1, 33))
    found = [
        simulate(SimulatedCluster(rollouts, Judges(8, 4, Service(0.5, variation), slowing)), step, 60)
        for variation in (0, 0.5)
    ]
    for result in found:
        assert result.step_seconds == pytest.approx(8.0, rel=0.07)
        assert result.busy["judging"] == pytest.approx(1.0, abs=0.07)
