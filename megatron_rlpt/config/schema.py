"""Every option of a run: one dataclass per section, one place for every default, a docstring per field."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


class Dtype(enum.StrEnum):
    """Precision of the policy's forward and backward pass; main weights and optimizer state are always fp32."""

    bf16 = "bf16"
    fp32 = "fp32"


class Fp8(enum.StrEnum):
    """FP8 recipe of Transformer Engine's layers: how the scale of an 8-bit tensor is found."""

    off = "off"
    delayed = "delayed"
    current = "current"
    blockwise = "blockwise"
    mxfp8 = "mxfp8"


class Recompute(enum.StrEnum):
    """Which activations are computed again in the backward pass instead of kept."""

    none = "none"
    selective = "selective"
    full = "full"


class EngineName(enum.StrEnum):
    """What generates rollouts; one module in ``rollout/`` each."""

    vllm = "vllm"
    megatron = "megatron"


class JudgeName(enum.StrEnum):
    """Which judge scores candidates; one module in ``teacher/`` each."""

    likelihood = "likelihood"
    generative = "generative"


class PairScheme(enum.StrEnum):
    """Who is compared with whom; one coroutine in ``teacher/schemes.py`` each."""

    round_robin = "round_robin"
    pivot = "pivot"
    tournament = "tournament"


class OptionOrder(enum.StrEnum):
    """In which order the two options of a comparison are shown."""

    random = "random"
    both = "both"


class RunIn(enum.StrEnum):
    """Where the teacher works."""

    trainer = "trainer"
    workers = "workers"


class SourceFormat(enum.StrEnum):
    """How a data source is stored; ``auto`` looks at the path."""

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
    """What becomes of a document that is in the corpus and held out."""

    refuse = "refuse"
    skip = "skip"


class Decay(enum.StrEnum):
    """Shape of the learning-rate decay after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass
class RunConfig:
    """Where a run lives and what makes it reproducible."""

    dir: str = MISSING
    """Folder of this run: checkpoints, metrics, samples, export. Relative to the working directory."""
    seed: int = 1
    """Seed of everything random in the run: shuffle order, rollouts, votes."""


@dataclass
class ModelConfig:
    """The policy."""

    path: str = MISSING
    """Hugging Face folder (config, safetensors, tokenizer) that the policy starts from."""
    dtype: Dtype = Dtype.bf16
    """Precision of forward and backward."""
    fp8: Fp8 = Fp8.off
    """FP8 recipe for the matrix products of the layers, on top of bf16; needs Transformer Engine and a GPU for it."""


@dataclass
class ParallelConfig:
    """How the policy is cut over ranks; what is left of the world after these is data parallelism."""

    tensor: int = 1
    """Ranks that share every layer's matrices."""
    sequence: bool = False
    """Divide norms and residuals along the sequence among the tensor-parallel ranks."""
    pipeline: int = 1
    """Stages of consecutive layers."""
    virtual_stages: int = 1
    """Pieces per pipeline rank (interleaved schedule); more of them shrink the pipeline bubble."""
    context: int = 1
    """Ranks that share every sequence."""
    expert: int = 1
    """Ranks that share the experts of a mixture-of-experts layer, out of the tensor, context and data ranks."""
    overlap: bool = False
    """Reduce gradients during the backward pass and, in runs without rollouts and reference (which need all weights
    before), gather weights during the forward pass."""
    timeout: float = 1800.0
    """Seconds after which a rank that others wait for is reported as absent and the run stops."""


@dataclass
class SourceConfig:
    """One corpus."""

    path: str = MISSING
    """A file, a folder or a glob; for ``format: hf`` a dataset name or folder that ``datasets`` can stream; for
    ``format: megatron`` a prefix or a blend (``0.3 a 0.7 b``) as in ``--data-path``, or a folder of such datasets."""
    format: SourceFormat = SourceFormat.auto
    """Storage format; ``auto`` recognises .jsonl, .ndjson, .json (lines or one array), .txt, .md (all of them also
    with .gz, .zst, .xz, .bz2), .parquet, and folders of one of them."""
    field: str = "text"
    """Name of the record field (JSON, Parquet, hf) that holds the document's text; dots lead into nested records."""
    control_tokens: bool = False
    """Whether control tokens that documents spell (``<|im_end|>`` in a corpus of chats) are meant as such; else they
    are text like any other, and no document can stop the policy."""
    weight: float = 1.0
    """Relative share of this source, of what ``data.mix_by`` says."""
    split: str = "train"
    """Split to stream, for ``format: hf``."""
    subset: str = ""
    """Subset (configuration name) to stream, for ``format: hf``; empty is the only or default one."""
    eod: int = -1
    """Token id that ends a document, for ``format: megatron``; -1 is the control token that it ends with, if any."""


