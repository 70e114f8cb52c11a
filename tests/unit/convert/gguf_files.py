"""GGUF files of small models, written the way llama.cpp's converter does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import numpy as np
import torch
from families_on_disk import tensors_in

NAMES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
_ARCHITECTURES = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}


def write_gguf(
    folder: Path,
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    rope_divisors: np.ndarray | None = None,
    **extra: object,
) -> Path:
    """Write the Hugging Face model in ``folder`` as a GGUF file.

    Args:
        folder: a saved model.
        path: the file to write.
        kind: how matrices are stored; vectors are fp32.
        rope_divisors: what llama.cpp stores of Llama 3's rotary scaling.
        extra: more key-value pairs of the architecture; replace those made here.
    """
    config = json.loads((folder / "config.json").read_text())
    name = NAMES[config["model_type"]]
    writer = gguf.GGUFWriter(path, name)
    values = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "block_count": config["num_hidden_layers"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_parameters"]["rope_theta"],
    }
    if config.get("head_dim"):
        values |= {"attention.key_length": config["head_dim"], "rope.dimension_count": config["head_dim"]}
    if "moe_intermediate_size" in config:
        values |= {
            "expert_count": config["num_local_experts"],
            "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
        }
    for key, value in (values | extra).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        (writer.add_string if isinstance(value, str) else add)(f"{name}.{key}", value)
    tokens = ["<unk>", "<s>", "</s>", "t", "o", "a", "to", "toa"]
    tokens += [f"unused{index}" for index in range(config["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["t o", "to a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(_ARCHITECTURES[name], config["num_hidden_layers"])
    for theirs, tensor in _stacked(tensors_in(folder)).items():
        if name == "llama" and theirs.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads" if "q_proj" in theirs else "num_key_value_heads"]
            # convert_hf_to_gguf.py: permute
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)
        ours = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        array = tensor.float().numpy()
        stored = kind if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(ours, gguf.quantize(array, stored), raw_dtype=stored)
    if rope_divisors is not None:
        writer.add_tensor("rope_freqs.weight", rope_divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of a layer as one tensor."""
    experts: dict[str, dict[int, torch.Tensor]] = {}
    plain = {}
    for name, tensor in tensors.items():
        match = re.search(r"\.experts\.(\d+)\.", name)
        if match:
            experts.setdefault(name.replace(match.group(0), ".experts."), {})[int(match.group(1))] = tensor
        else:
            plain[name] = tensor
    return plain | {name: torch.stack([group[i] for i in sorted(group)]) for name, group in experts.items()}
