"""Weight updates of a mixture of experts, whose weights vLLM packs for the CPU only at the first load."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from prefork import VLLM, forked
from tiny_runs import finish
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


def test_experts_arrive_as_the_kernel_reads_them(tmp_path):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 60,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 128,
    }
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # transformers saves the number of experts under a name that differs from that of published models
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts": 4}))
    # A separate process, because the groups of vLLM in this one belong to a model without experts.
    script = Path(__file__).parent / "experts_alone.py"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code, out, err = finish(forked(VLLM, [sys.executable, str(script), str(tmp_path)], env=env))
    assert code == 0, err
    assert out.split()[-1] == "0"
