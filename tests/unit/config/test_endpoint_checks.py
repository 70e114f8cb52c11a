"""Ranges of the teacher's servers in a configuration."""

import json

import pytest

from megatron_rlpt.config import load_config
from megatron_rlpt.errors import ConfigError

MINIMAL = ["run.dir=r", "model.path=m", "train.steps=100", "data.sources=[{path: a.jsonl}]"]


def load(*endpoints: dict):
    return load_config(None, [*MINIMAL, f"teacher.workers.endpoints={json.dumps(endpoints)}"])


@pytest.mark.parametrize(
    "url",
    ["http://host:8000/v1", "https://host/v1/", "http://10.0.0.1:80", "http://[::1]:8000/v1",
     "https://me.openai.azure.com/openai/deployments/gpt?api-version=2024-10-21"]
)  # fmt: skip
def test_addresses(url):
    assert load({"url": url}).teacher.workers.endpoints[0].url == url


@pytest.mark.parametrize(
    "url",
    ["", "host:8000/v1", "ftp://host/v1", "http://", "http:///v1", "http://host:0/v1", "http://host:99999/v1",
     "http://host:port/v1", "http://user:hunter2@host/v1", "http://hunter2@host/v1", "http://host/v1?key=hunter2",
     "http://ho st/v1", "http://[::1/v1", "http://host/v1?sig=hunter2", "http://host/v1?v=sk-hunter2hunter2x",
     "http://host/v1?v=1#hunter2"],
)  # fmt: skip
def test_what_is_no_address_is_not_repeated(url):
    with pytest.raises(ConfigError) as caught:
        load({"url": "http://h/v1"}, {"url": url})
    assert str(caught.value).startswith("teacher.workers.endpoints[1].url is not an address; allowed: ")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("header", ["", "api key", "Host", "Content-Type", "api-key: x", "sk_hunter2hunter2x"])
def test_what_is_no_header_for_a_key_is_not_repeated(header):
    with pytest.raises(ConfigError, match=r"endpoints\[0\].key_header is not the name of a header") as caught:
        load({"url": "http://h/v1", "api_key_env": "KEY", "key_header": header})
    assert "hunter2" not in str(caught.value)


def test_a_header_for_a_key_without_a_key():
    load({"url": "http://h/v1", "key_header": "api-key", "api_key_env": "KEY"})
    with pytest.raises(ConfigError, match=r"key_header is api-key, and api_key_env names no key"):
        load({"url": "http://h/v1", "key_header": "api-key"})


@pytest.mark.parametrize(
    ("field", "outside", "inside"),
    [("weight", 0, 0.1), ("weight", -1, 1), ("concurrency", 0, 1), ("tokens_per_second", -1, 0)],
)
def test_ranges(field, outside, inside):
    with pytest.raises(ConfigError, match=rf"^teacher\.workers\.endpoints\[0\]\.{field} is {outside}.*; allowed: "):
        load({"url": "http://h/v1", field: outside})
    load({"url": "http://h/v1", field: inside})


def test_every_server_once():
    with pytest.raises(ConfigError, match=r"endpoints\[1\].url is http://h/v1/, which is listed already"):
        load({"url": "http://h/v1"}, {"url": "http://h/v1/"})
