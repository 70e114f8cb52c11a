"""metrics.jsonl and the trackers: each step exactly once, and no tracker left out silently."""

import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from megatron_rlpt.config import flatten, load_config
from megatron_rlpt.errors import CheckpointError, ConfigError
from megatron_rlpt.observe import open_metrics
from megatron_rlpt.observe.jsonl import JsonLines


@pytest.fixture
def config(tmp_path):
    return load_config(
        None,
        [
            f"run.dir={tmp_path / 'run'}",
            "model.path=m",
            "train.steps=9",
            "data.sources=[{path: a}]",
            "observe.tensorboard=false",
        ],
    )


def lines(config, name="metrics.jsonl"):
    with open(f"{config.run.dir}/{name}", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def break_off(config, steps):
    with open_metrics(config, steps.start) as writer:
        for step in steps:
            writer.write(step, step + 1, {"loss": 0.5})
        raise RuntimeError("broken off")


def test_one_flat_line_per_step_readable_before_close(config):
    writer = open_metrics(config, 0)
    writer.write(0, 1, {"loss": 0.5, "pairs": 3})
    (line,) = lines(config)
    assert line.pop("time") > 1e9
    assert line == {"step": 0, "version": 1, "loss": 0.5, "pairs": 3.0}
    writer.close()


def test_numbers_json_lacks_become_null_and_are_named(config):
    with open_metrics(config, 0) as writer:
        writer.write(0, 1, {"loss": float("nan"), "norm": float("-inf"), "margin": 1.0})
    (line,) = lines(config)
    assert (line["loss"], line["norm"], line["margin"]) == (None, None, 1.0)
    assert line["nonfinite"] == ["loss", "norm"]


def test_one_element_tensors_are_numbers_and_text_is_not(config):
    with open_metrics(config, 0) as writer:
        writer.write(0, 1, {"loss": SimpleNamespaceFloat(2.0)})
        with pytest.raises((TypeError, ValueError)):
            writer.write(1, 2, {"loss": "high"})
        with pytest.raises(ValueError, match="'step' is reserved"):
            writer.write(1, 2, {"step": 1.0})
    assert [line["loss"] for line in lines(config)] == [2.0]


class SimpleNamespaceFloat:
    """Stands for a tensor of one element."""

    def __init__(self, value):
        self.value = value

    def __float__(self):
        return self.value


@pytest.mark.parametrize("torn", ["", '{"step": 5, "ver'])
def test_killed_and_resumed_run_has_each_step_once(config, torn):
    with open_metrics(config, 0) as writer:
        for step in range(5):
            writer.write(step, step + 1, {"loss": float(step)})
    with open(f"{config.run.dir}/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(torn)
    with open_metrics(config, 3) as writer:
        for step in range(3, 6):
            writer.write(step, step + 1, {"loss": 10.0 + step})
    assert [(line["step"], line["loss"]) for line in lines(config)] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 13.0),
        (4, 14.0),
        (5, 15.0),
    ]


def test_a_process_killed_while_writing_loses_nothing_it_wrote(config):
    code = (
        "import itertools\n"
        "from megatron_rlpt.config import load_config\n"
        "from megatron_rlpt.observe import open_metrics\n"
        f"config = load_config(None, ['run.dir={config.run.dir}', 'model.path=m', 'train.steps=9', "
        "'data.sources=[{path: a}]', 'observe.tensorboard=false'])\n"
        "writer = open_metrics(config, 0)\n"
        "for step in itertools.count():\n"
        "    writer.write(step, step, {'loss': 1.0})\n"
        "    print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while int(process.stdout.readline()) < 50:
        pass
    process.kill()
    rest = process.communicate()[0].split("\n")
    told = int(rest[-2]) if len(rest) > 1 else 50
    with open_metrics(config, 40) as writer:
        assert writer._sinks[0].last_step >= told
        writer.write(40, 40, {"loss": 2.0})
    assert [line["step"] for line in lines(config)] == list(range(41))


def test_torn_line_alone_goes_and_nothing_else(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert JsonLines(path, start=7).last_step == 1
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


@pytest.mark.parametrize("damage", ["{torn}\n", "[1]\n", '{"no": 1}\n', '{"step": "x"}\n', "\n"])
def test_damage_before_the_end_is_an_error_and_nothing_is_cut(tmp_path, damage):
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 0}\n' + damage + '{"step": 1}\n')
    before = path.read_text()
    with pytest.raises(CheckpointError, match="line 2 is damaged"):
        JsonLines(path, start=1)
    assert path.read_text() == before


def test_tensorboard_shows_each_step_once_after_a_resume(config):
    pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config.observe.tensorboard = True
    with open_metrics(config, 0) as writer:
        for step in range(4):
            writer.write(step, step + 1, {"loss": float(step)})
    with open_metrics(config, 2) as writer:
        for step in range(2, 5):
            writer.write(step, step + 1, {"loss": 10.0 + step})
    events = EventAccumulator(f"{config.run.dir}/tensorboard").Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(0, 0.0), (1, 1.0), (2, 12.0), (3, 13.0), (4, 14.0)]


