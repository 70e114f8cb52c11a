from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from savables import OneFile, flip, make_model, small_files

from megatron_rlpt.checkpoint import CheckpointStore
from megatron_rlpt.errors import CheckpointError

pytestmark = pytest.mark.slow


def fail_with(error: Exception) -> OneFile:
    def fail(_: Path) -> None:
        raise error

    return OneFile("half", fail)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "hf")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def latest_step(folder: Path) -> int:
    checkpoint = CheckpointStore(folder, 2).latest()
    assert checkpoint is not None
    return checkpoint.step


def test_what_was_saved_is_found_again(tmp_path, model):
    store = CheckpointStore(tmp_path / "run/checkpoints", keep=2)
    assert store.latest() is None
    path = store.save(20, {"version": 18, "stream": {"cursor": [1, 2]}}, OneFile("w20"), model)
    checkpoint = CheckpointStore(tmp_path / "run/checkpoints", keep=2).latest()
    assert checkpoint.folder == path == tmp_path / "run/checkpoints/step-00000020"
    assert checkpoint.state == {"version": 18, "stream": {"cursor": [1, 2]}, "step": 20}
    assert checkpoint.step == 20
    assert (checkpoint.policy / "weights").read_text() == "w20"
    assert names(path) == ["COMPLETE", "hf", "manifest.json", "policy", "state.json"]


def test_a_checkpoint_carries_the_model_it_belongs_to_and_says_what_it_consists_of(tmp_path, model):
    CheckpointStore(tmp_path, keep=2).save(20, {}, OneFile("w20"), model)
    checkpoint = CheckpointStore(tmp_path, keep=2).latest()
    assert names(checkpoint.model) == ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"]
    manifest = json.loads((checkpoint.folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["layout"]) == (1, 20, "1 rank: TP1")
    assert manifest["versions"].keys() == {"megatron-rlpt", "megatron-core", "torch"}
    on_disk = {str(path.relative_to(checkpoint.folder)) for path in checkpoint.folder.rglob("*") if path.is_file()}
    assert manifest["files"].keys() == on_disk - {"manifest.json", "COMPLETE"}
    assert manifest["files"]["policy/weights"] == {"bytes": 3, "xxh3_128": xxhash.xxh3_128(b"w20").hexdigest()}


def test_the_newest_keep_stay(tmp_path, model):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (2, 4, 6, 8):
        store.save(step, {}, OneFile(), model)
    assert names(tmp_path) == ["step-00000006", "step-00000008"]
    assert latest_step(tmp_path) == 8


def test_newest_is_by_number_and_not_by_name(tmp_path, model):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(99_999_999, {}, OneFile(), model)
    store.save(100_000_000, {}, OneFile(), model)
    assert latest_step(tmp_path) == 100_000_000


def test_the_same_step_saved_again_is_replaced(tmp_path, model):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(3, {"version": 1}, OneFile("old"), model)
    store.save(3, {"version": 2}, OneFile("new"), model)
    checkpoint = store.latest()
    assert (checkpoint.state["version"], (checkpoint.policy / "weights").read_text()) == (2, "new")
    assert names(tmp_path) == ["step-00000003"]


def test_what_a_killed_save_left_behind_is_never_loaded_and_is_swept_by_the_next(tmp_path, model):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, {}, OneFile(), model)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002.partial")
    assert latest_step(tmp_path) == 1
    store.save(2, {}, OneFile(), model)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_other_folders_are_no_checkpoints_and_are_left_alone(tmp_path, model):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(5, {}, OneFile(), model)
    others = {"step-00000005.bak", "step-00000099-copy", "step-last", "step-00000005-mine.partial", "step-9.partial"}
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000077.partial").symlink_to(tmp_path / "step-last")
    (tmp_path / "step-00000100").write_text("a file")
    assert latest_step(tmp_path) == 5
    store.save(6, {}, OneFile(), model)
    assert others | {"step-00000100", "step-00000077.partial"} < set(names(tmp_path))


