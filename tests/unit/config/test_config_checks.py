"""Bounds of fields, their error texts, and consistency between fields."""

import pytest

from megatron_rlpt.config import Fp8, flatten, load_config
from megatron_rlpt.config.fields import About
from megatron_rlpt.config.loading import SCHEMA
from megatron_rlpt.errors import ConfigError

MINIMAL = [
    "run.dir=r", "model.path=m", "train.steps=100", "data.sources=[{path: a.jsonl}]",
    "evaluation.sets=[{name: s, path: s.jsonl}]",
]  # fmt: skip


def load(*overrides: str):
    return load_config(None, [*MINIMAL, *overrides])


# Field -> values just outside its range, and the outermost values inside it that nothing else contradicts.
LIMITS = {
    "parallel.tensor": ([0], [1]),
    "parallel.pipeline": ([0], [1]),
    "parallel.virtual_stages": ([0], [1]),
    "parallel.context": ([0], [1]),
    "parallel.expert": ([0], [1]),
    "parallel.timeout": ([0], [0.1]),
    "parallel.lost_after": ([-1], [0, 1]),
    "candidates.curriculum.start": ([-1], [0]),
    "candidates.curriculum.grow_above": ([-0.1, 1], [0]),
    "candidates.curriculum.window": ([0], [1]),
    "candidates.curriculum.probe": ([0, 1.1], [1]),
    "train.staleness": ([-1], [0]),
    "data.suffix_length": ([0], [1]),
    "data.min_prefix": ([0], [1]),
    "data.max_prefix": ([0], [128]),
    "data.episodes_per_document": ([-1], [0]),
    "data.shuffle_buffer": ([0], [1]),
    "data.max_bad_fraction": ([-0.1, 1.1], [0, 1]),
    "data.max_record_bytes": ([0], [1]),
    "candidates.rollouts": ([-1], [1]),
    "rollout.temperature": ([0, -1], [0.1]),
    "rollout.max_batch": ([0], [1]),
    "rollout.tensor": ([0], [1]),
    "rollout.expert": ([0], [1]),
    "rollout.kv_cache_gib": ([0], [0.1]),
    "rollout.sync_bucket_mib": ([0], [1]),
    "rollout.warn_logprob_gap": ([0], [0.01]),
    "rollout.max_logprob_gap": ([0], [0.1]),
    "teacher.likelihood.repetition_weight": ([-1], [0]),
    "teacher.likelihood.repetition_ngram": ([0], [1]),
    "teacher.likelihood.batch_tokens": ([0], [1]),
    "teacher.generative.temperature": ([-0.1], [0]),
    "teacher.generative.top_p": ([0, 1.1], [0.1, 1]),
    "teacher.generative.max_tokens": ([0], [1]),
    "teacher.rewriter.temperature": ([-0.1], [0]),
    "teacher.rewriter.top_p": ([0, 1.1], [0.1, 1]),
    "teacher.rewriter.anchor_words": ([-1], [0]),
    "teacher.max_context": ([0], [1]),
    "teacher.kv_cache_gib": ([0], [0.1]),
    "teacher.max_failure_rate": ([-0.1, 1.1], [0, 1]),
    "teacher.min_accuracy": ([-0.1, 1.1], [0, 1]),
    "teacher.workers.groups": ([0], [1]),
    "teacher.workers.lease": ([0, "inf"], [0.1]),
    "teacher.workers.max_attempts": ([0], [1]),
    "teacher.workers.request_deadline": ([0], [0.1]),
    "teacher.workers.group_deadline": ([0], [0.1]),
    "teacher.workers.drain": ([-1], [0]),
    "teacher.workers.metrics_port": ([-2, 65536], [-1, 65535]),
    "observe.metrics_port": ([-2, 65536], [-1, 65535]),
    "buffer.retry": ([-1, "inf"], [0]),
    "buffer.max_pause": ([-1], [0]),
    "objective.beta": ([0], [0.01]),
    "objective.reference_refresh": ([-1], [0]),
    "objective.kl": ([-0.001], [0]),
    "objective.clip_low": ([0, 1], [0.001, 0.999]),
    "objective.truncate_ratio": ([-0.001], [0]),
    "objective.clip_high": ([0], [0.001, 5.0]),
    "optimizer.lr": ([0, "nan", "inf"], [1e-9]),
    "optimizer.min_lr": ([-1, "nan"], [0]),
    "optimizer.warmup_steps": ([-1], [0, 99]),
    "optimizer.weight_decay": ([-0.1], [0]),
    "optimizer.beta1": ([-0.1, 1], [0]),
    "optimizer.beta2": ([-0.1, 1], [0]),
    "optimizer.eps": ([0], [1e-12]),
    "optimizer.clip_grad": ([-1, "inf"], [0]),
    "train.steps": ([0], [1]),
    "train.global_batch": ([0], [8]),
    "train.micro_batch": ([0], [1]),
    "train.empty_window": ([0], [1]),
    "train.max_empty_share": ([-0.1, 1.1], [0, 1]),
    "train.min_parse_rate": ([-0.1, 1.1], [0, 1]),
    "train.logprob_chunk": ([0], [1]),
    "train.max_stall": ([-1], [0, 60]),
    "train.router_aux_loss": ([-0.001], [0, 0.01]),
    "checkpoint.every": ([0], [1]),
    "checkpoint.keep": ([0], [1]),
    "observe.samples_per_step": ([-1], [0]),
    "teacher.rewriter.max_context": ([-1], [0]),
    "teacher.generative.quality.weight": ([-1], [0.1]),
    "teacher.generative.quality.votes": ([0], [1]),
    "teacher.generative.safety.weight": ([-1], [0]),
    "teacher.generative.safety.votes": ([0], [1]),
    "teacher.generative.factuality.weight": ([-1], [0]),
    "teacher.generative.factuality.votes": ([0], [1]),
    "evaluation.prefixes": ([1], [2]),
    "evaluation.samples": ([-1], [0]),
    "evaluation.seeds": ([0], [1]),
    "evaluation.perplexity_characters": ([-1], [0, 1]),
    "evaluation.batch_tokens": ([0], [1]),
    "evaluation.tasks_limit": ([-1], [0, 1]),
    "evaluation.sets[0].prompts": ([-1], [0, 1]),
    "evaluation.sets[0].weight": ([-0.1, "inf"], [0]),
    "evaluation.overlap_ngram": ([4], [5]),
    "evaluation.overlap_limit": ([-0.1, "nan"], [0, 0.5]),
    "evaluation.every": ([-1], [0]),
    "evaluation.every_prefixes": ([1], [2]),
    "evaluation.examples": ([-1], [0]),
    "data.sources[0].weight": ([0, -1, "nan"], [0.1]),
    "data.sources[0].eod": ([-2], [-1, 0]),
}


