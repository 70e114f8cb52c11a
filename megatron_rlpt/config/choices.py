"""Named values of configuration fields."""

from __future__ import annotations

import enum


class Dtype(enum.StrEnum):
    """Precision of a model's forward and backward pass; main weights and optimizer state are always fp32."""

    auto = "auto"
    """Resolved when a run starts; see ``observe/precision.py``."""
    bf16 = "bf16"
    fp32 = "fp32"


class Fp8(enum.StrEnum):
    """FP8 recipe of Transformer Engine: how the scaling factor of an 8-bit tensor is chosen."""

    off = "off"
    delayed = "delayed"
    current = "current"
    blockwise = "blockwise"
    mxfp8 = "mxfp8"


class Recompute(enum.StrEnum):
    """Which activations are recomputed in the backward pass instead of kept."""

    none = "none"
    selective = "selective"
    mlp = "mlp"
    full = "full"


class EngineName(enum.StrEnum):
    """Rollout engine; each has a folder in ``rollout/``."""

    vllm = "vllm"
    megatron = "megatron"


class PairScheme(enum.StrEnum):
    """Which candidates are compared with each other; see ``teacher/comparisons.py``."""

    round_robin = "round_robin"
    pivot = "pivot"
    tournament = "tournament"
    swiss = "swiss"
    elimination = "elimination"


class AnswerForm(enum.StrEnum):
    """How a prompted judge answers."""

    reasoned = "reasoned"
    direct = "direct"


class PromptLength(enum.StrEnum):
    """How much a prompted judge or rewriter is told."""

    full = "full"
    """Instructions, for a model that was not trained for the task."""
    brief = "brief"
    """The texts and a few tokens around them, for one that was."""


class EnginePlacement(enum.StrEnum):
    """In whose processes rollout engines run."""

    auto = "auto"
    """``rollout/placement.py`` decides."""
    colocated = "colocated"
    apart = "apart"


class EngineFp8(enum.StrEnum):
    """How a rollout engine quantizes the weights that it receives, and its activations, to FP8."""

    off = "off"
    per_tensor = "per_tensor"
    per_block = "per_block"


class OptionOrder(enum.StrEnum):
    """In which order the two options of a comparison are shown."""

    random = "random"
    both = "both"


class RunIn(enum.StrEnum):
    """Which processes judge and rewrite."""

    trainer = "trainer"
    workers = "workers"


class SourceFormat(enum.StrEnum):
    """Storage format of a data source; ``auto`` recognizes it by the path."""

    auto = "auto"
    jsonl = "jsonl"
    parquet = "parquet"
    text = "text"
    megatron = "megatron"
    hf = "hf"


class MixBy(enum.StrEnum):
    """What the weights of data sources are shares of."""

    tokens = "tokens"
    documents = "documents"


class HeldOutOverlap(enum.StrEnum):
    """What happens to a document that is both in the corpus and held out."""

    refuse = "refuse"
    skip = "skip"


class LengthNorm(enum.StrEnum):
    """What the summed loss of a sequence is divided by."""

    sequence = "sequence"
    constant = "constant"


class Decay(enum.StrEnum):
    """Shape of the learning-rate decay after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
