"""``auto`` resolves to the value of the run folder, else to that of the machine."""

import pytest

from megatron_rlpt.config import Dtype, load_config
from megatron_rlpt.observe import precision
from megatron_rlpt.observe.precision import resolve_dtypes
from megatron_rlpt.observe.run_json import RunRecord


@pytest.fixture
def resolved(tmp_path, monkeypatch):
    """Resolve a configuration on a machine where bf16 is slow, or not."""

    def resolve(*overrides, slow, **options):
        monkeypatch.setattr(precision, "bf16_is_slow", lambda: slow)
        fields = [f"run.dir={tmp_path}", "model.path=m", "train.steps=100", "data.sources=[{path: a}]", *overrides]
        config = resolve_dtypes(load_config(None, fields), **options)
        return config.model.dtype.name, config.teacher.dtype.name

    return resolve


@pytest.mark.parametrize(("slow", "chosen"), [(True, "fp32"), (False, "bf16")])
def test_the_machine_decides_for_a_new_run(resolved, slow, chosen):
    assert resolved(slow=slow) == (chosen, chosen)
    assert resolved(slow=slow, teacher=False) == (chosen, "auto")


def test_what_is_set_wins(resolved, tmp_path):
    RunRecord({"model.dtype": "bf16", "teacher.dtype": "bf16"}).write(tmp_path)
    assert resolved("model.dtype=fp32", "teacher.dtype=fp32", slow=False) == ("fp32", "fp32")
    assert resolved("model.dtype=bf16", slow=True, fresh=True) == ("bf16", "fp32")


def test_fp8_needs_bf16(resolved):
    assert resolved("model.fp8=current", slow=True) == ("bf16", "fp32")


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("recorded", list(Dtype)[1:])
def test_a_run_keeps_what_it_started_with(resolved, tmp_path, slow, recorded):
    RunRecord({"model.dtype": recorded.name}).write(tmp_path)
    other = "fp32" if slow else "bf16"
    assert resolved(slow=slow) == (recorded.name, other), "an earlier release did not record the teacher's"
    assert resolved(slow=slow, fresh=True) == (other, other)


def test_a_run_from_before_there_was_a_record_keeps_it_as_well(resolved, tmp_path):
    (tmp_path / "config.yaml").write_text("model: {path: m, dtype: bf16}")
    assert resolved(slow=True) == ("bf16", "fp32")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": 1}', '{"config": {"model.dtype": "bf16"'])
def test_a_record_that_says_nothing_is_none(resolved, tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    assert resolved(slow=True) == ("fp32", "fp32")


def test_a_recorded_precision_that_no_release_had_is_none(resolved, tmp_path):
    RunRecord({"model.dtype": "f16"}).write(tmp_path)
    assert resolved(slow=True) == ("fp32", "fp32")