def test_every_range_is_tested():
    ranges = {entry.key.replace("[]", "[0]") for entry in SCHEMA.entries.values() if entry.about.bounds}
    endpoints = ("teacher.workers.endpoints", "teacher.rewriter.endpoints")
    lists = {
        key
        for key in ranges
        if key.startswith(("data.heldout", "evaluation.second_corpus", "evaluation.judges", *endpoints))
    }
    assert ranges - lists - {"run.seed"} == LIMITS.keys()


def test_every_number_has_a_range():
    numbers = {key for key, value in flatten(load()).items() if type(value) in (int, float)}
    assert numbers - {"run.seed"} == LIMITS.keys()


def test_outside_the_range(subtests):
    for key, value in [(key, value) for key, (outside, _) in LIMITS.items() for value in outside]:
        with subtests.test(key=key, value=value):
            written = f".{value}" if isinstance(value, str) else value
            with pytest.raises(ConfigError) as caught:
                load(f"{key}={written}")
            assert str(caught.value).startswith(f"{key} is ")
            assert "allowed: " in str(caught.value)


def test_edge_of_the_range(subtests):
    for key, value in [(key, value) for key, (_, inside) in LIMITS.items() for value in inside]:
        with subtests.test(key=key, value=value):
            assert flatten(load(f"{key}={value}"))[key] == value


GRPO = ["objective.name=grpo", "candidates.original=false"]

