"""Options of data sources, and of how documents become episodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from megatron_rlpt.config.choices import HeldOutOverlap, MixBy, SourceFormat
from megatron_rlpt.config.fields import option, section


@dataclass
class SourceConfig:
    """One data source."""

    path: str = option(
        MISSING,
        "A file, a folder or a glob. For format hf a dataset name or folder that datasets can stream; for format "
        "megatron a prefix, a blend (0.3 a 0.7 b) or a folder of such datasets.",
        megatron="--data-path",
    )
    format: SourceFormat = option(
        SourceFormat.auto,
        "Storage format. auto recognizes .jsonl, .ndjson, .json (lines or one array), .txt, .md (each also with .gz, "
        ".zst, .xz, .bz2), .parquet, and folders of one of them.",
    )
    field: str = option(
        "text", "Record field (JSON, Parquet, hf) with the text of a document; dots lead into nested records."
    )
    prompts: bool = option(
        False,
        "Records are prompts that the policy answers, not documents that it continues: prompt, answer_start, answer, "
        "label (JSON only). A prompt has at most data.max_prefix tokens, an answer at most data.suffix_length.",
    )
    control_tokens: bool = option(
        False,
        "Read control tokens that documents spell, such as <|im_end|> in a corpus of chats, as control tokens; "
        "otherwise they stay text.",
    )
    weight: float = option(1.0, "Relative share of this source; see data.mix_by.", above=0)
    split: str = option("train", "Split to stream, for format hf.")
    subset: str = option("", "Subset (configuration name) to stream, for format hf; empty is the default one.")
    eod: int = option(
        -1, "Token id that ends a document, for format megatron; -1 detects the control token at its end, if any.",
        at_least=-1, allowed="a token id, or -1 (detected)",
    )  # fmt: skip
    reader: str = option(
        "", "Your own class that reads the source, as module:Class or path/file.py:Class; empty reads it by format."
    )
    options: dict[str, Any] = section(dict, "Keyword arguments of your own class.")


@dataclass
class DataConfig:
    """How documents become episodes."""

    sources: list[SourceConfig] = section(list, "Sources to train on, mixed by weight; at least one.")
    mix_by: MixBy = option(
        MixBy.tokens,
        "What weights are shares of: trained tokens (the share of episodes, whatever the length of documents), or "
        "documents drawn, where a source of longer documents gets more tokens.",
    )
    heldout: list[SourceConfig] = section(list, "Documents never trained on, for rlpt evaluate.")
    heldout_overlap: HeldOutOverlap = option(
        HeldOutOverlap.refuse,
        "When the text of a document in data.sources is also in data.heldout or evaluation.second_corpus: stop with "
        "an error, or skip the document and count it. The same for a document of evaluation.second_corpus in "
        "data.heldout.",
    )
    suffix_length: int = option(
        128, "Length of a suffix, rollout and rewrite; up to three tokens less where it would end inside a character.",
        unit="tokens", at_least=1, paper="128",
    )  # fmt: skip
    max_prefix: int = option(
        1920, "Maximum length of a prefix.", unit="tokens", at_least=1, paper="prefix and suffix 2048 in total",
        megatron="--seq-length = max_prefix + suffix_length",
    )  # fmt: skip
    min_prefix: int = option(
        128,
        "Minimum length of a prefix; up to three tokens less where max_prefix would begin it inside a character. A "
        "document shorter than min_prefix + suffix_length counts as too short.",
        unit="tokens", at_least=1,
    )  # fmt: skip
    episodes_per_document: int = option(
        0, "Maximum episodes cut from one document, evenly spread over it.", unit="episodes", at_least=0, zero="all"
    )
    shuffle_buffer: int = option(
        4096,
        "Episodes in the deterministic shuffle buffer, filled in turn from up to 64 documents and shared among the "
        "sources by weight, at least 1 each; 1 keeps the order of a source.",
        unit="episodes", at_least=1,
    )  # fmt: skip
    max_bad_fraction: float = option(
        0.01,
        "Share of malformed records, or of unreadable bytes of a source, above which the run stops; below it they are "
        "quarantined and counted.",
        at_least=0, at_most=1,
    )  # fmt: skip
    max_record_bytes: int = option(
        16777216,
        "Maximum size of a record (line, row, text file) after decompression; a larger one is malformed and never "
        "loaded.",
        unit="bytes", at_least=1,
    )  # fmt: skip
    add_bos: bool = option(False, "Put the tokenizer's BOS token before every document.")
