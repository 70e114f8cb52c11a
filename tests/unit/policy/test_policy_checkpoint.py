from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import torch
from llamas import make_examples, make_policy, same, save_llama, weights_of

from megatron_rlpt.checkpoint import CheckpointStore
from megatron_rlpt.config import Dtype
from megatron_rlpt.errors import CheckpointError
from megatron_rlpt.policy.policy import Policy


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "untied", tie_word_embeddings=False)


def save(policy: Policy, folder: Path) -> None:
    folder.mkdir()
    writing = policy.begin_save(folder, snapshot=False)
    _, written = writing.write()
    writing.conclude([written])


CASES = {
    "frozen-reference": {"objective": {}},
    "moving-reference": {"objective": {"reference_refresh": 2}},
    "bf16": {"model": {"dtype": Dtype.bf16}},
}


@pytest.mark.parametrize(
    ("case", "before"), [("frozen-reference", 0), ("frozen-reference", 3), ("moving-reference", 3), ("bf16", 3)]
)
def test_a_loaded_policy_goes_on_bit_for_bit(llama, tmp_path, case, before):
    parts = CASES[case] | {"optimizer": {"warmup_steps": 4, "weight_decay": 0.1}}
    uninterrupted, resumed = make_policy(llama, **parts), make_policy(llama, **parts)
    for seed in range(before):
        uninterrupted.update(make_examples(seed=seed))
    save(uninterrupted, tmp_path / "policy")
    # Updates of the other policy before loading must have no effect.
    resumed.update(make_examples(seed=99))
    resumed.load(tmp_path / "policy")
    assert resumed.version == uninterrupted.version == before
    assert same(weights_of(resumed), weights_of(uninterrupted))
    for seed in range(before, before + 3):
        examples = make_examples(seed=seed)
        assert resumed.update(examples) == uninterrupted.update(examples)
        assert same(weights_of(resumed), weights_of(uninterrupted))


@pytest.mark.parametrize("snapshot", [False, True])
@pytest.mark.parametrize(("dtype", "each"), [(Dtype.fp32, 16), (Dtype.bf16, 14)])
def test_a_checkpoint_has_the_size_of_its_weights_and_moments(llama, tmp_path, dtype, each, snapshot):
    """Bytes per parameter, and what a file has for every tensor. A view of a buffer is not the whole buffer."""
    policy = make_policy(llama, model={"dtype": dtype})
    folder = tmp_path / "policy"
    folder.mkdir()
    writing = policy.begin_save(folder, snapshot=snapshot)
    files, _ = writing.write()
    shapes = [torch.Size(shape).numel() for shape in policy.weight_shapes.values()]
    weights = each * sum(shapes)
    assert weights < sum(path.stat().st_size for path in files) < weights + 4 * 3072 * len(shapes)


def test_saving_does_not_change_what_comes_after(llama, tmp_path):
    saved, plain = make_policy(llama), make_policy(llama)
    for seed in range(2):
        save(saved, tmp_path / str(seed))
        assert saved.update(make_examples(seed=seed)) == plain.update(make_examples(seed=seed))
    assert same(weights_of(saved), weights_of(plain))


@pytest.mark.parametrize("part", ["common.pt", ".metadata", "*.distcp"])
def test_a_checkpoint_that_lacks_a_part_is_an_error(llama, tmp_path, part):
    policy = make_policy(llama, "rf_nll")
    policy.update(make_examples(width=1))
    save(policy, tmp_path / "policy")
    for path in (tmp_path / "policy").glob(part):
        path.unlink()
    # Exception, not torch's BaseException, so that callers can turn it into one line.
    with pytest.raises(Exception, match=r"common\.pt|metadata|distcp"):
        make_policy(llama, "rf_nll").load(tmp_path / "policy")


def test_a_policy_that_the_disk_has_no_room_for_is_one_line_and_leaves_the_last_checkpoint(llama, tmp_path):
    """The kernel limits files to 40 kB, which simulates a full disk; Megatron writes in other processes."""
    policy, store = make_policy(llama), CheckpointStore(tmp_path, keep=1)
    store.save(0, {}, policy, llama)
    expected = weights_of(policy)
    policy.update(make_examples())
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written .*the run resumes from") as caught:
            store.save(1, {}, policy, llama)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert "File too large" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000"]
    policy.load(store.latest().policy)
    assert same(weights_of(policy), expected)
    store.save(1, {}, policy, llama)
    assert store.latest().step == 1