@dataclass
class DataConfig:
    """How documents become episodes."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Corpora to mix by weight."""
    mix_by: MixBy = MixBy.tokens
    """What weights are shares of: trained tokens (all episodes have as many, so it is the share of episodes, whatever
    the lengths of documents), or documents drawn, where a source of longer documents has more tokens."""
    heldout: list[SourceConfig] = field(default_factory=list)
    """Documents never trained on, for ``rlpt evaluate``."""
    heldout_overlap: HeldOutOverlap = HeldOutOverlap.refuse
    """When a document of ``sources`` is also in ``heldout`` or ``evaluation.ngram_corpus``, by what it says: stop with
    an error, or leave it out of training and count it. Likewise one of ``evaluation.ngram_corpus`` in ``heldout``."""
    suffix_length: int = 128
    """Tokens per suffix, and per rollout and rewrite (paper: 128); up to three less where it would end inside a
    character."""
    max_prefix: int = 1920
    """Longest prefix in tokens (paper: prefix and suffix 2048 in all)."""
    min_prefix: int = 128
    """Shortest prefix in tokens (up to three less where max_prefix would begin it inside a character); a document
    shorter than min_prefix + suffix_length is counted as too short."""
    episodes_per_document: int = 0
    """Most episodes cut from one document, evenly spread over it; 0 takes every chunk."""
    shuffle_buffer: int = 4096
    """Episodes held in the deterministic shuffle buffer, filled from up to 64 documents by turns and divided among the
    sources by weight (at least 1 each); 1 keeps the order of a source."""
    max_bad_fraction: float = 0.01
    """Share of malformed records, or of the bytes of a source that cannot be read, above which the run stops; below it
    they are quarantined and counted."""
    max_record_bytes: int = 16777216
    """Largest record (line, row, text file) in bytes after decompression; a larger one is malformed, and never held."""
    add_bos: bool = False
    """Put the tokenizer's BOS token before every document."""


@dataclass
class CurriculumConfig:
    """Growth of the number of rollouts, so that early steps do not pay for rollouts that lose."""

    enabled: bool = False
    """Begin with few rollouts; off offers ``candidates.rollouts`` from the first step."""
    start: int = 1
    """Rollouts per episode at the start; doubled (from 0 to 1) up to ``candidates.rollouts``."""
    grow_above: float = 0.3
    """Share of episodes won by a rollout, over the last ``window`` that had one, above which the number grows."""
    window: int = 256
    """Episodes with a rollout that the share is taken over; a number is kept for at least so many."""
    probe: float = 0.125
    """Share of episodes that have one rollout nevertheless while the number is 0."""


@dataclass
class CandidatesConfig:
    """What is offered to the judge for every episode."""

    original: bool = True
    """Offer the document's own suffix as a candidate."""
    rewrite: bool = False
    """Offer the teacher's rewrite of the suffix as a candidate."""
    rollouts: int = 8
    """Rollouts of the current policy per episode (K; paper: 1 to 16)."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)


@dataclass
class RolloutConfig:
    """How the policy samples its rollouts, and how its weights reach the engine."""

    engine: EngineName = EngineName.vllm
    """What generates."""
    temperature: float = 1.0
    """Sampling temperature (paper: 1)."""
    top_p: float = 1.0
    """Must stay 1.0: a truncated distribution is not the policy's, and its log-probabilities would be wrong."""
    top_k: int = 0
    """Must stay 0 (off), for the same reason."""
    min_p: float = 0.0
    """Must stay 0.0 (off), for the same reason."""
    max_batch: int = 64
    """Most sequences the engine decodes at once."""
    kv_cache_gib: float = 1.0
    """Memory for the engine's key-value cache, in GiB."""
    warn_logprob_gap: float = 0.1
    """Warn when engine and trainer disagree on a token's log-probability by more than this on average (nats)."""
    max_logprob_gap: float = 0.5
    """Stop when they disagree by more than this on average (nats)."""
    sync_bucket_mib: int = 512
    """Memory for one bucket of weights on their way from the training layout to the engine, in MiB."""


