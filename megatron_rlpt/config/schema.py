"""Every option of a run, one dataclass per section: default, text, bounds and unit in one place.

Checks, ``rlpt config --help KEY`` and the reference in ``configs/README.md`` are made from these fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from megatron_rlpt.config.choices import (
    Decay,
    Dtype,
    EngineFp8,
    EngineName,
    EnginePlacement,
    Fp8,
    LengthNorm,
    Recompute,
)
from megatron_rlpt.config.fields import option, section
from megatron_rlpt.config.schema_data import DataConfig
from megatron_rlpt.config.schema_evaluation import EvaluationConfig
from megatron_rlpt.config.schema_teacher import BufferConfig, TeacherConfig


@dataclass
class RunConfig:
    """Run folder and seed."""

    dir: str = option(
        MISSING, "Folder of the run: checkpoints, metrics, samples, export. Relative to the working directory."
    )
    seed: int = option(
        1, "Seed of all randomness in the run: shuffling, rollouts, votes.", allowed="any integer", megatron="--seed"
    )


@dataclass
class ModelConfig:
    """The policy."""

    path: str = option(MISSING, "Hugging Face folder (config, safetensors, tokenizer) that the policy starts from.")
    dtype: Dtype = option(
        Dtype.auto,
        "Precision of forward and backward; main weights and optimizer are fp32. auto is what the run folder records, "
        "else bf16 on a machine with a GPU or with CPU kernels for bf16, and fp32 on any other.",
        megatron="--bf16",
    )
    fp8: Fp8 = option(
        Fp8.off,
        "FP8 recipe for the matrix products of the layers, on top of bf16; needs Transformer Engine and a GPU that "
        "supports it.",
        megatron="--fp8-recipe",
    )


@dataclass
class ParallelConfig:
    """How the policy is sharded over ranks; the remaining ranks are data-parallel."""

    tensor: int = option(
        1, "Ranks that share the matrices of every layer.", at_least=1, megatron="--tensor-model-parallel-size"
    )
    sequence: bool = option(
        False, "Shard norms and residuals along the sequence over the tensor-parallel ranks.",
        megatron="--sequence-parallel",
    )  # fmt: skip
    pipeline: int = option(1, "Pipeline stages.", at_least=1, megatron="--pipeline-model-parallel-size")
    virtual_stages: int = option(
        1, "Model chunks per pipeline rank (interleaved schedule); more of them shrink the pipeline bubble.",
        at_least=1, megatron="--num-virtual-stages-per-pipeline-rank",
    )  # fmt: skip
    context: int = option(1, "Ranks that share every sequence.", at_least=1, megatron="--context-parallel-size")
    expert: int = option(
        1, "Ranks that share the experts of a mixture-of-experts layer, among tensor, context and data ranks.",
        at_least=1, megatron="--expert-model-parallel-size",
    )  # fmt: skip
    overlap: bool = option(
        False,
        "Reduce gradients during the backward pass and, in runs without rollouts and reference (both need all weights "
        "first), gather weights during the forward pass.",
        megatron="--overlap-grad-reduce --overlap-param-gather",
    )
    timeout: float = option(
        1800.0, "Time after which a rank that others wait for is reported as missing and the run stops.",
        unit="seconds", above=0, megatron="--distributed-timeout-minutes",
    )  # fmt: skip
    lost_after: float = option(
        45.0,
        "Time without a heartbeat after which a rank counts as lost: the others name it and exit with 76. NCCL alone "
        "would wait until timeout.",
        unit="seconds", at_least=0, zero="never",
    )  # fmt: skip


@dataclass
class CurriculumConfig:
    """Growth of the number of rollouts, so that early steps do not pay for rollouts that lose."""

    enabled: bool = option(False, "Begin with few rollouts; false offers candidates.rollouts from the first step.")
    start: int = option(
        1, "Rollouts per episode at the start; doubled (from 0 to 1) up to candidates.rollouts.", at_least=0
    )
    grow_above: float = option(
        0.3, "Share of episodes won by a rollout, over the last window that had one, above which the number grows.",
        at_least=0, below=1,
    )  # fmt: skip
    window: int = option(
        256, "Episodes with a rollout that the share is taken over; a number is kept for at least as many.",
        unit="episodes", at_least=1,
    )  # fmt: skip
    probe: float = option(0.125, "Share of episodes that get one rollout while the number is 0.", above=0, at_most=1)


@dataclass
class CandidatesConfig:
    """Candidates that the judge gets for every episode."""

    original: bool = option(True, "Offer the document's own suffix as a candidate.")
    rewrite: bool = option(False, "Offer the teacher's rewrite of the suffix as a candidate.")
    rollouts: int = option(8, "Rollouts of the current policy per episode (K).", at_least=0, paper="1 to 16")
    curriculum: CurriculumConfig = section(CurriculumConfig)


@dataclass
class RolloutConfig:
    """How the policy samples rollouts, and how weights reach the engine."""

    engine: EngineName = option(EngineName.vllm, "Engine that generates rollouts.")
    tensor: int = option(
        1,
        "GPUs (without GPUs: ranks) that share one vLLM engine, whatever the training layout. Consecutive ranks share "
        "one; Megatron's engine takes parallel.tensor instead.",
        at_least=1,
    )
    expert: int = option(
        1,
        "Over how many of its GPUs an engine distributes whole experts: all of them (as rollout.tensor), or 1 to cut "
        "every expert over all.",
        at_least=1,
    )
    placement: EnginePlacement = option(
        EnginePlacement.auto,
        "Where engines run: in the ranks' own processes (colocated), or in processes of their own on GPUs that no rank "
        "trains on, where they can generate during updates (apart). auto takes spare GPUs if a machine has one per "
        "rank.",
    )
    fp8: EngineFp8 = option(
        EngineFp8.off,
        "FP8 of vLLM's matrix products, with one scale per weight and per token (per_tensor) or per block of 128 x 128 "
        "(per_block). Weights are quantized as they arrive. Watch logprob_gap; grpo corrects for it with "
        "objective.truncate_ratio.",
    )
    router_replay: bool = option(
        False,
        "Train a mixture of experts with the routing of its rollouts: vLLM records the experts of every token, and the "
        "update sends the tokens of rollouts and of their prefixes to the same ones. Groups grow by layers x experts "
        "per token bytes a token.",
    )
    temperature: float = option(1.0, "Sampling temperature.", above=0, paper="1")
    max_batch: int = option(256, "Maximum sequences decoded concurrently.", unit="sequences", at_least=1)
    eager: bool = option(
        False,
        "Launch vLLM's kernels one by one instead of replaying CUDA graphs: slower, but kernels do not depend on the "
        "batch. A CPU has no graphs.",
    )
    kv_cache_gib: float = option(1.0, "Key-value cache of the engine, on each of its GPUs.", unit="GiB", above=0)
    warn_logprob_gap: float = option(
        0.1, "Mean difference between the engine's and the trainer's log-probability of a token above which the run "
        "warns.",
        unit="nats", above=0,
    )  # fmt: skip
    max_logprob_gap: float = option(0.5, "The same difference above which the run stops.", unit="nats", above=0)
    sync_bucket_mib: int = option(
        512, "Buffer for weights on their way from the training layout to the engine.", unit="MiB", at_least=1
    )


@dataclass
class ObjectiveConfig:
    """What the update optimizes."""

    name: str = option(
        "online_dpo",
        "Objective that turns judged candidates into a loss: ntp, sft_rewrite, sft_rollout, rf_nll, online_dpo, grpo, "
        "or your own class as module:Class or path/file.py:Class.",
    )
    options: dict[str, Any] = section(dict, "Keyword arguments of your own class.")
    beta: float = option(0.1, "Strength of the pull to the reference policy, for online_dpo.", above=0)
    reference_refresh: int = option(
        0, "Copy the policy into the reference after this many updates, for online_dpo, and for grpo with kl.",
        unit="updates", at_least=0, zero="frozen",
    )  # fmt: skip
    clip_low: float = option(0.2, "Lower clip of the probability ratio, 1 - clip_low, for grpo.", above=0, below=1)
    clip_high: float = option(0.2, "Upper clip of the probability ratio, 1 + clip_high, for grpo.", above=0)
    truncate_ratio: float = option(
        0.0,
        "Weight every token by its probability under the policy over that under the engine, at most by this, instead "
        "of clipping that ratio, for grpo; for engines in a lower precision.",
        at_least=0, zero="clip_low and clip_high",
    )  # fmt: skip
    normalize_advantage: bool = option(
        True,
        "Divide the advantages of a group by their standard deviation, for grpo; false, with length_norm constant, is "
        "Dr. GRPO.",
    )
    length_norm: LengthNorm = option(
        LengthNorm.sequence,
        "Divide the loss of a rollout, summed over its tokens, by its own length (sequence) or by data.suffix_length "
        "(constant, as Dr. GRPO), for grpo.",
    )
    kl: float = option(
        0.0,
        "Weight of the divergence from the reference policy that is added to the loss of every token, for grpo.",
        at_least=0, zero="off, no reference is loaded",
    )  # fmt: skip


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = option(5e-6, "Peak learning rate.", above=0, paper="5e-6 continual, 5e-4 from scratch", megatron="--lr")
    min_lr: float = option(0.0, "Learning rate at the end of the decay.", at_least=0, megatron="--min-lr")
    warmup_steps: int = option(
        0, "Updates of linear warm-up from 0.", unit="updates", at_least=0, megatron="--lr-warmup-iters"
    )
    decay: Decay = option(
        Decay.cosine, "Shape of the decay from lr to min_lr over the remaining steps.", megatron="--lr-decay-style"
    )
    weight_decay: float = option(
        0.0, "Decoupled weight decay of matrices; norms and biases have none.", at_least=0, megatron="--weight-decay"
    )
    beta1: float = option(0.9, "Decay of the first Adam moment.", at_least=0, below=1, megatron="--adam-beta1")
    beta2: float = option(0.95, "Decay of the second Adam moment.", at_least=0, below=1, megatron="--adam-beta2")
    eps: float = option(1e-8, "Adam epsilon.", above=0, megatron="--adam-eps")
    clip_grad: float = option(
        1.0, "Global gradient norm above which gradients are scaled down.",
        at_least=0, zero="off", megatron="--clip-grad",
    )  # fmt: skip
    offload: bool = option(
        False, "Keep optimizer state in host memory while the engine generates; only where both share a GPU."
    )


@dataclass
class TrainConfig:
    """Length and batch of the run."""

    steps: int = option(
        MISSING, "Steps of the run.", unit="steps", at_least=1, paper="2000 continual, 21000 from scratch",
        megatron="--train-iters",
    )  # fmt: skip
    global_batch: int = option(
        256, "Episodes per optimizer update.", unit="episodes", at_least=1, paper="256", megatron="--global-batch-size"
    )
    micro_batch: int = option(
        8, "Episodes per forward-backward pass; memory grows with it, the result does not change.",
        unit="episodes", at_least=1, megatron="--micro-batch-size",
    )  # fmt: skip
    staleness: int = option(
        0,
        "Steps between proposing a batch and its update. With 0 they follow each other; with S the next S batches are "
        "generated and judged meanwhile, by weights that are S updates old.",
        unit="steps", at_least=0,
    )  # fmt: skip
    empty_window: int = option(
        20, "Steps that max_empty_share is taken over; a shorter run is judged by all of its steps.",
        unit="steps", at_least=1,
    )  # fmt: skip
    max_empty_share: float = option(
        0.9,
        "Share of steps without an example to learn from (ties, failed rewrites, copies, ...) above which the run ends "
        "with exit code 77. With 1 it continues; a run that ends without any update exits with 77 nevertheless.",
        at_least=0, at_most=1,
    )  # fmt: skip
    min_parse_rate: float = option(
        0.05,
        "Share of answers with a verdict, over the last empty_window steps, below which a run with "
        "teacher.judge=right_verdict ends with exit code 77.",
        at_least=0, at_most=1, zero="never",
    )  # fmt: skip
    logprob_chunk: int = option(
        1024, "Tokens per rank whose vocabulary logits exist at the same time.", unit="tokens", at_least=1
    )
    max_stall: float = option(
        3600.0,
        "Time without progress, waiting for judges included, after which the run writes its stacks to logs/ and exits "
        "with 76, so that a hanging run does not hold its GPUs.",
        unit="seconds", at_least=0, zero="never",
    )  # fmt: skip
    recompute: Recompute = option(
        Recompute.none,
        "Activations recomputed in the backward pass: none, those of attention (selective), of feed-forward layers or "
        "experts (mlp), or of whole layers (full).",
        megatron="--recompute-granularity",
    )
    router_aux_loss: float = option(
        0.0,
        "Coefficient of the load-balancing loss of every layer of a mixture of experts (Switch Transformers), over all "
        "tokens of an update; counting them takes one more forward pass. 0.001 to 0.01 for runs from scratch.",
        at_least=0, zero="off", megatron="--moe-aux-loss-coeff",
    )  # fmt: skip
    deterministic: bool = option(
        False,
        "Use only GPU operations that give the same bits again, so that a resumed run equals one that was not stopped; "
        "slower. Runs on CPUs always do.",
        megatron="--deterministic-mode",
    )


@dataclass
class CheckpointConfig:
    """Checkpoints to resume from."""

    every: int = option(
        100, "Steps between checkpoints; the last step always writes one.", unit="steps", at_least=1,
        megatron="--save-interval",
    )  # fmt: skip
    keep: int = option(2, "Newest checkpoints kept on disk.", at_least=1)
    background: bool = option(
        False, "Write checkpoints while training continues; a checkpoint is published once it is complete.",
        megatron="--async-save",
    )  # fmt: skip
    allow_previous: bool = option(
        False, "Resume from the previous checkpoint when the newest is damaged; otherwise damage is an error."
    )


@dataclass
class ObserveConfig:
    """Samples and metric trackers."""

    samples_per_step: int = option(
        2, "Episodes per step written in full to samples.jsonl: prefix, candidates, verdicts, chosen, rejected.",
        unit="episodes", at_least=0,
    )  # fmt: skip
    tensorboard: bool = option(True, "Write TensorBoard event files to <run.dir>/tensorboard.")
    wandb_project: str = option("", "Weights & Biases project; needs the wandb package. Empty is off.")
    mlflow_experiment: str = option("", "MLflow experiment; needs the mlflow package. Empty is off.")
    metrics_port: int = option(
        -1, "Port of the trainer's Prometheus metrics, on rank 0; 0 picks a free one, -1 turns them off.",
        at_least=-1, at_most=65535, allowed="a port, 0 (a free one) or -1 (off)",
    )  # fmt: skip
    metrics_host: str = option(
        "127.0.0.1", "Address that the metrics listen on; 0.0.0.0 is every address of the machine."
    )


@dataclass
class Config:
    """The whole configuration of a run."""

    run: RunConfig = section(RunConfig)
    model: ModelConfig = section(ModelConfig)
    parallel: ParallelConfig = section(ParallelConfig)
    data: DataConfig = section(DataConfig)
    candidates: CandidatesConfig = section(CandidatesConfig)
    rollout: RolloutConfig = section(RolloutConfig)
    buffer: BufferConfig = section(BufferConfig)
    teacher: TeacherConfig = section(TeacherConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    train: TrainConfig = section(TrainConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    observe: ObserveConfig = section(ObserveConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)

    @property
    def teacher_path(self) -> str:
        """Folder of the teacher's model as judge; without one of its own, the policy's starting model."""
        return self.teacher.path or self.model.path

    @property
    def max_sequence(self) -> int:
        """Maximum training sequence in tokens: prefix plus suffix."""
        return self.data.max_prefix + self.data.suffix_length
