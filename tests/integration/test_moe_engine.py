"""Weight updates of a mixture of experts, whose weights vLLM packs for the CPU only at the first load."""

from __future__ import annotations

import json

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_rlpt.config import Dtype, RolloutConfig
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.models.families import expected_shapes
from megatron_rlpt.models.huggingface import WeightFolder
from megatron_rlpt.rollout.engine import EngineMode
from megatron_rlpt.rollout.vllm.engine import VllmEngine


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
    arch = read_architecture(tmp_path)
    # A separate process, because the groups of vLLM in this one belong to a model without experts.
    engine = VllmEngine(
        tmp_path,
        expected_shapes(arch),
        RolloutConfig(kv_cache_gib=0.02, max_batch=8),
        dtype=Dtype.fp32,
        max_sequence=64,
        seed=1,
        mode=EngineMode.OWN_PROCESS,
    )
    engine.self_check(lambda: WeightFolder(tmp_path).stream(arch), 0)
    assert engine.version == 0