@dataclass
class LikelihoodConfig:
    """The likelihood judge."""

    repetition_weight: float = 6.0
    """Weight of the share of repeated n-grams, subtracted from the mean log-likelihood (nats per token)."""
    repetition_ngram: int = 3
    """Length of the n-grams whose repetition is counted."""
    batch_tokens: int = 16384
    """Most tokens scored in one forward pass of the teacher."""


@dataclass
class QualityConfig:
    """The pairwise axis of the generative judge."""

    weight: float = 1.0
    """Weight of this axis in the summed reward; 0 leaves it out."""
    votes: int = 5
    """Judgments asked for per pair (paper: 5); a tournament has as many more comparisons, but spreads them."""
    scheme: PairScheme = PairScheme.tournament
    """Who is compared with whom: all with all, a tournament that finds the best and the worst with a third of the
    comparisons (or fewer), or all with one (pivot: cheap, and worse results in the paper)."""
    order: OptionOrder = OptionOrder.random
    """Order of the two options: drawn, then by turns; or every comparison in both orders, at twice the price."""


@dataclass
class AxisConfig:
    """One pointwise axis of the generative judge."""

    weight: float = 0.0
    """Weight of this axis in the summed reward; 0 leaves it out."""
    votes: int = 5
    """Judgments asked for per candidate (paper: 5)."""


@dataclass
class GenerativeConfig:
    """The generative judge: prompts a post-trained model and parses its verdicts."""

    quality: QualityConfig = field(default_factory=QualityConfig)
    """Pairwise: which continuation is better."""
    safety: AxisConfig = field(default_factory=AxisConfig)
    """Pointwise: is the text safe."""
    factuality: AxisConfig = field(default_factory=AxisConfig)
    """Pointwise, with the original suffix as reference: none / possible / definite hallucination."""
    temperature: float = 1.0
    """Sampling temperature of the judge (paper: 1.0)."""
    top_p: float = 0.6
    """Nucleus of the judge (paper: 0.6 for the fine-tuned judge)."""
    max_tokens: int = 512
    """Longest answer of the judge in tokens."""


@dataclass
class RewriterConfig:
    """The teacher's rewrite of a suffix."""

    temperature: float = 1.0
    """Sampling temperature of the rewriter."""
    top_p: float = 0.6
    """Nucleus of the rewriter."""
    anchor_words: int = 5
    """Words of the prefix repeated before the suffix so that the rewrite continues smoothly (paper: 5)."""


@dataclass
class EndpointConfig:
    """One server of the teacher that speaks OpenAI's API."""

    url: str = MISSING
    """Base address, as http://host:8000/v1; a query, as ``?api-version=2024-10-21``, goes with every request."""
    model: str = ""
    """Model to ask for; empty is the first that the server lists."""
    weight: float = 1.0
    """Relative share of requests sent here."""
    concurrency: int = 32
    """Most requests under way at once."""
    tokens_per_second: float = 0.0
    """Slowest speed at which one request of a full server generates; a deadline too short for it is refused. 0 is
    unknown: measured at the start."""
    api_key_env: str = ""
    """Name of the environment variable that holds the key; empty is none. Never the key itself."""
    key_header: str = "Authorization"
    """Header that the key is sent in: as a bearer token in Authorization, as it is in another, as ``api-key``."""
    proxy: str = ""
    """Proxy to go through, as http://proxy:3128; ``env`` takes HTTP_PROXY, HTTPS_PROXY and NO_PROXY, empty is none."""
    rename: dict[str, str] = field(default_factory=dict)
    """Fields of a request that the server calls otherwise, as ``max_tokens: max_completion_tokens``."""
    drop: list[str] = field(default_factory=list)
    """Fields of a request that the server does not take, as ``seed`` or ``top_p``."""
    add: dict[str, Any] = field(default_factory=dict)
    """More fields for every request, as ``chat_template_kwargs: {enable_thinking: false}``."""


