"""Options of the teacher: its judge and rewriter, judge workers, and the rollout buffer between workers and trainer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from omegaconf import MISSING

from megatron_rlpt.config.choices import AnswerForm, Dtype, OptionOrder, PairScheme, PromptLength, RunIn
from megatron_rlpt.config.fields import option, section


@dataclass
class LikelihoodConfig:
    """The likelihood judge."""

    repetition_weight: float = option(
        6.0, "Weight of the share of repeated n-grams, subtracted from the mean log-likelihood.",
        unit="nats", at_least=0,
    )  # fmt: skip
    repetition_ngram: int = option(3, "Length of the n-grams whose repetition counts.", unit="tokens", at_least=1)
    batch_tokens: int = option(
        16384, "Maximum tokens scored in one forward pass of the teacher.", unit="tokens", at_least=1
    )


@dataclass
class QualityConfig:
    """The pairwise axis of the generative judge: which continuation is better."""

    weight: float = option(1.0, "Weight of this axis in the reward; 0 turns it off.", at_least=0)
    votes: int = option(
        5, "Votes per pair; a tournament has the same number per comparison, but spreads them over rounds.",
        at_least=1, paper="5",
    )  # fmt: skip
    scheme: PairScheme = option(
        PairScheme.tournament,
        "Which candidates are compared: all pairs (round_robin), enough pairs to find the best and the worst, about a "
        "third of all (tournament), fewer with less care (swiss, elimination), or every candidate with one (pivot: "
        "cheap, worse results in the paper).",
    )
    order: OptionOrder = option(
        OptionOrder.random,
        "Order of the two options in a prompt: the first is drawn and then alternates (random), or every comparison is "
        "made in both orders at twice the price (both).",
    )


@dataclass
class AxisConfig:
    """A pointwise axis of the generative judge."""

    weight: float = option(0.0, "Weight of this axis in the reward; 0 turns it off.", at_least=0)
    votes: int = option(5, "Votes per candidate.", at_least=1, paper="5")


@dataclass
class GenerativeConfig:
    """The generative judge: prompts a post-trained model and parses its verdicts."""

    quality: QualityConfig = section(QualityConfig, "Pairwise: which continuation is better.")
    safety: AxisConfig = section(AxisConfig, "Pointwise: whether the text is safe.")
    factuality: AxisConfig = section(
        AxisConfig, "Pointwise, with the original suffix as reference: no, possible or definite hallucination."
    )
    answer: AnswerForm = option(
        AnswerForm.reasoned,
        "How the judge answers: with reasons and then its verdict (reasoned), or with one word whose probabilities are "
        "the verdict (direct; needs a judge trained for it; one request per candidate or order of a pair, whatever "
        "votes, order and sampling are).",
        paper="reasoned",
    )
    prompt: PromptLength = option(
        PromptLength.full,
        "How the judge is asked: with instructions (full), or with a few tokens around the texts (brief; needs a judge "
        "trained with these prompts).",
    )
    temperature: float = option(1.0, "Sampling temperature of the judge.", at_least=0, paper="1.0")
    top_p: float = option(0.6, "Nucleus sampling of the judge.", above=0, at_most=1, paper="0.6 (fine-tuned judge)")
    max_tokens: int = option(512, "Maximum length of an answer of the judge.", unit="tokens", at_least=1)

    def asked(self) -> GenerativeConfig:
        """Return these settings as requests follow them: a direct answer has one vote, both orders and one token."""
        if self.answer is not AnswerForm.direct:
            return self
        return replace(
            self,
            quality=replace(self.quality, votes=1, order=OptionOrder.both),
            safety=replace(self.safety, votes=1),
            factuality=replace(self.factuality, votes=1),
            temperature=0.0,
            top_p=1.0,
            max_tokens=1,
        )


@dataclass
class EndpointConfig:
    """A teacher server that speaks OpenAI's API."""

    url: str = option(
        MISSING,
        "Base address, such as http://host:8000/v1; a query, such as ?api-version=2024-10-21, is sent with every "
        "request.",
    )
    model: str = option("", "Model to request; empty is the first that the server lists.")
    weight: float = option(1.0, "Relative share of requests sent to this server.", above=0)
    concurrency: int = option(32, "Maximum concurrent requests of one process.", unit="requests", at_least=1)
    tokens_per_second: float = option(
        0.0, "Slowest generation of one request on a full server; a deadline that is too short for it is refused. With "
        "0 it is measured at the start.",
        unit="tokens", at_least=0, allowed="0 (unknown) or more",
    )  # fmt: skip
    api_key_env: str = option("", "Name of the environment variable with the key, never the key itself; empty is none.")
    key_header: str = option(
        "Authorization", "Header that carries the key: as a bearer token in Authorization, verbatim in any other."
    )
    proxy: str = option(
        "",
        "Proxy, such as http://proxy:3128; env uses HTTP_PROXY, HTTPS_PROXY and NO_PROXY; empty connects directly.",
    )
    rename: dict[str, str] = section(
        dict, "Request fields that the server calls something else, such as max_tokens: max_completion_tokens."
    )
    drop: list[str] = section(list, "Request fields that the server does not accept, such as seed or top_p.")
    add: dict[str, Any] = section(
        dict, "Fields added to every request, such as chat_template_kwargs: {enable_thinking: false}."
    )


