import json

import pytest

from megatron_rlpt.config import EndpointConfig, Role
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.judge_workers.discovery import announced_endpoints, announcement


def test_what_is_announced_is_read_back():
    endpoint = EndpointConfig("http://node1:8000/v1", "teacher", 2.0, 16, 30.0)
    assert announced_endpoints([], {"one": announcement(endpoint)}) == [endpoint]


def test_what_is_left_out_has_its_default():
    assert announced_endpoints([], {"one": '{"url": "http://h/v1"}'}) == [EndpointConfig("http://h/v1")]


def test_the_configuration_comes_first():
    configured = EndpointConfig("http://node1:8000/v1/", concurrency=4, api_key_env="KEY")
    announced = {"b": announcement(EndpointConfig("http://node1:8000/v1")), "a": '{"url": "http://node2:8000/v1"}'}
    assert announced_endpoints([configured], announced) == [configured, EndpointConfig("http://node2:8000/v1")]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not an object with a url"),
        ("{}", "not an object with a url"),
        ('{"url": 3}', "not an object with a url"),
        ('{"url": "http://h/v1", "weight": "2"}', "weight has the wrong type"),
        ('{"url": "http://h/v1", "concurrency": true}', "concurrency has the wrong type"),
        ('{"url": "http://h/v1", "weight": NaN}', "endpoint.weight is nan"),
        ('{"url": "http://h/v1", "concurrency": 0}', "endpoint.concurrency is 0"),
        ('{"url": "file:///etc/passwd"}', "endpoint.url is not an address"),
        ('{"url": "http://h/v1", "roles": "judge"}', "roles is not a list of judge and rewriter"),
        ('{"url": "http://h/v1", "roles": []}', "roles is not a list of judge and rewriter"),
        ('{"url": "http://h/v1", "roles": ["editor"]}', "roles is not a list of judge and rewriter"),
        ('{"url": "http://h/v1", "roles": [["judge"]]}', "roles is not a list of judge and rewriter"),
        # An announcement must not make a worker send its secrets to the announced server.
        (json.dumps({"url": "http://h/v1", "api_key_env": "AWS_SECRET"}), "api_key_env is not among"),
    ],
)
def test_an_announcement_that_cannot_be_used_is_left_out_and_logged(text, why, caplog):
    good = {"good": '{"url": "http://h2/v1"}'}
    assert announced_endpoints([], {"bad": text, **good}) == [EndpointConfig("http://h2/v1")]
    (record,) = caplog.records
    assert why in str(record.fields["reason"])
    assert record.fields["name"] == "bad"


def test_a_server_with_a_key_is_not_announced():
    with pytest.raises(ConfigError, match="api_key_env"):
        announcement(EndpointConfig("http://h/v1", api_key_env="KEY"))


def test_announced_servers_are_sent_the_key_of_the_configuration_and_no_announcement_names_another():
    configured = EndpointConfig("http://h1/v1", api_key_env="OWN")
    announced = {"one": '{"url": "http://h2/v1"}', "two": '{"url": "http://h3/v1", "api_key_env": "AWS_SECRET"}'}
    assert announced_endpoints([configured], announced, "SHARED") == [
        configured,
        EndpointConfig("http://h2/v1", api_key_env="SHARED"),
    ]


def test_servers_are_found_by_what_their_model_is_for():
    judge, rewriter, both = (EndpointConfig(f"http://{name}/v1") for name in ("j", "r", "b"))
    announced = {
        "j": announcement(judge, [Role.judge]),
        "r": announcement(rewriter, [Role.rewriter]),
        "b": announcement(both),
    }
    assert announced_endpoints([], announced, roles=[Role.judge]) == [both, judge]
    assert announced_endpoints([], announced, roles=[Role.rewriter]) == [both, rewriter]
    assert announced_endpoints([], announced, roles=list(Role)) == [both], "one model for both roles"


def test_one_server_announces_a_base_and_its_adapter():
    base, adapter = (EndpointConfig("http://h/v1", model) for model in ("base", "adapter"))
    announced = {"h/judge": announcement(adapter, [Role.judge]), "h/rewriter": announcement(base, [Role.rewriter])}
    assert announced_endpoints([], announced, roles=[Role.judge]) == [adapter]
    assert announced_endpoints([], announced, roles=[Role.rewriter]) == [base]
