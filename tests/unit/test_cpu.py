"""Which processors are told apart."""

import platform

import pytest

from megatron_rlpt import cpu


@pytest.mark.parametrize(
    ("flags", "slow"),
    [
        ("fpu sse4_2 avx avx2 fma", True),
        ("fpu avx2 fma avx512f avx512_bf16", False),
        ("fpu avx2 avx_ne_convert", False),
    ],
)
def test_a_processor_with_avx2_alone_is_slow_in_bf16(flags, slow, tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu, "_GPUS", ())
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert cpu.bf16_is_slow.__wrapped__(info) is slow
    monkeypatch.setattr(cpu, "_GPUS", (tmp_path,))
    assert not cpu.bf16_is_slow.__wrapped__(info), "models run on the GPU"


def test_other_processors_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert not cpu.bf16_is_slow.__wrapped__(tmp_path / "nothing")