def test_chat_templates_in_a_folder_are_part_of_a_checkpoint(tmp_path):
    model = make_model(tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    CheckpointStore(tmp_path / "run", keep=1).save(1, {}, OneFile(), model)
    checkpoint = CheckpointStore(tmp_path / "run", keep=1).latest()
    assert (checkpoint.model / "additional_chat_templates/tools.jinja").read_text() == "{{ messages }}"
    flip(checkpoint.model / "additional_chat_templates/tools.jinja")
    assert "additional_chat_templates/tools.jinja has changed" in refused(tmp_path / "run")


def refused(folder: Path, allow_previous: bool = False) -> str:
    """Return the error line that refuses the newest checkpoint."""
    with pytest.raises(CheckpointError) as caught:
        CheckpointStore(folder, keep=2).latest(allow_previous)
    assert "\n" not in str(caught.value)
    return str(caught.value)


DAMAGES = {
    "flipped-shard": (lambda folder: flip(folder / "policy/weights"), "policy/weights has changed since it was"),
    "truncated-shard": (lambda folder: os.truncate(folder / "policy/weights", 3), "weights has 3 bytes instead of 7"),
    "missing-shard": (lambda folder: (folder / "policy/weights").unlink(), "policy/weights is missing"),
    "flipped-state": (lambda folder: flip(folder / "state.json"), "state.json has changed since it was written"),
    "missing-state": (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    "missing-tokenizer": (lambda folder: (folder / "hf/tokenizer.json").unlink(), "hf/tokenizer.json is missing"),
    "flipped-manifest": (lambda folder: flip(folder / "manifest.json"), "manifest.json has changed since it was"),
    "missing-manifest": (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest.json"),
    "no-marker": (lambda folder: (folder / "COMPLETE").unlink(), "it has no COMPLETE marker, so it is incomplete"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_passed_over_only_when_that_is_asked_for(tmp_path, model, caplog, damage):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, {"version": 1}, OneFile("before"), model)
    store.save(2, {"version": 2}, OneFile("weights"), model)
    harm, phrase = DAMAGES[damage]
    harm(tmp_path / "step-00000002")
    before = names(tmp_path)
    line = refused(tmp_path)
    assert phrase in line
    assert str(tmp_path / "step-00000002") in line
    assert line.endswith(f"set checkpoint.allow_previous=true to resume from {tmp_path}/step-00000001")
    assert names(tmp_path) == before, "a refusal changes nothing"

    caplog.set_level("WARNING")
    with propagating():
        assert store.latest(allow_previous=True).state == {"version": 1, "step": 1}
    # Logs of other libraries are captured too, and ours twice if an earlier test set up logging.
    own = {record.getMessage(): record for record in caplog.records if record.name.startswith("megatron_rlpt.")}
    (record,) = own.values()
    assert record.getMessage() == "skipping a damaged checkpoint"
    assert record.fields["path"] == tmp_path / "step-00000002"
    assert record.fields["next"] == tmp_path / "step-00000001"
    assert phrase in record.fields["reason"]
    # It is kept for inspection, and counts neither as the newest nor as one of those to keep.
    assert names(tmp_path) == ["step-00000001", "step-00000002.damaged-1"]
    assert store.latest().step == 1
    store.save(2, {}, OneFile(), model)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000002.damaged-1"]


def test_the_last_checkpoint_there_is_is_never_passed_over(tmp_path, model):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, {}, OneFile(), model)
    store.save(2, {}, OneFile(), model)
    for step in (1, 2):
        flip(tmp_path / f"step-0000000{step}/policy/weights")
    line = refused(tmp_path, allow_previous=True)
    assert "step-00000001/policy/weights has changed" in line
    assert line.endswith("there is no earlier one: restore the file, or start over with --fresh")
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_many_damaged_files_are_counted(tmp_path, model):
    CheckpointStore(tmp_path, keep=2).save(1, {}, OneFile(), model)
    for path in (tmp_path / "step-00000001/hf").iterdir():
        path.unlink()
    assert re.search(r"(\S+/hf/\S+ is missing; ){3}and 1 more; ", refused(tmp_path))


def test_a_checkpoint_from_before_there_were_manifests_is_refused(tmp_path, model):
    old = tmp_path / "step-00000002"
    (old / "policy").mkdir(parents=True)
    (old / "state.json").write_text('{"step": 2}')
    (old / "COMPLETE").write_text("")
    line = refused(tmp_path)
    assert "it has no manifest.json; the file is missing, or an older version wrote the checkpoint" in line
    assert "start over with --fresh" in line


def test_a_checkpoint_of_another_format_is_refused(tmp_path, model):
    folder = CheckpointStore(tmp_path, keep=2).save(2, {}, OneFile(), model)
    content = (folder / "manifest.json").read_text().replace('"format": 1', '"format": 9')
    (folder / "manifest.json").write_text(content)
    (folder / "COMPLETE").write_text(xxhash.xxh3_128(content.encode()).hexdigest())
    assert "it has format 9, and this version reads format 1" in refused(tmp_path)


@contextlib.contextmanager
def propagating() -> Iterator[None]:
    """Let pytest capture our log, even if an earlier test set it up."""
    root = logging.getLogger("megatron_rlpt")
    before, root.propagate = root.propagate, True
    yield
    root.propagate = before


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("rank 0 failed\nTraceback of forty lines"), "RuntimeError: rank 0 failed"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_policy_that_cannot_be_written_is_one_line_and_leaves_the_last_checkpoint(tmp_path, error, reason, model):
    store = CheckpointStore(tmp_path, keep=1)
    with pytest.raises(CheckpointError, match="there is no checkpoint yet"):
        store.save(1, {}, fail_with(error), model)
    store.save(1, {}, OneFile("good"), model)
    with pytest.raises(CheckpointError) as caught:
        store.save(2, {}, fail_with(error), model)
    message = str(caught.value)
    assert reason in message
    assert f"the run resumes from {tmp_path}/step-00000001" in message
    assert "\n" not in message
    assert names(tmp_path) == ["step-00000001"]
    assert (store.latest().policy / "weights").read_text() == "good"


def test_the_reason_is_the_innermost_cause(tmp_path, model):
    def wrapped(folder: Path) -> None:
        try:
            (folder / "nowhere/weights").write_text("")
        except OSError as error:
            raise RuntimeError("the strategy failed") from error

    with pytest.raises(CheckpointError, match=r"FileNotFoundError.*nowhere"):
        CheckpointStore(tmp_path, keep=1).save(1, {}, OneFile(before=wrapped), model)


def test_a_state_that_is_no_json_leaves_the_last_checkpoint(tmp_path, model):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {}, OneFile(), model)
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        store.save(2, {"stream": object()}, OneFile(), model)
    assert latest_step(tmp_path) == 1
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("large", ["policy", "state"])
def test_a_write_the_kernel_refuses_leaves_the_last_checkpoint(tmp_path, large, model):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {"version": 1}, OneFile("good"), model)
    content = "x" * (1 << 17)
    with pytest.raises(CheckpointError, match="File too large") as caught, small_files():
        store.save(
            2, {"stream": content if large == "state" else ""}, OneFile(content if large == "policy" else ""), model
        )
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step-00000001"]
    assert store.latest().state["version"] == 1


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("mounting a file system needs root and the permission to")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_goes_on_once_there_is_space(small_disk, model):
    store = CheckpointStore(small_disk, keep=1)
    store.save(1, {}, OneFile("x" * 300_000), model)
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        store.save(2, {}, OneFile("x" * 900_000), model)
    assert f"the run resumes from {small_disk}/step-00000001" in str(caught.value)
    assert names(small_disk) == ["step-00000001"]
    assert len((store.latest().policy / "weights").read_text()) == 300_000
    store.save(2, {}, OneFile("x" * 400_000), model)
    assert latest_step(small_disk) == 2


def test_a_checkpoint_that_would_not_fit_again_is_refused_before_anything_is_written(tmp_path, model):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, {}, OneFile(), model)
    os.truncate(tmp_path / "step-00000001/policy/weights", 1 << 43)  # a sparse file: large, and nothing on the disk
    with pytest.raises(CheckpointError, match="disk full: a checkpoint needs about 9,227,469 MiB") as caught:
        store.save(2, {}, fail_with(RuntimeError("it was written")), model)
    assert f"the run resumes from {tmp_path}/step-00000001" in str(caught.value)
    assert names(tmp_path) == ["step-00000001"]


