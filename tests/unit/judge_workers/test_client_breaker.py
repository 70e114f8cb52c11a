from megatron_rlpt.judge_workers.client.breaker import Breaker, State
from megatron_rlpt.judge_workers.client.pool import RETRY_BACKOFF


def closed(**settings) -> Breaker:
    breaker = Breaker(**settings)
    breaker.finish_probe(True)
    return breaker


def test_a_new_server_has_to_answer_first():
    assert Breaker().state == State.HALF_OPEN
    assert closed().closed


def test_only_failures_in_a_row_open_it():
    breaker = closed(failures=3)
    assert [breaker.failed(), breaker.failed()] == [False, False]
    breaker.succeeded()
    assert [breaker.failed(), breaker.failed()] == [False, False]
    assert breaker.closed
    assert breaker.failed()
    assert breaker.state == State.OPEN
    # What else comes back of the same burst opens nothing again.
    assert not breaker.failed()


def test_only_a_probe_closes_it():
    breaker = closed(failures=1)
    breaker.failed()
    breaker.succeeded()
    assert breaker.state == State.OPEN
    breaker.begin_probe()
    breaker.succeeded()
    assert breaker.state == State.HALF_OPEN
    breaker.finish_probe(False)
    assert breaker.state == State.OPEN
    breaker.begin_probe()
    breaker.finish_probe(True)
    assert breaker.closed


def test_after_recovery_the_count_begins_again():
    breaker = closed(failures=2)
    breaker.failed()
    breaker.failed()
    breaker.finish_probe(True)
    assert not breaker.failed()
    assert breaker.closed


def longest_of(breaker: Breaker) -> float:
    drawn = [breaker.cooldown() for _ in range(2000)]
    assert len(set(drawn)) > 1000
    assert min(drawn) >= max(drawn) / 2.01
    return max(drawn)


def test_cooldowns_double_up_to_a_limit_and_start_again():
    breaker = closed(failures=1, first=1.0, longest=6.0)
    breaker.failed()
    seen = []
    for _ in range(5):
        seen.append(round(longest_of(breaker), 1))
        breaker.finish_probe(False)
    assert seen == [1.0, 2.0, 4.0, 6.0, 6.0]
    breaker.finish_probe(True)
    assert round(longest_of(breaker), 1) == 1.0


def test_it_can_stay_open_for_ever():
    breaker = Breaker()
    for _ in range(5000):
        breaker.finish_probe(False)
    assert 0 < breaker.cooldown() <= 15.0


def test_backoff_is_anything_up_to_a_bound_that_doubles():
    for attempts, bound in [(1, 0.25), (2, 0.5), (3, 1.0), (1000, 10.0)]:
        drawn = [RETRY_BACKOFF.delay(attempts) for _ in range(2000)]
        assert min(drawn) < 0.05 * bound
        assert 0.95 * bound < max(drawn) <= bound