@dataclass
class RewriterConfig:
    """The rewrite of a suffix."""

    name: str = option(
        "prompted",
        "Rewriter: prompted, which asks the teacher, or your own class as module:Class or path/file.py:Class.",
    )
    options: dict[str, Any] = section(dict, "Keyword arguments of your own class.")
    prompt: PromptLength = option(
        PromptLength.full,
        "How the prompted rewriter is asked: with instructions (full), or with a few tokens around the texts (brief; "
        "needs a rewriter trained with this prompt).",
    )
    path: str = option(
        "",
        "Hugging Face folder of its model, or of a LoRA adapter; empty is the judge's (teacher.path), or what its "
        "endpoints serve.",
    )
    max_context: int = option(
        0, "Maximum length of prompt plus answer in the engine of its own model.",
        unit="tokens", at_least=0, zero="as teacher.max_context",
    )  # fmt: skip
    endpoints: list[EndpointConfig] = section(
        list,
        "Servers of its own model, for judge workers; announced ones are used as well. Empty: those of the judge, if "
        "both are one model.",
    )
    temperature: float = option(1.0, "Sampling temperature of the rewriter.", at_least=0)
    top_p: float = option(0.6, "Nucleus sampling of the rewriter.", above=0, at_most=1)
    anchor_words: int = option(
        5, "Words of the prefix repeated before the suffix so that the rewrite continues smoothly.",
        unit="words", at_least=0, paper="5",
    )  # fmt: skip


@dataclass
class WorkersConfig:
    """Judge workers, which claim groups from the rollout buffer; started with ``rlpt judge serve``."""

    endpoints: list[EndpointConfig] = section(
        list,
        "Servers of the teacher, or of its judge if teacher.rewriter has a model of its own; servers announced in the "
        "rollout buffer are used as well.",
    )
    groups: int = option(8, "Groups that one worker judges concurrently.", unit="groups", at_least=1)
    lease: float = option(
        60.0, "Time without a heartbeat after which the groups of a worker go to another one.", unit="seconds", above=0
    )
    max_attempts: int = option(3, "Claims after which a group is given up.", at_least=1)
    request_deadline: float = option(
        120.0, "Time for one answer of the teacher, retries included.", unit="seconds", above=0
    )
    group_deadline: float = option(
        900.0, "Time for all answers about one group; the group is then returned, or given up at the last attempt.",
        unit="seconds", above=0,
    )  # fmt: skip
    drain: float = option(
        30.0, "Time for a stopping worker to finish its groups; unfinished groups are returned.",
        unit="seconds", at_least=0,
    )  # fmt: skip
    own_model: bool = option(
        False, "Load the teacher in the worker instead of using servers; for teacher.judge=likelihood."
    )
    metrics_port: int = option(
        0, "Port of a worker's Prometheus metrics; 0 picks a free one, -1 turns them off.",
        at_least=-1, at_most=65535, allowed="a port, 0 (a free one) or -1 (off)",
    )  # fmt: skip
    metrics_host: str = option(
        "127.0.0.1", "Address that the metrics listen on; 0.0.0.0 is every address of the machine."
    )
    key_env: str = option(
        "",
        "Name of the environment variable with the key of announced servers: rlpt teacher serve requires it, workers "
        "send it; empty is none.",
    )


