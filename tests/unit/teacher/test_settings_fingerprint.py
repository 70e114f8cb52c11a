from __future__ import annotations

import pytest

from megatron_rlpt.config import Config, EndpointConfig
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.teacher.settings_fingerprint import require_same_settings, settings_fingerprint


def config(**changes) -> Config:
    made = Config()
    made.model.path = "models/base"
    made.run.dir = "runs/a"
    made.train.steps = 3
    for key, value in changes.items():
        target = made
        *path, last = key.split("__")
        for part in path:
            target = getattr(target, part)
        setattr(target, last, value)
    return made


def test_the_same_settings_agree_wherever_files_lie_and_whatever_does_not_judge():
    theirs = settings_fingerprint(config())
    require_same_settings(config(), theirs)
    require_same_settings(config(model__path="/elsewhere/models/base", run__dir="runs/b", optimizer__lr=1.0), theirs)
    own = config(teacher__rewriter__path="/here/w")
    require_same_settings(config(teacher__rewriter__path="/there/writer"), settings_fingerprint(own))
    require_same_settings(config(teacher__workers__endpoints=[EndpointConfig(url="http://a/v1")]), theirs)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"run__seed": 2}, "run.seed is 2 for this worker and 1 for the trainer"),
        ({"model__path": "models/other"}, "name of model.path is other"),
        ({"candidates__rewrite": True}, "candidates.rewrite is True"),
        ({"teacher__generative__quality__votes": 1}, "teacher.generative.quality.votes is 1"),
        ({"teacher__likelihood__repetition_weight": 0.0}, "teacher.likelihood.repetition_weight is 0.0"),
        ({"data__suffix_length": 5}, "data.suffix_length is 5"),
        ({"teacher__rewriter__path": "w"}, "own model of teacher.rewriter is True for this worker and False for the"),
    ],
)
def test_a_worker_that_would_judge_otherwise_is_refused_by_name(change, named):
    with pytest.raises(ConfigError) as caught:
        require_same_settings(config(**change), settings_fingerprint(config()))
    assert str(caught.value).startswith(named)
    assert "start both with the same configuration" in str(caught.value)
