"""Reading files and overrides: accepted input, and error messages for the rest."""

import contextlib
import copy
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_rlpt.config import Config, Decay, Dtype, SourceConfig, flatten, load_config, to_yaml
from megatron_rlpt.errors import ConfigError

MINIMAL = ["run.dir=r", "model.path=m", "train.steps=100", "data.sources=[{path: a.jsonl}]"]


def load(*overrides: str) -> Config:
    return load_config(None, [*MINIMAL, *overrides])


@pytest.fixture(scope="module")
def minimal() -> Config:
    return load()


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize(
    "path",
    # Cluster files and experiments have their own schemas and tests.
    [
        path
        for path in sorted(CONFIGS.glob("**/*.yaml"))
        if path.parent.name != "cluster" and path.name not in ("small_world.yaml", "trained_teacher.yaml")
    ],
    ids=lambda path: path.stem,
)
def test_every_shipped_config_loads(path):
    assert load_config(path).train.steps >= 1


def test_required_values_are_named_together():
    with pytest.raises(ConfigError, match=r"required but not set: model\.path, run\.dir, train\.steps; set it"):
        load_config(None)


def test_file_and_overrides_in_order(write):
    path = write(
        "a.yaml", "run: {dir: r}\nmodel: {path: m, dtype: fp32}\ndata: {sources: [{path: x}]}\ntrain: {steps: 5}\n"
    )
    config = load_config(path, ["train.steps=7", "train.steps=9", "optimizer.decay=linear"])
    assert (config.train.steps, config.model.dtype, config.optimizer.decay) == (9, Dtype.fp32, Decay.linear)


@pytest.mark.parametrize(
    ("override", "wrong", "nearest"),
    [
        ("train.step=3", "train.step", "train.steps"),
        ("trian.steps=3", "trian.steps", "train.steps"),
        ("candidates.num_rollouts=3", "candidates.num_rollouts", "candidates.rollouts"),
        ("data.sources=[{pth: a}]", "data.sources[].pth", "data.sources[].path"),
        ("data.sources[0].pth=a", "data.sources[0].pth", "data.sources[].path"),
        ("optimizer={learning_rate: 1}", "optimizer.learning_rate", "optimizer"),
    ],
)
def test_unknown_key_names_the_nearest(override, wrong, nearest):
    assert f"unknown key '{wrong}'; the nearest valid key is '{nearest}" in refused(override)


def test_unknown_key_in_a_file_names_the_file(write):
    path = write("a.yaml", "train: {stepz: 5}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: unknown key 'train\.stepz'; .*'train\.steps'"):
        load_config(path)


def test_a_number_as_key_is_unknown_and_not_dropped(write):
    with pytest.raises(ConfigError, match="unknown key '1'"):
        load_config(write("a.yaml", "1: 2\n"), MINIMAL)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=many", "train.steps"),
        ("train.steps=2.5", "2.5"),
        ("train.steps=true", "True"),
        ("train.steps=null", "train.steps"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("data.add_bos=perhaps", "data.add_bos"),
        ("objective.name=dpo", "online_dpo"),
        ("data.sources=3", "data.sources"),
        ("data.sources=[3]", "data.sources[0]"),
        ("data.sources[7].path=x", "data.sources[7]"),
        ("train=3", "train"),
        ("data=null", "data"),
        ("run.dir=[1", "run.dir=[1"),
        ("run.dir=null", "run.dir"),
        ("run.dir=", "run.dir is empty"),
        ("run.dir={a: b}", "run.dir.a"),
        ("justtext", "section.key=value"),
        ("=3", "section.key=value"),
        ("--steps=3", "section.key=value"),
        ("run.dir=${nope}", "nope"),
        ("run.dir=${oc.env:RLPT_NOT_SET}", "RLPT_NOT_SET"),
        ("run.dir=${run.dir}", "run.dir"),
        ("base=other.yaml", "base"),
    ],
)
def test_wrong_value_is_one_line_that_names_it(override, said):
    assert said in refused(override)


def test_numbers_and_scientific_notation():
    assert load("optimizer.lr=5e-6").optimizer.lr == 5e-6
    assert load("optimizer.lr=1").optimizer.lr == 1.0


@pytest.mark.parametrize("text", ["007", "2026_01", "1e5", "yes", "3.10", "a=b", "a,b", "0x10"])
def test_text_on_the_command_line_is_taken_as_it_is(text):
    assert load(f"run.dir={text}").run.dir == text


def test_number_where_text_belongs_in_a_file_is_refused_not_rewritten(write):
    path = write("a.yaml", "run: {dir: 007}\n")
    with pytest.raises(ConfigError, match=r"run\.dir is 7, .*quotes"):
        load_config(path, MINIMAL[1:])
    assert load_config(write("b.yaml", "run: {dir: '007'}\n"), MINIMAL[1:]).run.dir == "007"


