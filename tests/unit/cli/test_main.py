"""The command line from outside: exit codes, one-line errors, and no import of torch without need."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from megatron_rlpt import __version__
from megatron_rlpt.cli import main as cli
from megatron_rlpt.cli.version import describe_version
from megatron_rlpt.errors import CheckpointError

MINIMAL = "run: {dir: r}\nmodel: {path: m}\ndata: {sources: [{path: a}]}\ntrain: {steps: 100}\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return str(path)


@pytest.fixture
def rlpt(monkeypatch, capsys):
    """Run the command in this process; returns exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlpt", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        shown = capsys.readouterr()
        return left.value.code or 0, shown.out, shown.err

    return run


@pytest.fixture
def training(monkeypatch):
    """Replace the modules that need torch; return the calls to them."""
    calls = []
    run = ModuleType("megatron_rlpt.trainer.run")
    run.run_training = lambda config, fresh: calls.append((config, fresh))
    compare = ModuleType("megatron_rlpt.evaluation.evaluate")
    compare.evaluate = lambda config, *rest: calls.append((config, *rest))
    for module in (run, compare):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def training_by(statements: str) -> str:
    """Return a program like ``rlpt`` in which these statements replace training."""
    return (
        "import sys\nfrom types import ModuleType\n"
        f"def run_training(config, fresh):\n    {statements}\n"
        "module = ModuleType('megatron_rlpt.trainer.run'); module.run_training = run_training\n"
        "sys.modules['megatron_rlpt.trainer.run'] = module\n"
        "from megatron_rlpt.cli.main import entry\nentry()"
    )


def outside(*arguments, code=None, **environment):
    command = [sys.executable, *(["-c", code] if code else ["-m", "megatron_rlpt"]), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


def test_train_passes_the_checked_configuration(rlpt, training, file):
    assert rlpt("train", "--config", file, "train.steps=7", "--fresh", "optimizer.lr=1e-3")[0] == 0
    ((config, fresh),) = training
    assert (config.train.steps, config.optimizer.lr, fresh) == (7, 1e-3, True)


def test_train_resumes_by_default(rlpt, training, file):
    rlpt("train", "--config", file)
    assert training[0][1] is False


def test_evaluate(rlpt, training, file):
    assert rlpt("evaluate", "--config", file, "evaluation.prefixes=4")[0] == 0
    config, *rest = training[0]
    assert config.evaluation.prefixes == 4
    assert rest == [Path("r"), (), ""]


def test_models_that_are_named_need_no_run(rlpt, training, file, tmp_path):
    bare = tmp_path / "bare.yaml"
    bare.write_text("model: {path: m}\ndata: {sources: [{path: a}]}\n")
    named = ["--model", "one=a/b", "--model", "c", "--reference", "d"]
    assert rlpt("evaluate", "--config", bare, *named)[0] == 0
    assert training[0][1:] == (Path("runs/evaluation"), ["one=a/b", "c"], "d")
    assert rlpt("evaluate", "--config", file, "--model", "c", "--out", "e")[0] == 0
    config, *rest = training[1]
    assert (config.run.dir, rest) == ("r", [Path("e"), ["c"], ""])
    code, _, err = rlpt("evaluate", "--config", bare)
    assert code == 2
    assert "required but not set: run.dir, train.steps" in err


def test_config_prints_yaml_that_loads_again(rlpt, file, tmp_path):
    code, out, err = rlpt("config", "--config", file, "objective.name=rf_nll")
    assert (code, err) == (0, "")
    (tmp_path / "again.yaml").write_text(out)
    assert rlpt("config", "--config", str(tmp_path / "again.yaml"))[1] == out


@pytest.mark.parametrize(
    ("key", "printed"),
    [
        ("train.steps", "100\n"),
        ("objective.name", "online_dpo\n"),
        ("candidates.original", "true\n"),
        ("optimizer.lr", "5e-06\n"),
        ("teacher.path", "\n"),
        ("data.sources[0].path", "a\n"),
        ("run", "dir: r\nseed: 1\n"),
        ("data.heldout", "[]\n"),
    ],
)
def test_config_get(rlpt, file, key, printed):
    assert rlpt("config", "--config", file, "--get", key) == (0, printed, "")


@pytest.mark.parametrize("key", ["train.stepz", "nothing", "train.steps.more", "data.sources[4].path"])
def test_config_get_of_an_unknown_key(rlpt, file, key):
    code, out, err = rlpt("config", "--config", file, f"--get={key}")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: --get {key}".rstrip())
    assert err.count("\n") == 1


def test_a_wrong_configuration_is_one_line_and_exit_code_2(rlpt, training, file):
    code, out, err = rlpt("train", "--config", file, "train.stepz=7")
    assert (code, out) == (2, "")
    assert err == "error: command line: unknown key 'train.stepz'; the nearest valid key is 'train.steps'\n"
    assert training == []


def test_every_error_of_ours_is_one_line_and_its_own_exit_code(rlpt, training, file, monkeypatch):
    def fail(config, fresh):
        raise CheckpointError("step 3 is\nincomplete;   remove it")

    monkeypatch.setattr(sys.modules["megatron_rlpt.trainer.run"], "run_training", fail)
    assert rlpt("train", "--config", file) == (8, "", "error: step 3 is incomplete; remove it\n")


def test_interrupt_is_130(rlpt, training, file, monkeypatch):
    def fail(config, fresh):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["megatron_rlpt.trainer.run"], "run_training", fail)
    assert rlpt("train", "--config", file)[0] == 130


