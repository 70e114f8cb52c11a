"""A user error ends in one line that names it, the right exit code, and an intact last checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess

import pytest
from tiny_runs import NEXT_TOKEN, json_lines, only_error, save_model, write_config

from megatron_rlpt.errors import CheckpointError, ConfigError, DataError, ModelError, TrainingError
from megatron_rlpt.trainer.observer import RunObserver


@pytest.fixture
def refused(rlpt, tiny_model, corpus, tmp_path):
    """Train with ``sections`` changed; check exit code and leftovers, and return the error line."""

    def run(error, model=tiny_model, folder=tmp_path / "run", **sections):
        config = write_config(tmp_path / "run.yaml", model, corpus, folder, **sections)
        code, _, err = rlpt("train", "-c", config)
        assert code == error.exit_code, err
        return only_error(err)

    return run


def sources(path):
    return {"sources": [{"path": str(path)}]}


def test_a_missing_corpus(refused, tmp_path):
    assert "missing.jsonl" in refused(DataError, data=sources(tmp_path / "missing.jsonl"), **NEXT_TOKEN)


def test_an_empty_corpus(refused, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl" in refused(DataError, data=sources(tmp_path / "empty.jsonl"), **NEXT_TOKEN)


def test_a_corpus_without_a_document_that_is_long_enough(refused, tmp_path):
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "the cat sat"}) + "\n")
    line = refused(DataError, data=sources(tmp_path / "short.jsonl"), **NEXT_TOKEN)
    assert "data.min_prefix" in line
    assert "too short" in line


def test_a_missing_model(refused, tmp_path):
    assert f"model folder {tmp_path}/nothing does not exist" in refused(
        ModelError, model=tmp_path / "nothing", **NEXT_TOKEN
    )


def test_an_unsupported_model_family(refused, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "gpt2"}))
    line = refused(ModelError, model=folder, **NEXT_TOKEN)
    assert "'gpt2' is not supported" in line
    assert "llama" in line


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings(refused, tiny_model, tmp_path):
    folder = save_model(tmp_path / "model", tiny_model, seed=0, vocab_size=16)
    assert "24 tokens and the model 16 embeddings" in refused(ModelError, model=folder, **NEXT_TOKEN)


def test_a_suffix_longer_than_the_context(refused, tmp_path):
    words = " ".join(["cat"] * 400)
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": words}) + "\n")
    line = refused(ModelError, data=sources(tmp_path / "long.jsonl") | {"suffix_length": 200}, **NEXT_TOKEN)
    assert "data.suffix_length is 216 tokens" in line
    assert "128" in line


def test_heads_that_vllm_cannot_serve(refused, tiny_model):
    """Detected while the engine starts, although vLLM itself fails only when attention first runs."""
    pytest.importorskip("vllm")
    assert "vLLM cannot serve" in refused(ModelError, model=tiny_model)


def test_heads_that_vllm_cannot_serve_in_a_process_of_its_own(rlpt, tiny_model, corpus, tmp_path):
    """That process prints vLLM's traceback; it is not started again, as one that was killed would be."""
    pytest.importorskip("vllm")
    rollout = {"placement": "apart"}
    code, _, err = rlpt(
        "train", "-c", write_config(tmp_path / "run.yaml", tiny_model, corpus, tmp_path / "run", rollout=rollout)
    )
    assert code == ModelError.exit_code, err
    assert err.strip().splitlines()[-1].startswith(f"error: vLLM cannot serve {tiny_model}: its process failed"), err
    assert "starting it again" not in err


@pytest.mark.parametrize("objective", ["online_dpo", "sft_rollout"])
def test_no_rollouts_for_an_objective_that_learns_from_them(refused, objective):
    line = refused(ConfigError, objective={"name": objective}, candidates={"rollouts": 0})
    assert "candidates.rollouts is 0; allowed: at least 1" in line


def test_weights_that_are_not_finite(refused, tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    line = refused(ModelError, model=folder, **NEXT_TOKEN)
    assert "model.norm.weight" in line
    assert "not finite" in line


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint_to_go_on_from(refused, tmp_path):
    """A learning rate this large ruins the weights in the first update, and the second step detects it."""
    for _ in range(2):  # the second run resumes from the checkpoint, which shows that it loads
        line = refused(TrainingError, optimizer={"lr": 1e30}, **NEXT_TOKEN)
        assert "at version 1" in line
        assert "optimizer.lr" in line
        assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000001"]
        assert [row["step"] for row in json_lines(tmp_path / "run/metrics.jsonl")] == [0]


def test_a_run_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "occupied").write_text("a file where a folder should be")
    line = refused(ConfigError, folder=tmp_path / "occupied/run", **NEXT_TOKEN)
    assert "run.dir" in line
    assert "occupied" in line


@pytest.fixture
def after_step_two(monkeypatch):
    """Do something between the record of the second step and its checkpoint."""

    def arrange(action):
        record = RunObserver.step

        def step(self, number, *arguments):
            record(self, number, *arguments)
            if number == 1:
                action()

        monkeypatch.setattr(RunObserver, "step", step)

    yield arrange
    monkeypatch.undo()


def goes_on_from_the_first_checkpoint(rlpt, config, folder):
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000001"]
    code, _, err = rlpt("train", "-c", config)
    assert code == 0, err
    assert f"resumed checkpoint={folder}/checkpoints/step-00000001 steps=1" in err
    assert [row["step"] for row in json_lines(folder / "metrics.jsonl")] == [0, 1]
    assert (folder / "export/model.safetensors").is_file()


def test_a_checkpoint_that_breaks_off_leaves_the_last_one_to_go_on_from(
    rlpt, tiny_model, corpus, tmp_path, after_step_two, monkeypatch
):
    """A limit on the size of files simulates a disk that fills up in the middle of a write."""
    folder = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", tiny_model, corpus, folder, **NEXT_TOKEN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    after_step_two(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard)))
    try:
        code, _, err = rlpt("train", "-c", config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == CheckpointError.exit_code, err
    line = only_error(err)
    assert "step-00000002 could not be written" in line
    assert "the run resumes from" in line
    monkeypatch.undo()
    goes_on_from_the_first_checkpoint(rlpt, config, folder)


@pytest.fixture
def small_disk(tmp_path):
    """A separate file system to fill up."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_to_go_on_from(
    rlpt, tiny_model, corpus, tmp_path, small_disk, after_step_two, monkeypatch
):
    folder = small_disk / "run"
    config = write_config(tmp_path / "run.yaml", tiny_model, corpus, folder, **NEXT_TOKEN)

    def fill():
        with contextlib.suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    after_step_two(fill)
    code, _, err = rlpt("train", "-c", config)
    assert code == CheckpointError.exit_code, err
    line = only_error(err)
    assert "disk full" in line
    assert str(folder / "checkpoints") in line
    monkeypatch.undo()
    (small_disk / "ballast").unlink()
    goes_on_from_the_first_checkpoint(rlpt, config, folder)