KILLED = """
import os, sys
from pathlib import Path
from megatron_rlpt.checkpoint import CheckpointStore

sys.path.insert(0, sys.argv[1])
from savables import OneFile


def save_for_ever(folder, model, background, step):
    store = CheckpointStore(folder, keep=2, background=background)
    print(os.getpid(), flush=True)
    while True:
        policy = OneFile(f"{step} " * 20_000)
        store.save(step, {}, policy, model)
        store.save(step, {}, policy, model)  # the same step again
        step += 1

# One process a life, and the imports once for all of them.
for line in sys.stdin:
    folder, model, mode, step = line.split()
    if os.fork() == 0:
        save_for_ever(Path(folder), Path(model), mode == "background", int(step))
    os.wait()
    print("over", flush=True)
"""


@pytest.fixture(scope="module")
def lives() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(Path(__file__).parents[2])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.communicate("")


@pytest.mark.parametrize("mode", ["waiting", "background"])
def test_kill_at_any_moment_leaves_no_broken_checkpoint_that_can_be_loaded(tmp_path, model, lives, mode):
    draw = random.Random(4)
    folder = tmp_path / "checkpoints"
    store, newest, killed = CheckpointStore(folder, keep=2), 0, 0
    while killed < 6 or newest < 3:
        killed += 1
        lives.stdin.write(f"{folder} {model} {mode} {newest + 1}\n")
        lives.stdin.flush()
        pid = int(lives.stdout.readline())
        time.sleep(draw.uniform(0.05, 0.5))
        os.kill(pid, signal.SIGKILL)
        assert lives.stdout.readline() == "over\n"
        checkpoint = store.latest()
        found = checkpoint.step if checkpoint else 0
        # Between the two renames that replace a step by itself, the one before is the newest.
        assert found >= newest - 1
        newest = max(found, newest)
        for path in (path for path in folder.glob("step-*") if not path.name.endswith(".partial")):
            step = json.loads((path / "state.json").read_text())["step"]
            assert (path / "COMPLETE").is_file()
            assert path.name == f"step-{step:08d}"
            assert (path / "policy/weights").read_text() == f"{step} " * 20_000
    CheckpointStore(folder, keep=1).save(newest + 1, {}, OneFile(), model)
    assert names(folder) == [f"step-{newest + 1:08d}"], "nothing of the killed saves is left"
