"""Which models judge and rewriter ask, and options of the rewriter's model that contradict others."""

import json

import pytest

from megatron_rlpt.config import Role, load_config, model_of, models_asked
from megatron_rlpt.errors import ConfigError

MINIMAL = ["run.dir=r", "model.path=policy", "train.steps=100", "data.sources=[{path: a.jsonl}]"]
REWRITES = ["candidates.rewrite=true", "teacher.judge=generative"]
WORKERS = [*REWRITES, "teacher.run_in=workers"]
SERVER = {"url": "http://h:1/v1"}


def load(*overrides: str):
    return load_config(None, [*MINIMAL, *overrides])


def servers(role: str, *endpoints: dict) -> str:
    section = {"judge": "workers", "rewriter": "rewriter"}[role]
    return f"teacher.{section}.endpoints={json.dumps(endpoints)}"


def paths(config) -> list[tuple[str, tuple[str, ...]]]:
    return [(model.path, model.roles) for model in models_asked(config)]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (REWRITES, [("policy", ("judge", "rewriter"))]),
        ([*REWRITES, "teacher.path=t"], [("t", ("judge", "rewriter"))]),
        ([*REWRITES, "teacher.path=t", "teacher.rewriter.path=./t"], [("t", ("judge", "rewriter"))]),
        ([*REWRITES, "teacher.path=t", "teacher.rewriter.path=w"], [("t", ("judge",)), ("w", ("rewriter",))]),
        ([*REWRITES, "teacher.rewriter.path=w"], [("policy", ("judge",)), ("w", ("rewriter",))]),
        (["teacher.path=t", "teacher.judge=generative"], [("t", ("judge",))]),
        ([*WORKERS, servers("rewriter", SERVER)], [("policy", ("judge",)), ("", ("rewriter",))]),
        (
            ["candidates={rewrite: true, rollouts: 0}", "objective.name=sft_rewrite", "teacher.rewriter.path=w"],
            [("w", ("rewriter",))],
        ),
        (["objective.name=ntp", "candidates.rollouts=0"], []),
    ],
)
def test_the_models_that_a_run_asks(overrides, expected):
    assert paths(load(*overrides)) == expected


def test_a_model_of_its_own_has_its_own_context_and_servers_and_otherwise_those_of_the_teacher():
    own = load(*WORKERS, "teacher.max_context=2000", "teacher.rewriter.path=w", servers("judge", SERVER))
    judge, rewriter = (model_of(own, role) for role in Role)
    assert (judge.who, rewriter.who) == ("judge", "rewriter")
    assert [one.url for one in judge.endpoints] == [SERVER["url"]]
    assert (rewriter.endpoints, rewriter.max_context) == ((), 2000)
    longer = load(*WORKERS, "teacher.rewriter.path=w", "teacher.rewriter.max_context=9000")
    assert [model_of(longer, role).max_context for role in Role] == [4096, 9000]
    shared = load(*WORKERS, servers("judge", SERVER))
    assert model_of(shared, Role.judge) == model_of(shared, Role.rewriter)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.rewriter.path=w"], "path is w; allowed: empty, because candidates.rewrite is false"),
        (["teacher.rewriter.max_context=9"], "max_context is 9; allowed: 0, because candidates.rewrite is false"),
        ([servers("rewriter", SERVER)], "endpoints has 1 server(s); allowed: none, because candidates.rewrite is fal"),
        (
            [
                "candidates.rewrite=true",
                "teacher.rewriter.name=megatron_rlpt.world.rewriter:ExactRewriter",
                "teacher.rewriter.options={world: w}",
                "teacher.rewriter.path=w",
            ],
            "path is w; allowed: empty, because teacher.rewriter.name=megatron_rlpt.world.rewriter:ExactRewriter asks",
        ),
        ([*REWRITES, servers("rewriter", SERVER)], "endpoints has 1 server(s); allowed: none with teacher.run_in=trai"),
        (
            [*REWRITES, "teacher.rewriter.max_context=9", "teacher.path=t", "teacher.rewriter.path=t"],
            "max_context is 9; allowed: 0, because the rewriter has the judge's model",
        ),
        (
            [*WORKERS, servers("judge", SERVER), servers("rewriter", {"url": SERVER["url"] + "/"})],
            "endpoints[0] is http://h:1/v1/, which teacher.workers.endpoints has for the judge",
        ),
        (
            [*WORKERS, servers("judge", SERVER | {"model": "m"}), servers("rewriter", SERVER | {"model": "m"})],
            "endpoints[0] is http://h:1/v1 with model m, which teacher.workers.endpoints has for the judge",
        ),
        ([*WORKERS, servers("rewriter", SERVER, SERVER)], "endpoints[1].url is http://h:1/v1, which is listed already"),
        ([*WORKERS, servers("rewriter", {"url": "h"})], "endpoints[0].url is not an address"),
    ],
)
def test_options_of_the_rewriters_model_that_contradict_the_rest_are_named(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert str(caught.value).startswith(f"teacher.rewriter.{message}")
    assert "\n" not in str(caught.value)


def test_an_adapter_and_its_base_may_be_on_one_server():
    load(*WORKERS, servers("judge", SERVER | {"model": "adapter"}), servers("rewriter", SERVER))