@dataclass
class TeacherConfig:
    """The post-trained model in its two roles, judge and rewriter; the rewriter may have another."""

    path: str = option(
        "",
        "Hugging Face folder of the teacher, or of a LoRA adapter of one: the judge's, and the rewriter's unless "
        "teacher.rewriter names another. Empty is a frozen copy of model.path.",
    )
    dtype: Dtype = option(
        Dtype.auto,
        "Precision of a teacher that this package loads or serves; bf16 leaves vLLM the precision of the checkpoint. "
        "auto as in model.dtype.",
    )
    judge: str = option(
        "likelihood",
        "Judge that rewards the candidates: likelihood, generative, right_verdict (for answers to prompts whose labels "
        "know the verdict), good_rewrite (for the rewrites of a rewriter in training), true_continuation (for thoughts "
        "with a predicted suffix; experimental), or your own class (a judge or a reward) as module:Class or "
        "path/file.py:Class.",
    )
    options: dict[str, Any] = section(dict, "Keyword arguments of your own class.")
    likelihood: LikelihoodConfig = section(LikelihoodConfig)
    generative: GenerativeConfig = section(GenerativeConfig)
    rewriter: RewriterConfig = section(RewriterConfig)
    max_context: int = option(
        4096, "Maximum length of prompt plus answer in the teacher's engine.", unit="tokens", at_least=1
    )
    kv_cache_gib: float = option(1.0, "Key-value cache of the teacher's engine.", unit="GiB", above=0)
    max_failure_rate: float = option(
        0.2,
        "Share of failed judgments, or of failed rewrites, in a step above which the run stops or, with workers, "
        "pauses.",
        at_least=0, at_most=1,
    )  # fmt: skip
    min_accuracy: float = option(
        0.75,
        "Accuracy of a prompted judge on any of its axes, as rlpt judge calibrate --save measured it, below which rlpt "
        "plan and rlpt launch warn.",
        at_least=0, at_most=1, zero="never",
    )  # fmt: skip
    run_in: RunIn = option(
        RunIn.trainer, "Who judges and rewrites: the trainer, or workers that claim groups from the rollout buffer."
    )
    workers: WorkersConfig = section(WorkersConfig)


@dataclass
class JudgeConfig:
    """A judge of ``rlpt evaluate`` besides the one that trained the policy."""

    name: str = option(MISSING, "Name in tables: letters, digits, dots, hyphens and underscores.")
    judge: str = option(
        MISSING,
        "likelihood, generative, or your own class (a judge or a reward) as module:Class or path/file.py:Class.",
    )
    measures: list[str] = section(
        list,
        "What it decides: quality, coherence, safety, factuality. Empty is all of them for a generative judge and "
        "quality for any other, whose rewards are compared.",
    )
    path: str = option("", "Hugging Face folder of its model; empty is teacher.path, or what the endpoints serve.")
    options: dict[str, Any] = section(dict, "Keyword arguments of your own class.")
    likelihood: LikelihoodConfig = section(LikelihoodConfig)
    generative: GenerativeConfig = section(GenerativeConfig)
    endpoints: list[EndpointConfig] = section(
        list,
        "Servers of its model. Without any and without a path it asks the servers of teacher.workers, if there are "
        "some; else the model is loaded by rlpt evaluate.",
    )


@dataclass
class BufferConfig:
    """The rollout buffer, where groups wait for judge workers and for the trainer."""

    url: str = option(
        "", "sqlite:///path, redis://host:port/database or rediss://...; empty is an SQLite file in run.dir."
    )
    name: str = option("", "Name of the run in a store that several runs share; empty is the name of run.dir.")
    password_file: str = option(
        "", "File of mode 0600 with the password of Redis; empty reads RLPT_BUFFER_PASSWORD if it is set."
    )
    retry: float = option(60.0, "Time to keep trying while the store is unreachable.", unit="seconds", at_least=0)
    max_pause: float = option(
        0.0,
        "Time the trainer waits for judges that are absent or fail too often before it stops. What waiting cannot fix "
        "(every request rejected, a wrong key, no such model) ends the run after five minutes.",
        unit="seconds", at_least=0, zero="forever",
    )  # fmt: skip
