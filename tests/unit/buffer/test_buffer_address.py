"""URLs, names and passwords of rollout buffers."""

from pathlib import Path

import pytest

from megatron_rlpt.buffer.open import read_password
from megatron_rlpt.config import load_config
from megatron_rlpt.config.buffer_address import RedisAddress, check_name, parse_url
from megatron_rlpt.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "address", "text"),
    [
        ("sqlite:///runs/a b/buffer.sqlite", Path("runs/a b/buffer.sqlite"), "runs/a b/buffer.sqlite"),
        ("sqlite:////scratch/x?y#z%20.db", Path("/scratch/x?y#z%20.db"), "/scratch/x?y#z%20.db"),
        ("redis://host", RedisAddress("host"), "redis://host:6379/0"),
        ("redis://10.0.0.1:7000/3", RedisAddress("10.0.0.1", 7000, 3), "redis://10.0.0.1:7000/3"),
        ("rediss://me@host/", RedisAddress("host", username="me", tls=True), "rediss://me@host:6379/0"),
        ("redis://[::1]:7000", RedisAddress("::1", 7000), "redis://[::1]:7000/0"),
    ],
)
def test_urls(url, address, text):
    assert parse_url(url) == address
    assert str(parse_url(url)) == text


@pytest.mark.parametrize(
    "url",
    [
        "", "host:6379", "http://host", "sqlite://", "sqlite:///", "sqlite:runs/x", "redis://", "redis://:6379",
        "redis://host:port", "redis://host:0", "redis://host:99999", "redis://host/one", "redis://host/1/2",
        "redis://host/-1", "redis://host?db=1", "redis://host/0#1", "redis:///socket", "REDIS:host", "redis://[::1",
    ],
)  # fmt: skip
def test_wrong_urls_say_what_is_allowed(url):
    with pytest.raises(ConfigError) as caught:
        parse_url(url)
    assert "sqlite:///path/to/file, redis://host:6379/0 or rediss://host:6379/0" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hush@host",
        "rediss://me:hush@host:1/2",
        "redis://me:hush@host:port/0",
        "redis://x:hush@h:0",
        "redis://:1/hush@h",
    ],
)
def test_a_password_in_the_url_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError) as caught:
        parse_url(url)
    assert "hush" not in str(caught.value)
    overrides = ["run.dir=r", "model.path=m", "train.steps=100", "data.sources=[{path: a}]", f"buffer.url={url}"]
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert "hush" not in str(caught.value)


def test_the_refusal_of_a_password_names_the_ways_to_give_one():
    with pytest.raises(ConfigError, match=r"has a password.*RLPT_BUFFER_PASSWORD.*mode 0600.*buffer\.password_file"):
        parse_url("redis://:hush@host")


@pytest.mark.parametrize("name", ["", "two words", "a/b", "a{b}", "ü", "x" * 101, "a\n"])
def test_names_that_no_store_could_hold(name):
    with pytest.raises(ConfigError, match="name is"):
        check_name(name)


def test_names():
    for name in ("demo", "A-1_b.c", "x" * 100):
        check_name(name)


@pytest.fixture
def password_file(tmp_path, monkeypatch):
    monkeypatch.delenv("RLPT_BUFFER_PASSWORD", raising=False)
    path = tmp_path / "password"
    path.write_text(" hush hush \n")
    path.chmod(0o600)
    return path


def test_passwords(password_file, monkeypatch):
    assert read_password("") is None
    assert read_password(str(password_file)) == " hush hush"
    monkeypatch.setenv("RLPT_BUFFER_PASSWORD", "from the environment")
    assert read_password("") == "from the environment"
    assert read_password(str(password_file)) == " hush hush"
    monkeypatch.setenv("RLPT_BUFFER_PASSWORD", "")
    assert read_password("") is None
    password_file.chmod(0o400)
    assert read_password(str(password_file)) == " hush hush"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o777])
def test_a_password_that_others_can_read_is_refused(password_file, mode):
    password_file.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        read_password(str(password_file))
    assert f"has mode {mode:04o}" in str(caught.value)
    assert f"chmod 600 {password_file}" in str(caught.value)
    assert "hush" not in str(caught.value)


def test_password_files_that_hold_none(password_file, tmp_path):
    password_file.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        read_password(str(password_file))
    password_file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not text"):
        read_password(str(password_file))
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_password(str(path))
