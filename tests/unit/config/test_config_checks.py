"""Ranges, agreement between fields, and a docstring under every field."""

import ast
from pathlib import Path

import pytest

import megatron_rlpt.config.schema as schema
from megatron_rlpt.config import flatten, load_config
from megatron_rlpt.config.checks import _RANGES
from megatron_rlpt.errors import ConfigError

MINIMAL = ["run.dir=r", "model.path=m", "train.steps=100", "data.sources=[{path: a.jsonl}]"]


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
    "teacher.workers.groups": ([0], [1]),
    "teacher.workers.lease": ([0, "inf"], [0.1]),
    "teacher.workers.max_attempts": ([0], [1]),
    "teacher.workers.request_deadline": ([0], [0.1]),
    "teacher.workers.group_deadline": ([0], [0.1]),
    "teacher.workers.drain": ([-1], [0]),
    "teacher.workers.metrics_port": ([-2, 65536], [-1, 65535]),
    "buffer.retry": ([-1, "inf"], [0]),
    "buffer.max_pause": ([-1], [0]),
    "objective.beta": ([0], [0.01]),
    "objective.reference_refresh": ([-1], [0]),
    "objective.clip_low": ([0, 1], [0.001, 0.999]),
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
    "train.logprob_chunk": ([0], [1]),
    "train.max_stall": ([-1], [0, 60]),
    "checkpoint.every": ([0], [1]),
    "checkpoint.keep": ([0], [1]),
    "observe.samples_per_step": ([-1], [0]),
    "evaluation.prefixes": ([1], [2]),
    "evaluation.samples": ([0], [1]),
    "evaluation.examples": ([-1], [0]),
    "data.sources[0].weight": ([0, -1, "nan"], [0.1]),
    "data.sources[0].eod": ([-2], [-1, 0]),
}


def test_every_range_is_tested():
    assert {key for key, *_ in _RANGES} <= LIMITS.keys()


def test_every_number_has_a_range():
    numbers = {key for key, value in flatten(load()).items() if type(value) in (int, float)}
    free = {"run.seed"}  # any number is a seed
    fixed = {"rollout.top_p", "rollout.top_k", "rollout.min_p"}  # one value only, tested below
    axes = {key for key in numbers if key.startswith(("teacher.generative.quality", "teacher.generative.saf"))}
    axes |= {key for key in numbers if key.startswith("teacher.generative.factuality")}
    assert numbers - free - fixed - axes == LIMITS.keys()


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (outside, _) in LIMITS.items() for value in outside])
def test_outside_the_range(key, value):
    written = f".{value}" if isinstance(value, str) else value
    with pytest.raises(ConfigError) as caught:
        load(f"{key}={written}")
    assert str(caught.value).startswith(f"{key} is ")
    assert "allowed: " in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (_, inside) in LIMITS.items() for value in inside])
def test_edge_of_the_range(key, value):
    assert flatten(load(f"{key}={value}"))[key] == value


GRPO = ["objective.name=grpo", "candidates.original=false"]

CONTRADICTIONS = [
    (["objective.name=grpo", "candidates.rollouts=4"], "candidates.original is true; allowed: false"),
    ([*GRPO, "candidates.rewrite=true"], "candidates.rewrite is true; allowed: false"),
    ([*GRPO, "candidates.rollouts=1"], "candidates.rollouts is 1; allowed: at least 2"),
    ([*GRPO, "rollout.temperature=0.9"], "rollout.temperature is 0.9; allowed: 1.0"),
    ([*GRPO, "teacher.judge=generative", "teacher.generative.quality.weight=0"], "teacher.generative"),
    (["data.sources[0].subset=en"], "data.sources[0].subset is 'en'; allowed: empty, because its format is not hf"),
    (["rollout.top_p=0.9"], "rollout.top_p"),
    (["rollout.top_k=50"], "rollout.top_k"),
    (["rollout.min_p=0.1"], "rollout.min_p"),
    (["data.min_prefix=200", "data.max_prefix=100"], "data.min_prefix"),
    (["train.global_batch=10", "train.micro_batch=4"], "train.micro_batch"),
    (["optimizer.warmup_steps=100"], "optimizer.warmup_steps"),
    (["optimizer.lr=1e-6", "optimizer.min_lr=1e-5"], "optimizer.min_lr"),
    (["data.sources=[]"], "data.sources"),
    (["model.path="], "model.path"),
    (["objective.name=ntp", "candidates.original=false", "candidates.rollouts=0"], "candidates.original"),
    (["objective.name=ntp"], "candidates"),
    (["objective.name=sft_rewrite", "candidates.rollouts=0"], "candidates.rewrite"),
    (["objective.name=sft_rewrite", "candidates.rewrite=true"], "candidates"),
    (["objective.name=sft_rollout", "candidates.rollouts=0"], "candidates.rollouts"),
    (["objective.name=sft_rollout", "candidates.rewrite=true"], "candidates"),
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


def test_docstring_under_every_field():
    tree = ast.parse(Path(schema.__file__).read_text())
    bare = []
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        assert ast.get_docstring(node), node.name
        for entry, following in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(entry, ast.AnnAssign):
                continue
            described = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            # A field that is itself a section is described by its class.
            section = getattr(entry.annotation, "id", "").endswith("Config") and hasattr(schema, entry.annotation.id)
            if not described and not section:
                bare.append(f"{node.name}.{entry.target.id}")
    assert not bare


@pytest.mark.parametrize("group", ["data.sources", "data.heldout", "evaluation.ngram_corpus"])
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
    load("evaluation.ngram_corpus=[{path: a.jsonl}]")
    with pytest.raises(ConfigError, match=r"evaluation\.ngram_corpus\[0\]\.weight is 2.0; allowed: 1"):
        load("evaluation.ngram_corpus=[{path: a.jsonl, weight: 2}]")


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