def test_lists_are_replaced_as_a_whole_or_item_by_item():
    config = load("data.sources=[{path: x}, {path: y, weight: 2}]", "data.sources[1].weight=3", "data.sources.0.path=z")
    assert config.data.sources == [SourceConfig(path="z"), SourceConfig(path="y", weight=3.0)]


def test_an_empty_text_override_turns_an_option_off(write):
    path = write("a.yaml", "observe: {wandb_project: p}\n")
    assert load_config(path, [*MINIMAL, "observe.wandb_project="]).observe.wandb_project == ""


def test_interpolation_of_keys_and_environment(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/big")
    config = load("run.dir=${oc.env:SCRATCH}/${objective.name}-${run.seed}", "optimizer.min_lr=${optimizer.lr}")
    assert config.run.dir == "/big/online_dpo-1"
    assert config.optimizer.min_lr == config.optimizer.lr


def test_base_is_relative_to_the_file_and_chains(write):
    write(
        "deep/root.yaml",
        "run: {dir: root}\nmodel: {path: m}\ntrain: {steps: 1}\ndata: {sources: [{path: a}, {path: b}]}\n",
    )
    write("deep/middle.yaml", "base: root.yaml\ntrain: {steps: 2}\n")
    top = write("top.yaml", "base: deep/middle.yaml\nrun: {dir: top}\ndata: {sources: [{path: c}]}\n")
    config = load_config(top)
    assert (config.run.dir, config.train.steps, config.model.path) == ("top", 2, "m")
    assert [source.path for source in config.data.sources] == ["c"]


def test_base_in_a_circle(write):
    write("b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load_config(write("a.yaml", "base: b.yaml\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: nope.yaml\n", "nope.yaml does not exist"),
        ("base: [3]\n", "the path of one file"),
        ("base: ${x}\n", "does not exist"),
        ("- 1\n", "must hold sections"),
        ("hello\n", "unknown key 'hello'"),
        ("3\n", "not readable as YAML"),
        ("train: {steps: 1\n", "not readable as YAML"),
        ("train:\n  steps: 1\n  steps: 2\n", "duplicate key steps, line 3"),
        ("? [a, b]\n: 3\n", "not readable as YAML"),
        ("train: !!python/object:os.system {}\n", "not readable as YAML"),
    ],
)
def test_broken_files(write, text, said):
    with pytest.raises(ConfigError) as caught:
        load_config(write("a.yaml", text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "nope.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(tmp_path / "b.yaml")


def test_an_empty_file_changes_nothing(write):
    assert load_config(write("a.yaml", ""), MINIMAL) == load()


def test_yaml_round_trip(write):
    config = load(
        "data.sources=[{path: '1e5', weight: 0.5}]", "model.path=yes", "optimizer.eps=1e-9", "objective.name=rf_nll"
    )
    assert load_config(write("a.yaml", to_yaml(config))) == config


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(text="${run.seed}")
@example(text="a\\${b}")
@example(text="\\\\${x}\\")
@example(text="{$${")
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
        lambda text: text != "???"
    )
)
def test_any_text_survives_the_round_trip(tmp_path, minimal, text):
    config = copy.deepcopy(minimal)
    config.run.dir = text
    path = tmp_path / "a.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config


def test_flatten_names_every_value():
    flat = flatten(load("data.sources=[{path: a}, {path: b}]"))
    assert flat["data.sources[1].path"] == "b"
    assert flat["objective.name"] == "online_dpo"
    assert flat["data.heldout"] == []


@settings(deadline=None, max_examples=60)
@given(key=st.text(max_size=30), value=st.text(max_size=20))
def test_no_override_crashes(key, value):
    with contextlib.suppress(ConfigError):
        load(f"{key}={value}")


@settings(deadline=None, max_examples=60)
@given(key=st.sampled_from(sorted(flatten(load()))), value=st.text(max_size=20))
def test_no_value_of_a_known_key_crashes(key, value):
    with contextlib.suppress(ConfigError):
        load(f"{key}={value}")


_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(exclude_categories=["Cs"]))
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tree=st.dictionaries(
        st.one_of(st.text(max_size=8), st.sampled_from(["run", "model", "data", "train", "base", "steps", "sources"])),
        st.recursive(
            _SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner), max_leaves=5
        ),
    )
)
def test_no_file_crashes(tmp_path, tree):
    import yaml

    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with contextlib.suppress(ConfigError):
        load_config(path, MINIMAL)


def test_importable_without_torch():
    code = (
        "import sys\n"
        "for name in ('torch', 'megatron.core', 'vllm', 'transformers'): sys.modules[name] = None\n"
        "from megatron_rlpt.config import load_config, to_yaml\n"
        f"print(to_yaml(load_config(None, {MINIMAL!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "seed: 1" in done.stdout
