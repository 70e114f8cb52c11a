"""Single layers of a model folder as ``transformers`` computes them, for the start check.

``transformers`` reads configuration and weights itself. A small model is loaded whole; of a larger model, single layers
and the embedding with the output layer are loaded, so that memory does not grow with the number of layers. Runs on the
CPU.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_rlpt.errors import ModelError
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.models.families import expected_shapes, mapping
from megatron_rlpt.models.huggingface import SINGLE, WeightFolder
from megatron_rlpt.plain_text import shortened

WHOLE = 1 << 29
"""Largest number of weights of a model that is loaded whole (2 GiB in fp32)."""
_VOCABULARY_ROWS = 16384
"""Rows of the output layer multiplied at a time."""


def is_small(arch: Architecture) -> bool:
    """Return True if the model is loaded whole."""
    return sum(torch.Size(shape).numel() for shape in expected_shapes(arch).values()) <= WHOLE


class TransformersLayers:
    """The layers of a model folder, one at a time, computed in fp32 on weights rounded to the policy's precision."""

    def __init__(self, folder: Path, arch: Architecture, dtype: torch.dtype) -> None:
        """Read the configuration, and the weights of a small model.

        Raises:
            ModelError: transformers cannot load the folder.
        """
        self._folder = folder
        self._arch = arch
        self._dtype = dtype
        self._all = self._load(folder, list(range(arch.layers))) if is_small(arch) else None

    def layer(self, number: int) -> tuple[torch.nn.Module, torch.nn.Module]:
        """Return decoder layer ``number``, counted from 0 in the whole model, and the rotary embedding.

        Raises:
            ModelError: transformers cannot load it.
        """
        if self._all is not None:
            return self._all.model.layers[number], self._all.model.rotary_emb
        # Load it as the only layer of a model in a temporary folder.
        weights = WeightFolder(self._folder)
        names = [name for rule in mapping(self._arch) if rule.layer == number for name in rule.hf]
        with tempfile.TemporaryDirectory() as scratch:
            own = {name.replace(f".layers.{number}.", ".layers.0."): weights.read(name) for name in names}
            save_file(own, Path(scratch) / SINGLE, metadata={"format": "pt"})
            del own
            model = self._load(Path(scratch), [number], vocab_size=1, pad_token_id=None)
        return model.model.layers[0], model.model.rotary_emb

    @functools.cached_property
    def ends(self) -> Any:
        """The model with embedding, last norm and output layer; a large model has no layers.

        Raises:
            ModelError: transformers cannot load them.
        """
        return self._all if self._all is not None else self._load(self._folder, [])

    def _load(self, weights: Path, layers: list[int], **entries: Any) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(self._folder, local_files_only=True, trust_remote_code=False)
            if types := getattr(config, "layer_types", None):
                config.layer_types = [types[number] for number in layers]
            for key, value in ({"num_hidden_layers": len(layers)} | entries).items():
                setattr(config, key, value)
            if weights != self._folder:
                config.save_pretrained(weights)
            with _quiet():
                model = AutoModelForCausalLM.from_pretrained(
                    weights,
                    config=config,
                    dtype=torch.float32,
                    attn_implementation="eager",
                    local_files_only=True,
                    trust_remote_code=False,
                )
        except Exception as error:  # its configuration checks raise many types
            raise ModelError(f"transformers cannot load {self._folder}: {shortened(str(error))}") from error
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self._dtype).float()
        return model.eval().requires_grad_(False)


def run_layer(layer: torch.nn.Module, rotary: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Return the output of ``layer`` for the whole sequence ``hidden`` [tokens, hidden], in fp32."""
    hidden = hidden.float().cpu()[None]
    positions = torch.arange(hidden.shape[1])[None]
    mask = torch.full((1, 1, hidden.shape[1], hidden.shape[1]), torch.finfo(torch.float32).min).triu(1)
    with torch.no_grad():
        embedding = rotary(hidden, positions)
        out = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=embedding)
    return (out[0] if isinstance(out, tuple) else out)[0]


def logprobs_after(model: Any, hidden: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return log-probabilities of every token but the first, from the last hidden states [tokens, hidden].

    Returns:
        The log-probabilities, and the standard deviation of logits over the vocabulary.
    """
    with torch.no_grad():
        final = model.model.norm(hidden.float().cpu()[None])[0, :-1]
        weight = model.lm_head.weight
        rows = range(0, weight.shape[0], _VOCABULARY_ROWS)
        logits = torch.cat([final @ weight[row : row + _VOCABULARY_ROWS].t() for row in rows], dim=-1)
    return logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0], float(logits.std(-1).mean())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress progress bars and the report of weights that a model without layers does not use."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