def test_a_bug_keeps_its_plain_traceback_without_local_values(file):
    code = training_by("token = 'hidden' + '-value'; raise KeyError('bug')")
    done = outside("train", "--config", file, code=code)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.rstrip().endswith("KeyError: 'bug'")
    assert "hidden-value" not in done.stderr
    assert "─" not in done.stderr


def test_real_interrupt_of_a_process(file):
    code = training_by("import time; print('running', flush=True); time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", "--config", file],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors


@pytest.mark.parametrize("arguments", [("nonsense",), ("config",), ("train", "--config"), ("config", "--what")])
def test_wrong_usage_is_exit_code_2(rlpt, arguments):
    code, out, err = rlpt(*arguments)
    assert (code, out) == (2, "")
    assert "Error:" in err


def test_version_and_module(file):
    done = outside("--version")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert done.stdout.startswith(f"rlpt {__version__}")


def test_the_version_names_the_commit(tmp_path):
    assert describe_version(tmp_path) == f"rlpt {__version__}"
    (tmp_path / "job").mkdir()
    for uncommitted, shown in ([], "0123456789ab"), (["a.py"], "0123456789ab-dirty"):
        code = {"commit": "0123456789abcdef", "uncommitted": uncommitted}
        (tmp_path / "job/code.json").write_text(json.dumps(code))
        assert describe_version(tmp_path) == f"rlpt {__version__} (commit {shown})"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("optimizer.lr", ["optimizer.lr\n", "default: 5e-06", "allowed: above 0", "Megatron-LM: --lr"]),
        ("model.fp8", ["type: choice", "allowed: off, delayed, current, blockwise, mxfp8"]),
        ("buffer", ["type: section", "buffer.url "]),
        ("data.sources[0].weight", ["data.sources[].weight\n"]),
        ("data.sources[0]", ["data.sources[].path "]),
    ],
)
def test_help_of_a_key(rlpt, key, said):
    code, out, err = rlpt("config", "--help", key)
    assert (code, err) == (0, "")
    assert all(words in out for words in said)


def test_help_of_an_unknown_key_names_the_nearest(rlpt):
    code, out, err = rlpt("config", "--help", "optimizer.lrr")
    assert (code, out) == (2, "")
    assert err == "error: --help optimizer.lrr: unknown key; the nearest valid key is 'optimizer.lr'\n"


def test_the_reference_of_the_manual_is_what_the_fields_say(rlpt):
    manual = (Path(__file__).resolve().parents[3] / "configs/README.md").read_text(encoding="utf-8")
    assert rlpt("config", "--reference")[1] in manual + "\n", "run tools/config_reference.py"


@pytest.mark.parametrize("arguments", [["--help"], ["config", "--config", "FILE"], ["train", "--help"]])
def test_no_torch_where_none_is_needed(arguments, file):
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'megatron', 'vllm', 'transformers', 'numpy', 'tensorboard'}\n"
        "atexit.register(lambda: print('heavy:', sorted(heavy & set(sys.modules))))\n"
        "from megatron_rlpt.cli.main import entry\nentry()"
    )
    done = outside(*(file if part == "FILE" else part for part in arguments), code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("heavy: []")


def test_help_answers_quickly():
    started = time.monotonic()
    assert outside("--help").returncode == 0
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("raised", "code", "err"),
    [
        ("SystemExit", 0, ""),
        ("SystemExit(3)", 3, ""),
        ("SystemExit('no')", 1, "no\n"),
        ("RlptError('no')", 10, "error: no\n"),
    ],
)
def test_what_is_raised_is_the_exit_code_of_the_process(file, raised, code, err):
    program = training_by(f"from megatron_rlpt.errors import RlptError; raise {raised}")
    done = outside("train", "--config", file, code=program)
    assert (done.returncode, done.stderr) == (code, err)