@pytest.mark.parametrize(("package", "key"), [("wandb", "wandb_project"), ("mlflow", "mlflow_experiment")])
def test_a_tracker_asked_for_but_missing_is_an_error_before_any_file_is_touched(config, package, key, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    setattr(config.observe, key, "mine")
    with pytest.raises(ConfigError) as caught:
        open_metrics(config, 0)
    assert str(caught.value) == (
        f"observe.{key} is 'mine', but {package} cannot be imported; "
        f"pip install 'megatron-rlpt[{package}]' or set observe.{key}="
    )
    with pytest.raises(FileNotFoundError):
        lines(config)


def test_tensorboard_missing(config, monkeypatch):
    config.observe.tensorboard = True
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"observe\.tensorboard is true, .* set observe\.tensorboard=false"):
        open_metrics(config, 0)


@pytest.fixture
def wandb(monkeypatch):
    calls = []

    class Run:
        def log(self, data, step):
            calls.append(("log", step, data))

        def finish(self, exit_code):
            calls.append(("finish", exit_code))

    module = ModuleType("wandb")
    module.init = lambda **arguments: calls.append(("init", arguments)) or Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_gets_config_metrics_and_outcome(config, wandb):
    config.observe.wandb_project = "mine"
    with open_metrics(config, 0) as writer:
        writer.write(0, 1, {"loss": 0.5})
    (_, start), log, finish = wandb
    assert (start["project"], start["name"], start["resume"]) == ("mine", "run", "allow")
    assert start["dir"] == config.run.dir
    assert start["config"] == flatten(config)
    assert log == ("log", 0, {"loss": 0.5, "version": 1})
    assert finish == ("finish", 0)


def test_wandb_resume_continues_the_run_and_repeats_no_step(config, wandb):
    config.observe.wandb_project = "mine"
    with pytest.raises(RuntimeError):
        break_off(config, range(3))
    assert wandb[-1] == ("finish", 1)
    with open_metrics(config, 1) as writer:
        for step in range(1, 5):
            writer.write(step, step + 1, {"loss": 0.5})
    first, second = (call[1] for call in wandb if call[0] == "init")
    assert first["id"] == second["id"]
    assert [call[1] for call in wandb if call[0] == "log"] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in lines(config)] == [0, 1, 2, 3, 4]


@pytest.fixture
def mlflow(monkeypatch):
    calls = []

    def start_run(**arguments):
        calls.append(("start", arguments))
        return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

    module = ModuleType("mlflow")
    module.set_experiment = lambda name: calls.append(("experiment", name))
    module.start_run = start_run
    module.log_params = lambda params: calls.append(("params", params))
    module.log_metrics = lambda metrics, step: calls.append(("metrics", step, metrics))
    module.end_run = lambda status: calls.append(("end", status))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return calls


def test_mlflow_gets_config_metrics_and_outcome_and_resumes(config, mlflow):
    config.observe.mlflow_experiment = "mine"
    with open_metrics(config, 0) as writer:
        writer.write(0, 1, {"loss": 0.5})
        writer.write(1, 2, {"loss": 0.4})
    assert mlflow[:2] == [("experiment", "mine"), ("start", {"run_name": "run"})]
    params = [call[1] for call in mlflow if call[0] == "params"]
    assert {key: value for part in params for key, value in part.items()} == flatten(config)
    assert all(len(part) <= 100 for part in params)
    assert mlflow[-3:] == [
        ("metrics", 0, {"loss": 0.5, "version": 1.0}),
        ("metrics", 1, {"loss": 0.4, "version": 2.0}),
        ("end", "FINISHED"),
    ]
    del mlflow[:]
    with pytest.raises(RuntimeError):
        break_off(config, range(1, 3))
    assert mlflow == [
        ("experiment", "mine"),
        ("start", {"run_id": "abc"}),
        ("metrics", 2, {"loss": 0.5, "version": 3.0}),
        ("end", "FAILED"),
    ]


def test_every_sink_is_closed_when_one_fails(config, wandb, monkeypatch):
    config.observe.wandb_project = "mine"
    writer = open_metrics(config, 0)
    local, remote = writer._sinks

    def unreachable(failed):
        raise OSError("unreachable")

    monkeypatch.setattr(remote, "close", unreachable)
    with pytest.raises(OSError, match="unreachable"):
        writer.close()
    with pytest.raises(ValueError):
        local.write(SimpleNamespace(step=0, version=0, time=0.0, metrics={}))