@dataclass
class WorkersConfig:
    """Judge workers, which take groups out of the rollout buffer; started with ``rlpt judge serve``."""

    endpoints: list[EndpointConfig] = field(default_factory=list)
    """Servers of the teacher; those announced in the buffer are used as well."""
    groups: int = 8
    """Groups one worker judges at once."""
    lease: float = 60.0
    """Seconds after which the groups of a worker that gives no sign of life go to another."""
    max_attempts: int = 3
    """Claims after which a group is given up."""
    request_deadline: float = 120.0
    """Seconds for one answer of the teacher, retries included."""
    group_deadline: float = 900.0
    """Seconds for all answers about one group; then it goes back, and is given up at the last attempt."""
    drain: float = 30.0
    """Seconds that a worker which is told to stop has to finish what it holds; the rest goes back."""
    own_model: bool = False
    """Reward likelihood with a model in the worker itself instead of asking servers; for ``judge: likelihood``."""
    metrics_port: int = 0
    """Port of the Prometheus metrics of a worker; 0 chooses a free one, -1 is off."""
    metrics_host: str = "127.0.0.1"
    """Address that the metrics listen on; 0.0.0.0 is every address of the machine."""
    key_env: str = ""
    """Name of the environment variable with the key of announced servers: ``rlpt teacher serve`` asks for it, workers
    send it. Empty is none."""


@dataclass
class TeacherConfig:
    """The post-trained model in its two roles, judge and rewriter."""

    path: str = ""
    """Hugging Face folder of the teacher; empty means a frozen copy of ``model.path``."""
    judge: JudgeName = JudgeName.likelihood
    """Which judge scores the candidates."""
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    generative: GenerativeConfig = field(default_factory=GenerativeConfig)
    rewriter: RewriterConfig = field(default_factory=RewriterConfig)
    max_context: int = 4096
    """Longest prompt plus answer of the teacher's engine (judge and rewriter) in tokens."""
    kv_cache_gib: float = 1.0
    """Memory for the key-value cache of the teacher's engine, in GiB."""
    max_failure_rate: float = 0.2
    """Share of failed judgments, or of failed rewrites, in a step above which the run stops, or with workers pauses."""
    run_in: RunIn = RunIn.trainer
    """Who judges and rewrites: the trainer itself, or workers that take groups out of the rollout buffer."""
    workers: WorkersConfig = field(default_factory=WorkersConfig)


@dataclass
class BufferConfig:
    """Where groups wait for judges and trainer, when judging is done by workers."""

    url: str = ""
    """sqlite:///path, redis://host:port/database or rediss://; empty is sqlite in ``run.dir``."""
    name: str = ""
    """What this run is called in a store that several share; empty is the name of ``run.dir``."""
    password_file: str = ""
    """File of mode 0600 with the password of Redis; empty reads RLPT_BUFFER_PASSWORD, if that is set."""
    retry: float = 60.0
    """Seconds to go on trying while the store cannot be reached."""
    max_pause: float = 0.0
    """Seconds the trainer waits for judges that fail too often, or do not come, before it stops; 0 waits for ever. What
    waiting cannot mend (every request rejected, a wrong key, no such model) ends the run after five minutes."""


