"""The memory of a conversion does not grow with the model."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from prefork import MEGATRON, forked
from safetensors.torch import save_file

from megatron_rlpt.models.architecture import parse_architecture
from megatron_rlpt.models.families import expected_shapes

pytestmark = pytest.mark.slow

MIB = 2**20
CODE = """
import sys, resource
from pathlib import Path
from megatron_rlpt.models import huggingface
from megatron_rlpt.convert.convert import convert
from megatron_rlpt.convert.formats import Format
from megatron_rlpt.policy.layout import Layout
import megatron_rlpt.convert.megatron_reader


def peak():
    # Not ru_maxrss, which a process inherits from its parent.
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

huggingface.SHARD_BYTES = 8 << 20
source, target, to = Path(sys.argv[1]), Path(sys.argv[2]), Format(sys.argv[3])
before = peak()
convert(source, target, to, layout=Layout(tensor=2, pipeline=2) if to is Format.MEGATRON else None)
print("grew", peak() - before)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """64 layers of 4 MiB, and an embedding of 2 MiB, in files of a few layers each."""
    folder = tmp_path_factory.mktemp("model") / "deep"
    folder.mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 1024,
        "hidden_size": 512,
        "intermediate_size": 680,
        "num_hidden_layers": 64,
        "num_attention_heads": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = list(expected_shapes(parse_architecture(config, folder)).items())
    weight_map = {}
    for start in range(0, len(shapes), 100):
        part = {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in shapes[start : start + 100]}
        save_file(part, folder / f"part-{start:04d}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{start:04d}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def growth(tmp_path):
    """Convert in a new process; return the bytes by which its peak memory grows."""
    script = tmp_path / "convert.py"
    script.write_text(CODE)

    def measure(*arguments: object) -> int:
        process = forked(MEGATRON, [sys.executable, str(script), *map(str, arguments)])
        code = process.wait(300)
        out, err = process.communicate()
        assert code == 0, err
        return int(re.search(r"grew (\d+)", out)[1])

    return measure


def test_it_is_a_few_layers_whatever_the_number_of_layers(model, growth, tmp_path):
    whole = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert whole > 250 * MIB
    assert growth(model, tmp_path / "megatron", "megatron") < whole / 3
    assert growth(tmp_path / "megatron", tmp_path / "back", "hf") < whole / 3
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 20