CONTRADICTIONS = [
    (["objective.name=grpo", "candidates.rollouts=4"], "candidates.original is true; allowed: false"),
    ([*GRPO, "candidates.rewrite=true"], "candidates.rewrite is true; allowed: false"),
    ([*GRPO, "candidates.rollouts=1"], "candidates.rollouts is 1; allowed: at least 2"),
    ([*GRPO, "rollout.temperature=0.9"], "rollout.temperature is 0.9; allowed: 1.0"),
    ([*GRPO, "teacher.judge=generative", "teacher.generative.quality.weight=0"], "teacher.generative"),
    (["objective.kl=0.1"], "objective.kl is 0.1; allowed: 0, because objective.name=online_dpo does not"),
    (
        [*GRPO, "objective.reference_refresh=5"],
        "objective.reference_refresh is 5; allowed: 0, because objective.name=grpo",
    ),
    (["data.sources[0].subset=en"], "data.sources[0].subset is 'en'; allowed: empty, because its format is not hf"),
    (["data.min_prefix=200", "data.max_prefix=100"], "data.min_prefix"),
    (["train.global_batch=10", "train.micro_batch=4"], "train.micro_batch"),
    (["optimizer.warmup_steps=100"], "optimizer.warmup_steps"),
    (["optimizer.lr=1e-6", "optimizer.min_lr=1e-5"], "optimizer.min_lr"),
    (["data.sources=[]"], "data.sources"),
    (["model.path="], "model.path"),
    (["objective.name=ntp", "candidates.original=false", "candidates.rollouts=0"], "candidates.original"),
    (["objective.name=ntp", "candidates.rollouts=0", "rollout.router_replay=true"], "rollout.router_replay"),
    (["objective.name=ntp"], "candidates"),
    (["objective.name=sft_rewrite", "candidates.rollouts=0"], "candidates.rewrite"),
    (["objective.name=sft_rewrite", "candidates.rewrite=true"], "candidates"),
    (["objective.name=sft_rollout", "candidates.rollouts=0"], "candidates.rollouts"),
    (["objective.name=sft_rollout", "candidates.rewrite=true"], "candidates"),
    (["evaluation.every=5"], "evaluation.every is 5; allowed: 0, because data.heldout is empty"),
    (["candidates.rollouts=0", "candidates.rewrite=true"], "candidates.rollouts"),
    (["candidates.rollouts=1", "candidates.original=false"], "candidates"),
    (["objective.name=rf_nll", "candidates.rollouts=0"], "candidates"),
    (["teacher.judge=generative", "teacher.generative.quality.weight=0"], "teacher.generative"),
    (["teacher.judge=generative", "teacher.max_context=512"], "teacher.generative.max_tokens"),
    (["teacher.generative.safety.weight=-1"], "teacher.generative.safety"),
    (["teacher.generative.factuality.votes=0"], "teacher.generative.factuality"),
    (["data.heldout=[{path: h, weight: 0}]"], "data.heldout[0].weight"),
    (["buffer.url=http://host"], "the rollout buffer's url is 'http://host'"),
    (["buffer.name=two words"], "the rollout buffer's name is 'two words'"),
    (["buffer.password_file=p"], "buffer.password_file is p; allowed: empty"),
    (["buffer.password_file=p", "buffer.url=sqlite:///b"], "buffer.password_file is p; allowed: empty"),
]


@pytest.mark.parametrize(("overrides", "named"), CONTRADICTIONS)
def test_contradictions_name_the_field(overrides, named):
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert str(caught.value).startswith(named)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.name=ntp", "candidates.rollouts=0"],
        ["objective.name=sft_rewrite", "candidates.rewrite=true", "candidates.rollouts=0"],
        ["objective.name=sft_rollout", "candidates.rollouts=1"],
        ["objective.name=rf_nll", "candidates.rewrite=true", "candidates.rollouts=0"],
        ["candidates.rollouts=2", "candidates.original=false"],
        ["teacher.judge=generative"],
        [*GRPO, "candidates.rollouts=2"],
        [*GRPO, "objective.kl=0.1", "objective.reference_refresh=5", "objective.length_norm=constant"],
        ["buffer.url=rediss://host/1", "buffer.password_file=p", "buffer.name=a.b-c_1"],
    ],
)
def test_sensible_combinations(overrides):
    load(*overrides)