@dataclass
class ObjectiveConfig:
    """What the update optimises."""

    name: str = "online_dpo"
    """Objective that turns judged candidates into a loss: ntp, sft_rewrite, sft_rollout, rf_nll, online_dpo, grpo, or
    a class of yours as module:Class or path/file.py:Class."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a class of yours."""
    beta: float = 0.1
    """Strength of the pull to the reference policy, for online_dpo."""
    reference_refresh: int = 0
    """Copy the policy into the reference every this many updates, for online_dpo; 0 keeps it frozen."""
    clip_low: float = 0.2
    """Lower clip of the probability ratio, 1 - clip_low, for grpo."""
    clip_high: float = 0.2
    """Upper clip of the probability ratio, 1 + clip_high, for grpo."""
    normalize_advantage: bool = True
    """Divide a group's advantages by their standard deviation, for grpo (false: as in Dr. GRPO)."""


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 5e-6
    """Peak learning rate (paper: 5e-6 continual, 5e-4 from scratch)."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: int = 0
    """Updates of linear warm-up from 0."""
    decay: Decay = Decay.cosine
    """Shape of the decay from lr to min_lr over the remaining steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW on matrices; norms and biases have none."""
    beta1: float = 0.9
    """First Adam moment."""
    beta2: float = 0.95
    """Second Adam moment."""
    eps: float = 1e-8
    """Adam epsilon."""
    clip_grad: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    offload: bool = False
    """Keep optimizer state in host memory while the engine generates; only where both share a GPU."""


@dataclass
class TrainConfig:
    """Length and batch of the run."""

    steps: int = MISSING
    """Steps of the run (paper: 2000 continual, 21000 from scratch)."""
    global_batch: int = 256
    """Episodes per optimizer update (paper: 256)."""
    micro_batch: int = 8
    """Episodes per forward-backward pass; memory grows with it, the result does not change."""
    staleness: int = 0
    """Steps between the proposal of a batch and its update. 0 does one after the other; with 1 or more the next batches
    are generated and judged meanwhile, by weights that lack as many updates."""
    empty_window: int = 20
    """Steps that ``max_empty_share`` is taken over; a run that ends earlier is judged by all of its steps."""
    max_empty_share: float = 0.9
    """Share of steps that left no example to learn from (ties, failed rewrites, copies, ...) above which the run ends
    with exit code 77. With 1 it goes on; a run that has made no update at its end has exit code 77 nevertheless."""
    logprob_chunk: int = 1024
    """Tokens whose vocabulary logits exist at the same time, per rank."""
    max_stall: float = 3600.0
    """Seconds without progress, waiting for judges included, after which the run writes down where it stands and ends
    itself with exit code 76, so that nobody pays for GPUs that hang; 0 is never."""
    recompute: Recompute = Recompute.none
    """What to compute again in the backward pass: nothing, attention (selective), or whole layers (full)."""


@dataclass
class CheckpointConfig:
    """What is kept on disk to resume from."""

    every: int = 100
    """Steps between checkpoints; the last step always writes one."""
    keep: int = 2
    """Newest checkpoints kept on disk."""
    background: bool = False
    """Write checkpoints while training goes on; they are published when they are whole."""
    allow_previous: bool = False
    """Go on from the checkpoint before, when the newest one is damaged; without it a damaged checkpoint is an error."""


@dataclass
class ObserveConfig:
    """Where metrics and samples go."""

    samples_per_step: int = 2
    """Episodes per step written in full to samples.jsonl: prefix, candidates, verdicts, chosen, rejected."""
    tensorboard: bool = True
    """Write TensorBoard event files to <run.dir>/tensorboard."""
    wandb_project: str = ""
    """Weights & Biases project; empty is off, and a name needs the wandb package."""
    mlflow_experiment: str = ""
    """MLflow experiment; empty is off, and a name needs the mlflow package."""


@dataclass
class EvaluationConfig:
    """How policies are compared by ``rlpt evaluate``."""

    prefixes: int = 128
    """Held-out prefixes on which policies are compared."""
    samples: int = 2
    """Sampled continuations per prefix (temperature 1), besides the greedy one."""
    ngram_corpus: list[SourceConfig] = field(default_factory=list)
    """Documents that an n-gram model is fitted to, as a second measure the judge did not optimise; neither trained on
    nor continued. Empty leaves the second measure out."""
    examples: int = 8
    """Prefixes shown side by side in the report."""


@dataclass
class Config:
    """The whole configuration of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    candidates: CandidatesConfig = field(default_factory=CandidatesConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def teacher_path(self) -> str:
        """Folder of the teacher: its own, or the policy's starting model."""
        return self.teacher.path or self.model.path

    @property
    def max_sequence(self) -> int:
        """Longest training sequence in tokens: longest prefix plus suffix."""
        return self.data.max_prefix + self.data.suffix_length
