"""Options of ``rlpt evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from megatron_rlpt.config.fields import option, section
from megatron_rlpt.config.schema_data import SourceConfig
from megatron_rlpt.config.schema_teacher import JudgeConfig


@dataclass
class PromptSetConfig:
    """A set of prompts or questions beside data.heldout."""

    name: str = option(MISSING, "Name in results, unlike that of any other set.")
    format: str = option(
        "jsonl",
        "Format of the files: jsonl (records with text or prefix, reference and label), heldout (documents that are "
        "cut as those of data.heldout), or a published one; megatron_rlpt/evaluation/README.md lists them.",
    )
    path: str = option(MISSING, "File or folder to read.")
    measures: list[str] = section(
        list, "What to measure: quality, coherence, safety, factuality, perplexity, mc. Empty: what the format is for."
    )
    labels: list[str] = section(
        list,
        "Labels of the prompts to use, each also by its part before a slash (safe for safe/homonyms); empty: all.",
    )
    prompts: int = option(0, "Prompts to use, the first of the set.", at_least=0, zero="all")
    weight: float = option(1.0, "Weight in the mean of a measure over all sets that have it.", at_least=0)


@dataclass
class EvaluationConfig:
    """How ``rlpt evaluate`` compares models."""

    prefixes: int = option(
        128, "Held-out prefixes to continue.", at_least=2, allowed="at least 2 (an interval needs two)"
    )
    samples: int = option(
        0, "Sampled continuations per prefix, in addition to the greedy one.", at_least=0, zero="none", paper="0"
    )
    measures: list[str] = section(
        list,
        "What to measure on data.heldout: quality, coherence, safety, factuality, perplexity. Empty: quality, "
        "coherence and factuality; perplexity reads every document once more with every model.",
    )
    sets: list[PromptSetConfig] = section(list, "Further sets of prompts or questions.")
    seeds: int = option(
        1, "Times that a prompted judge is asked about the same texts, each with other seeds.", at_least=1, paper="8"
    )
    perplexity_characters: int = option(
        8192, "Characters of a held-out document whose perplexity is measured, from its beginning.",
        unit="characters", at_least=0, zero="all",
    )  # fmt: skip
    batch_tokens: int = option(
        16384, "Maximum tokens in one forward pass of perplexity, given answers and standard tasks.",
        unit="tokens", at_least=1,
    )  # fmt: skip
    tasks: list[str] = section(
        list,
        "Standard tasks to run with lm-eval, each a name, or name:shots for that many examples in the prompt; standard "
        "stands for the paper's: boolq, piqa, social_iqa, hellaswag, arc_easy, arc_challenge, openbookqa, mmlu:5.",
    )
    tasks_path: str = option("", "Folder with task files (YAML) of your own for evaluation.tasks.")
    tasks_limit: int = option(0, "Questions of each standard task, the first ones.", at_least=0, zero="all")
    cache: str = option(
        "", "Folder that keeps generated texts and verdicts for later evaluations; empty: cache in the output folder."
    )
    second_measure: str = option(
        "ngram",
        "A second measure that took no part in training: ngram, a Kneser-Ney n-gram model, or your own reward as "
        "module:Class or path/file.py:Class.",
    )
    second_corpus: list[SourceConfig] = section(
        list,
        "Documents that the second measure is fitted to; neither trained on nor continued. Empty turns ngram off.",
    )
    second_options: dict[str, Any] = section(dict, "Keyword arguments of your own class.")
    judges: list[JudgeConfig] = section(
        list,
        "Further judges, each with likelihood and generative as in teacher. One that rewarded no training is evidence.",
    )
    overlap_ngram: int = option(
        13, "Words that a prompt and a training document must share in a row to count as overlap.",
        unit="words", at_least=5,
    )  # fmt: skip
    drop_known: bool = option(
        False, "Leave out prompts that are near-duplicates of training text; otherwise they are counted and told."
    )
    overlap_limit: float = option(
        1.0, "Training text to compare with the prompts, from the beginning of every source, in equal parts; about 20 "
        "MB a second.",
        unit="GiB", at_least=0, zero="none",
    )  # fmt: skip
    every: int = option(
        0,
        "Evaluate the policy while it trains, after so many steps and at the end: greedy continuations of held-out "
        "prefixes against those of the starting policy, as metrics named evaluation/...",
        unit="steps", at_least=0, zero="never",
    )  # fmt: skip
    every_prefixes: int = option(32, "Held-out prefixes of such an evaluation, the first ones.", at_least=2)
    examples: int = option(8, "Prefixes shown with all continuations in the report.", at_least=0)
