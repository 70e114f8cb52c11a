"""GGUF files with false counts: refused in one line, without allocating what they claim."""

from __future__ import annotations

import random
import struct

import pytest
from families_on_disk import save_family
from gguf_files import write_gguf

from megatron_rlpt.convert.gguf_reader import GgufSource
from megatron_rlpt.errors import ModelError


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("gguf")
    return write_gguf(save_family(folder / "m", "qwen3_moe", intermediate_size=64), folder / "a.gguf").read_bytes()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*pairs: bytes, tensors: bytes = b"", count: int | None = None, tensor_count: int = 0) -> bytes:
    return (
        b"GGUF"
        + struct.pack("<IQQ", 3, tensor_count, len(pairs) if count is None else count)
        + b"".join(pairs)
        + tensors
    )


def array(key: str, kind: int, count: int, content: bytes = b"") -> bytes:
    return text(key) + struct.pack("<IIQ", 9, kind, count) + content


UNTRUE = {
    "tensors": (header(tensor_count=1 << 60), "1152921504606846976 tensors"),
    "pairs": (header(count=1 << 60), "1152921504606846976 key-value pairs"),
    "length of a key": (header(struct.pack("<Q", 1 << 62)), "a key says that it has 4611686018427387904 bytes"),
    "length of a string": (header(text("a") + struct.pack("<IQ", 8, 1 << 40)), "the value of 'a' says that it has"),
    "items": (header(array("a", 4, 1 << 60)), "'a' says that it has 1152921504606846976 items"),
    "items beyond the end": (header(array("a", 4, 1000, bytes(100))), "past the end of the file"),
    "strings beyond the end": (header(array("a", 8, 1 << 20, bytes(64))), "past the end of the file"),
    "arrays of arrays": (header(array("a", 9, 1, struct.pack("<IQ", 9, 1) * 100_000)), "array of arrays"),
    "dimensions": (
        header(tensors=text("t") + struct.pack("<I", 1 << 31) + bytes(64), tensor_count=1),
        "'t' has 2147483648 dimensions",
    ),
    "shape": (
        header(tensors=text("t") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0), tensor_count=1),
        "tensor 't' ends at byte",
    ),
    "type": (header(tensors=text("t") + struct.pack("<IQIQ", 1, 8, 999, 0), tensor_count=1), "unknown type 999"),
    "nothing": (b"GGUF", "less than a header"),
}


@pytest.mark.parametrize("name", UNTRUE)
def test_a_count_or_length_that_the_file_cannot_hold_is_named(tmp_path, name):
    data, message = UNTRUE[name]
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(ModelError) as caught:
        GgufSource(tmp_path / "a.gguf", tmp_path)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("key", "value"),
    [("block_count", 1 << 31), ("expert_count", 1 << 31), ("attention.head_count", 0), ("embedding_length", 0)],
)
def test_a_number_of_the_architecture_that_its_tensors_do_not_bear_out_is_named(tmp_path, file, key, value):
    at = file.index(text(f"qwen3moe.{key}")) + len(text(f"qwen3moe.{key}")) + 4
    (tmp_path / "a.gguf").write_bytes(file[:at] + struct.pack("<I", value) + file[at + 4 :])
    with pytest.raises(ModelError, match=r"says that|allowed") as caught:
        GgufSource(tmp_path / "a.gguf", tmp_path)
    assert str(value) in str(caught.value)


def test_damage_anywhere_in_the_header_is_a_model_error_or_harmless(tmp_path, file):
    draw = random.Random(5)
    end = file.index(b"token_embd") + 2000
    words = [b"\xff" * 8, bytes(8), (1 << 60).to_bytes(8, "little"), (9).to_bytes(4, "little") * 2]
    refused = 0
    for index in range(150):
        damaged = bytearray(file)
        for _ in range(draw.choice([1, 1, 3])):
            place, word = draw.randrange(end), draw.choice([*words, bytes([draw.randrange(256)])])
            damaged[place : place + len(word)] = word
        (tmp_path / "a.gguf").write_bytes(damaged)
        (tmp_path / str(index)).mkdir()
        try:
            GgufSource(tmp_path / "a.gguf", tmp_path / str(index))
        except ModelError:
            refused += 1
    assert refused > 75
