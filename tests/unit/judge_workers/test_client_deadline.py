import pytest

from megatron_rlpt.config import EndpointConfig
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.judge_workers.client.endpoint import check_deadline


def test_a_deadline_that_will_do():
    check_deadline(EndpointConfig("http://h/v1", tokens_per_second=10.0), max_tokens=500, deadline=50.0)


def test_a_deadline_that_will_not_names_one_that_does():
    endpoint = EndpointConfig("http://h/v1", tokens_per_second=7.0)
    with pytest.raises(ConfigError) as caught:
        check_deadline(endpoint, max_tokens=512, deadline=60.0)
    assert str(caught.value) == (
        "teacher.workers.request_deadline is 60 s, but http://h/v1 generates 7 tokens a second, so 512 tokens take "
        "73.1 s; allowed: at least 74, and more to leave time for retries; or ask for fewer tokens"
    )
    check_deadline(endpoint, max_tokens=512, deadline=74.0)


def test_an_unknown_speed_is_not_taken_for_a_fast_one():
    with pytest.raises(ValueError, match="measure it first"):
        check_deadline(EndpointConfig("http://h/v1"), max_tokens=1, deadline=1.0)
