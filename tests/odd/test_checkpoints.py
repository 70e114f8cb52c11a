"""Odd and hostile checkpoints and model folders, through ``rlpt convert`` and ``rlpt train``."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from prefork import MEGATRON, forked
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo

ROOT = Path(__file__).resolve().parents[2]


class Calls:
    """Pickled, it is a call that makes a file; ``how`` is one of the ways to ask for it."""

    def __init__(self, mark: Path, how: str = "open") -> None:
        self.mark, self.how = mark, how

    def __reduce__(self):
        if self.how == "system":
            return os.system, (f"touch {self.mark}",)
        if self.how == "eval":
            return eval, (f"open({str(self.mark)!r}, 'w')",)
        if self.how == "getattr":
            return getattr, (Path(self.mark), "touch")
        if self.how == "torch":
            return torch.load, (str(self.mark),)
        return open, (str(self.mark), "w")


WAYS = {
    "open": "io.open",
    "system": "posix.system",
    "eval": "builtins.eval",
    "getattr": "builtins.getattr",
    "torch": "torch.serialization.load",
}


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory) -> Path:
    """The tiny model as a Megatron checkpoint."""
    from megatron_rlpt.convert.convert import convert
    from megatron_rlpt.convert.formats import Format

    return convert(tiny_model, tmp_path_factory.mktemp("megatron") / "saved", Format.MEGATRON).folder


@pytest.fixture
def megatron(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "megatron"))


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def one_line(err: str) -> str:
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# What is pickled


@pytest.mark.parametrize(
    ("how", "where"),
    [*((how, "whole") for how in WAYS), ("open", "planner_data"), ("open", "entry"), ("open", "file name")],
)
def test_metadata_that_would_run_code_is_refused_by_name(rlpt, megatron, tmp_path, how, where):
    mark = tmp_path / "mark"
    metadata = FileSystemReader(megatron).read_metadata()
    evil = Calls(mark, how)
    if where == "whole":
        metadata = evil
    elif where == "planner_data":
        metadata.planner_data = {"x": evil}
    elif where == "entry":
        metadata.state_dict_metadata["decoder.x"] = evil
    else:
        first = next(iter(metadata.storage_data))
        metadata.storage_data[first] = _StorageInfo(evil, 0, 1)
    (megatron / ".metadata").write_bytes(pickle.dumps(metadata))
    code, _, err = rlpt("convert", megatron, tmp_path / "out", "--to", "hf", "--verify")
    assert code == 8
    assert f".metadata requests {WAYS[how]}, which is not data and could run code" in one_line(err)
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_metadata_that_leads_out_of_its_folder(rlpt, megatron, tmp_path):
    metadata = FileSystemReader(megatron).read_metadata()
    for index, stored in metadata.storage_data.items():
        metadata.storage_data[index] = _StorageInfo(f"../{stored.relative_path}", stored.offset, stored.length)
    (megatron / ".metadata").write_bytes(pickle.dumps(metadata))
    code, _, err = rlpt("convert", megatron, tmp_path / "out", "--to", "hf")
    assert code == 8
    assert "requests the file ../__0_0.distcp" in one_line(err)


def poisoned(folder: Path, what: object, key: str = "_extra_state") -> None:
    """Make every entry of ``key`` load ``what``, as written by ``torch.save``."""
    file = folder / "__9_9.distcp"
    torch.save(what, file)
    metadata = FileSystemReader(folder).read_metadata()
    for index in list(metadata.storage_data):
        if key in index.fqn:
            metadata.storage_data[index] = _StorageInfo(file.name, 0, file.stat().st_size)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_extra_states_of_a_checkpoint_are_not_read_by_a_conversion(rlpt, megatron, tmp_path, tiny_model):
    poisoned(megatron, [Calls(tmp_path / "mark")])
    torch.save({"args": Calls(tmp_path / "mark")}, megatron / "common.pt")
    code, out, err = rlpt("convert", megatron, tmp_path / "out", "--to", "hf", "--verify")
    assert code == 0, err
    assert "verify: logits differ by at most" in out
    assert not (tmp_path / "mark").exists()


def test_a_tensor_that_is_none(rlpt, megatron, tmp_path):
    poisoned(megatron, Calls(tmp_path / "mark"), "mlp.linear_fc2.weight")
    code, _, err = rlpt("convert", megatron, tmp_path / "out", "--to", "hf")
    assert code == 8
    assert "__9_9.distcp" in one_line(err)
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "out").exists()


def test_a_folder_with_pickled_weights_alone(rlpt, model, tmp_path):
    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Calls(tmp_path / "mark")}, model / "pytorch_model.bin")
    code, _, err = rlpt("convert", model, tmp_path / "out", "--to", "megatron")
    assert code == 4
    assert "has no *.safetensors file; convert the model to safetensors" in one_line(err)
    assert not (tmp_path / "mark").exists()


def next_token_run(tmp_path: Path, model: Path, corpus: Path) -> Path:
    """Write the configuration of a run without engine and judge."""
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(model)},
        "data": {"sources": [{"path": str(corpus)}], "suffix_length": 8, "min_prefix": 8, "max_prefix": 16},
        "objective": {"name": "ntp"},
        "candidates": {"rollouts": 0},
        "train": {"steps": 1, "global_batch": 4, "micro_batch": 2},
        "checkpoint": {"every": 1},
        "observe": {"tensorboard": False},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    return tmp_path / "run.yaml"


@pytest.fixture(scope="module")
def trained(tiny_model, corpus, tmp_path_factory) -> Path:
    """Return a folder with ``run.yaml`` and a run of one step."""
    folder = tmp_path_factory.mktemp("trained")
    code, err = in_a_process("train", "-c", next_token_run(folder, tiny_model, corpus))
    assert code == 0, err
    return folder


def in_a_process(*arguments: object) -> tuple[int, str]:
    """Run the command in a new process; return exit code and standard error."""
    process = forked(MEGATRON, [sys.executable, "-m", "megatron_rlpt", *map(str, arguments)])
    _, err = process.communicate(timeout=300)
    return process.returncode, err


@pytest.mark.parametrize("part", [".metadata", "common.pt", "object", "extra state"])
def test_resuming_from_somebody_elses_checkpoint_runs_nothing(trained, tmp_path, part):
    from megatron_rlpt.errors import CheckpointError
    from megatron_rlpt.policy.sharded_checkpoint import read_sharded

    policy = shutil.copytree(trained / "run/checkpoints/step-00000001/policy", tmp_path / "policy")
    mark = tmp_path / "mark"
    if part == ".metadata":
        (policy / ".metadata").write_bytes(pickle.dumps(Calls(mark)))
    elif part == "common.pt":
        torch.save({"version": Calls(mark)}, policy / "common.pt")
    elif part == "object":
        poisoned(policy, [Calls(mark)])
    else:  # Transformer Engine unpickles it once more
        evil = torch.frombuffer(bytearray(pickle.dumps({"recipe": Calls(mark)})), dtype=torch.uint8)
        poisoned(policy, [evil])
    state = wanted()
    with pytest.raises(CheckpointError, match=r"requests io\.open, which is not data and could run code"):
        read_sharded(state, policy)
    assert not mark.exists()


def wanted() -> dict:
    """Return a state dict with only the extra states of a checkpoint."""
    from megatron_rlpt.policy.device_runtime import DeviceRuntime

    DeviceRuntime().init_distributed()
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    key = "decoder.layers.mlp.linear_fc1._extra_state"
    return {"model": {f"{layer}.{key}": ShardedObject(key, None, (2,), (layer,)) for layer in range(2)}}


def test_a_run_whose_checkpoint_was_tampered_with_ends_with_one_line(trained, tmp_path, rlpt):
    shutil.copytree(trained / "run", tmp_path / "run")
    config = (trained / "run.yaml").read_text().replace(str(trained / "run"), str(tmp_path / "run"))
    (tmp_path / "run.yaml").write_text(config)
    step = tmp_path / "run/checkpoints/step-00000001"
    poisoned(step / "policy", [Calls(tmp_path / "mark")])
    sign(step, "policy/.metadata", "policy/__9_9.distcp")
    saved = json.loads((step / "state.json").read_text())
    saved["config"]["run.dir"] = str(tmp_path / "run")
    (step / "state.json").write_text(json.dumps(saved))
    sign(step, "state.json")
    shutil.rmtree(tmp_path / "run/export")
    code, err = in_a_process("train", "-c", tmp_path / "run.yaml")
    assert code == 8, err
    assert "requests io.open, which is not data and could run code" in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "mark").exists()


def sign(step: Path, *changed: str) -> None:
    """Recompute the checksums, as any author of a checkpoint can."""
    manifest = json.loads((step / "manifest.json").read_text())
    for name in changed:
        content = (step / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}
    (step / "manifest.json").write_text(json.dumps(manifest))
    (step / "COMPLETE").write_text(xxhash.xxh3_128((step / "manifest.json").read_bytes()).hexdigest())


# Code in the folder of a model.


def with_code(folder: Path, file: str, entries: dict[str, object], mark: Path) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Model: pass\nclass Tokenizer: pass\n")


@pytest.mark.parametrize("command", ["train", "convert"])
def test_a_model_that_asks_to_run_its_own_code_is_refused_at_the_start(rlpt, model, corpus, tmp_path, command):
    with_code(model, "config.json", {"auto_map": {"AutoModelForCausalLM": "own.Model"}}, tmp_path / "mark")
    arguments = {
        "train": ("-c", next_token_run(tmp_path, model, corpus)),
        "convert": (model, tmp_path / "out", "--to", "megatron"),
    }
    code, _, err = rlpt(command, *arguments[command])
    assert code == 4
    assert "auto_map asks to run code of its own (own.Model), which is never done" in err.strip().splitlines()[-1]
    assert not (tmp_path / "mark").exists()


def test_a_tokenizer_that_asks_to_run_its_own_code_is_refused_without_a_question(model, tmp_path, monkeypatch):
    from megatron_rlpt.errors import ModelError
    from megatron_rlpt.tokens.loading import load_tokenizer

    entries = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
    with_code(model, "tokenizer_config.json", entries, tmp_path / "mark")
    config = json.loads((model / "config.json").read_text()) | {"model_type": "unheard-of"}
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked in the middle of a run"))
    with pytest.raises(ModelError, match=r"asks to run code of its own|cannot be loaded"):
        load_tokenizer(model)
    assert not (tmp_path / "mark").exists()


# Files of the user.


def test_folders_with_names_like_temporary_ones_are_the_users(rlpt, model, tmp_path):
    for name in ("out.old", "out.partial", "out.old-1", "out.partial-1"):
        shutil.copytree(model, tmp_path / name)
    before = everything(tmp_path)
    code, _, err = rlpt("convert", tmp_path / "out.old", tmp_path / "out", "--to", "megatron")
    assert code == 0, err
    code, _, err = rlpt("convert", tmp_path / "out.partial", tmp_path / "out2", "--to", "hf")
    assert code == 0, err
    after = everything(tmp_path)
    assert before.items() <= after.items()
    assert {name.split("/")[0] for name in after} - {name.split("/")[0] for name in before} == {"out", "out2"}


@pytest.mark.parametrize(
    "out",
    [
        "model",
        "model/",
        "model/.",
        "../{here}/model",
        "link-to-model",
        "model/inside",
        "model/a/b",
        ".",
        "file",
        "holder",
    ],
)
def test_an_output_that_is_the_input_or_holds_something_is_refused(rlpt, model, tmp_path, out):
    (tmp_path / "link-to-model").symlink_to(model)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "holder").mkdir()
    shutil.copytree(model, tmp_path / "holder/model")
    before = everything(tmp_path)
    source = tmp_path / ("holder/model" if out == "holder" else "model")
    code, _, err = rlpt("convert", source, f"{tmp_path}/{out.format(here=tmp_path.name)}", "--to", "megatron")
    assert code == 2, err
    assert "choose" in one_line(err)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("out", ["new", "new/", "empty", "link-to-empty", "link-to-nothing", "deep/er"])
def test_outputs_that_are_nobodys_yet(rlpt, model, tmp_path, out):
    (tmp_path / "empty").mkdir(mode=0o750)
    (tmp_path / "link-to-empty").symlink_to(tmp_path / "empty")
    (tmp_path / "link-to-nothing").symlink_to(tmp_path / "nothing")
    before = everything(tmp_path)
    code, _, err = rlpt("convert", model, f"{tmp_path}/{out}", "--to", "hf")
    assert code == 0, err
    assert (tmp_path / out / "model.safetensors").is_file()
    assert before.items() <= everything(tmp_path).items()
    assert not [path for path in tmp_path.iterdir() if ".partial" in path.name]
    assert (tmp_path / "link-to-empty").is_symlink()
    assert (tmp_path / "link-to-nothing").is_symlink()
    if "empty" in out:
        assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == 0o750


def test_what_somebody_put_at_the_output_meanwhile_stays(model, tmp_path):
    from megatron_rlpt.errors import CheckpointError
    from megatron_rlpt.files import new_folder

    def write() -> None:
        with new_folder(tmp_path / "out") as partial:
            (partial / "ours").write_text("")
            (tmp_path / "out").mkdir()
            (tmp_path / "out/theirs").write_text("mine")

    with pytest.raises(CheckpointError, match="could not be written"):
        write()
    assert everything(tmp_path) == {"model/" + name: text for name, text in everything(model).items()} | {
        "out/theirs": b"mine"
    }


# Modes


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_converted_files_follow_the_umask(rlpt, model, tmp_path, umask, to):
    before = os.umask(umask)
    try:
        code, _, err = rlpt("convert", model, tmp_path / "out", "--to", to)
    finally:
        os.umask(before)
    assert code == 0, err
    assert modes(tmp_path / "out") == {0o777 & ~umask, 0o666 & ~umask}


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}


def test_files_of_a_run_follow_the_umask(trained):
    before = os.umask(0o022)
    os.umask(before)
    assert modes(trained / "run") == {0o777 & ~before, 0o666 & ~before}


# Files that are copied along.


def test_side_files_come_along_and_what_describes_other_weights_does_not(rlpt, model, tmp_path):
    kept = {
        "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "special_tokens_map.json", "merges.txt",
        "added_tokens.json", "tokenizer.model", "tekken.json", "vocab.json", "LICENSE", "LICENSE.txt", "NOTICE",
        "README.md", "USE_POLICY.md", "Llama-LICENSE.md", "qwen.tiktoken",
    }  # fmt: skip
    left = {
        "model.safetensors.index.json", "pytorch_model.bin.index.json", "consolidated.safetensors.index.json",
        "adapter_config.json", "params.json", "pytorch_model.bin", "modeling_own.py", "optimizer.pt", ".gitattributes",
    }  # fmt: skip
    for name in kept | left:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(load_file(model / "model.safetensors"), "model.safetensors")})
    )
    for out, to in (("hf", "hf"), ("megatron", "megatron"), ("back", "hf")):
        source = {"back": tmp_path / "megatron"}.get(out, model)
        code, _, err = rlpt("convert", source, tmp_path / out, "--to", to)
        assert code == 0, err
        names = set(everything(tmp_path / out / ("hf" if to == "megatron" else "")))
        assert kept <= names
        assert not left & names


@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_bf16_weights_with_fp32_norms_keep_each_its_precision(rlpt, model, tmp_path, monkeypatch, to):
    from megatron_rlpt.convert import convert as module

    tensors = {
        name: tensor if "norm" in name else tensor.bfloat16()
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {"dtype": "bfloat16"}
    (model / "config.json").write_text(json.dumps(config))
    # The requested size is the needed size, not that of fp32.
    padding = (128 - 64) * 64 * 2 if to == "megatron" else 0
    needed = sum(tensor.nbytes for tensor in tensors.values()) + padding
    side = sum(path.stat().st_size for path in model.iterdir() if path.name != "model.safetensors")
    for free, expected in ((needed - 1, 8), (needed + side, 0)):
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(0, 0, free))
        code, _, err = rlpt("convert", model, tmp_path / "out", "--to", to)
        assert code == expected, err
        assert (tmp_path / "out").exists() == (code == 0)
    if to == "megatron":
        monkeypatch.undo()
        assert rlpt("convert", tmp_path / "out", tmp_path / "back", "--to", "hf")[0] == 0
    back = tmp_path / ("back" if to == "megatron" else "out")
    written = load_file(back / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in written.items()} == {n: t.dtype for n, t in tensors.items()}
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"


# Full disks and killed processes.


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a separate file system of the given KiB."""
    mounted: list[Path] = []

    def mount(kib: int) -> Path:
        disk = tmp_path / f"disk-{kib}"
        disk.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(disk)], capture_output=True)
        if done.returncode:
            pytest.skip("needs to mount a file system")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_a_disk_that_is_full_at_any_moment_is_one_line_and_leaves_nothing(
    rlpt, model, tmp_path, small_disk, monkeypatch, to
):
    from megatron_rlpt.convert import convert as module

    (model / "README.md").write_text("x" * 50_000)
    free = shutil._ntuple_diskusage(0, 0, 1 << 40)
    assert rlpt("convert", model, tmp_path / "whole", "--to", to)[0] == 0
    whole = sum(-(-path.stat().st_size // 4096) * 4 for path in (tmp_path / "whole").rglob("*") if path.is_file())
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: free)
    for kib in range(8, whole, max(8, whole // 6)):
        disk = small_disk(kib)
        code, _, err = rlpt("convert", model, disk / "out", "--to", to)
        assert code == 8, f"{kib} KiB: {err}"
        assert "could not be written" in one_line(err)
        assert list(disk.iterdir()) == []


def test_the_disks_own_word_is_known_in_whatever_wraps_it():
    from megatron_rlpt.files import is_disk_error

    def wrapped() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("writer failed") from error

    assert is_disk_error(RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"))
    assert is_disk_error(RuntimeError("I/O error: No space left on device (os error 28)"))
    with pytest.raises(RuntimeError) as caught:
        wrapped()
    assert is_disk_error(caught.value)
    assert not is_disk_error(ValueError("shapes differ"))


def test_a_source_that_cannot_be_read_is_not_blamed_on_the_output(tmp_path):
    from megatron_rlpt.errors import ModelError
    from megatron_rlpt.files import new_folder

    def read() -> None:
        try:
            raise OSError(errno.EIO, "Input/output error")
        except OSError:
            raise ModelError("model.safetensors cannot be read") from None

    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"), new_folder(tmp_path / "out"):
        read()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_conversion_leaves_no_output_and_the_next_one_says_what_is_left(rlpt, model, tmp_path):
    script = (
        "import sys; from pathlib import Path; from megatron_rlpt.files import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('half'); print('there', flush=True); sys.stdin.read()\n"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with killed:
        assert killed.stdout.readline() == "there\n"
        killed.send_signal(signal.SIGKILL)
    (left,) = tmp_path.glob("out*")
    assert left.name.startswith("out.partial-")
    code, out, err = rlpt("convert", model, tmp_path / "out", "--to", "hf")
    assert code == 0, err
    assert f"{left} is left over from a conversion that did not finish" in out
    assert (left / "half").read_text() == "half", "it may be another process that is at work"