def test_derived_values():
    config = load("data.max_prefix=1920", "data.suffix_length=128")
    assert config.max_sequence == 2048
    assert config.teacher_path == "m"
    assert load("teacher.path=t").teacher_path == "t"


def test_every_key_has_a_text():
    bare = [entry.key for entry in SCHEMA.entries.values() if not (entry.about.text or entry.is_section)]
    assert not bare
    assert all(text.endswith(".") for entry in SCHEMA.entries.values() if (text := entry.about.text))
    assert all(entry.kind.__doc__ for entry in SCHEMA.entries.values() if entry.is_section)


@pytest.mark.parametrize(
    ("about", "bounds"),
    [
        ({}, ""),
        ({"at_least": 1}, "at least 1"),
        ({"at_least": 1, "unit": "steps"}, "at least 1 step"),
        ({"at_least": 0, "unit": "seconds"}, "0 seconds or more"),
        ({"at_least": 0, "unit": "seconds", "zero": "never"}, "0 (never) or more seconds"),
        ({"above": 0, "unit": "GiB"}, "above 0 GiB"),
        ({"at_least": 0, "at_most": 1}, "between 0 and 1"),
        ({"at_least": 0, "below": 1}, "at least 0 and below 1"),
        ({"above": 0, "at_most": 1}, "above 0 and at most 1"),
    ],
)
def test_bounds_in_words(about, bounds):
    assert About("", **about).bounds == bounds


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.fp8=fp4", "model.fp8 is fp4; allowed: off, delayed, current, blockwise, mxfp8"),
        ("data.sources[0].format=csv", "data.sources[0].format is csv; allowed: auto, jsonl, parquet, text"),
        ("data.sources=[{path: a, format: csv}]", "format is csv; allowed: auto, jsonl"),
        ("model.fp8=false", "command line: model.fp8 is False, which YAML reads as bool; put it in quotes"),
        ("rollout.top_p=0.9", "command line: rollout.top_p is no longer an option"),
        ("rollout.top_k=0", "command line: rollout.top_k is no longer an option"),
    ],
)
def test_what_is_allowed_is_listed(override, said):
    with pytest.raises(ConfigError) as caught:
        load(override)
    assert said in str(caught.value)


def test_off_is_a_choice_although_yaml_has_another_use_for_it():
    assert load("model.fp8=off").model.fp8 is Fp8.off


@pytest.mark.parametrize("group", ["data.sources", "data.heldout", "evaluation.second_corpus"])
@pytest.mark.parametrize(
    "option",
    [
        "subset: en",
        "split: test",
        "eod: 7, format: text",
        "eod: -2",
        "weight: 0",
        "weight: nan",
        "eod: 7, format: hf",
        "field: body, format: text",
        "field: body, format: megatron",
        "control_tokens: true, format: megatron",
    ],
)
def test_an_option_that_a_source_has_no_use_for_is_refused_wherever_the_source_stands(group, option):
    with pytest.raises(ConfigError, match=rf"{group}\[0\]\.{option.partition(':')[0]} is "):
        load(f"{group}=[{{path: a.jsonl, {option}}}]")


def test_a_weight_among_documents_that_are_all_read_once_is_refused():
    load("evaluation.second_corpus=[{path: a.jsonl}]")
    with pytest.raises(ConfigError, match=r"evaluation\.second_corpus\[0\]\.weight is 2.0; allowed: 1"):
        load("evaluation.second_corpus=[{path: a.jsonl, weight: 2}]")


def test_a_key_in_the_place_of_its_name_is_refused_and_not_shown():
    for key in ("sk-proj-4fQ81SECRET", "hf_4fQ81aSECRETbcdefgh", "two words"):
        with pytest.raises(ConfigError, match=r"teacher\.workers\.key_env is not the name of") as refused:
            load(f"teacher.workers.key_env={key}")
        assert key not in str(refused.value)
    load("teacher.workers.key_env=OUR_KEY")


def test_metrics_listen_on_some_address():
    with pytest.raises(ConfigError, match=r"teacher\.workers\.metrics_host is "):
        load("teacher.workers.metrics_host=' '")
    load("teacher.workers.metrics_host='::1'")
