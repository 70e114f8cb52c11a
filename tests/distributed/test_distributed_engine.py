"""Engines of several ranks as one, and their GPU memory: three real ranks, with fakes of all that needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from worlds import error_of, on_every_rank, ranks_of_world, run_world

from megatron_rlpt.errors import EngineError, EngineLostError, ModelError
from megatron_rlpt.rollout.distributed_engine import DistributedEngine
from megatron_rlpt.rollout.engine import Continuation, RolloutPrompt
from megatron_rlpt.trainer.gpu_memory import GpuMemory

SIZE = 3
GROUPS = ((0,), (2,))
PROMPTS = [RolloutPrompt((episode,), seed) for episode in range(6) for seed in range(3)]


@dataclass
class Engine:
    """An engine that answers with its rank and the prompt, and accepts weights until it is set to fail."""

    rank: int
    asleep: bool = False
    fails: Exception | None = None
    taken: list[str] = field(default_factory=list)
    restarts: int = 0

    @property
    def is_lost(self) -> bool:
        return isinstance(self.fails, EngineLostError)

    def restart(self, error: EngineLostError) -> None:
        if self.restarts == 2:
            raise error
        self.restarts += 1
        self.fails = None
        self.taken.clear()

    def generate(self, prompts: list[RolloutPrompt], max_tokens: int, version: int) -> list[Continuation]:
        if self.fails:
            raise self.fails
        return [Continuation((self.rank, *prompt.prefix, prompt.seed), (), "length") for prompt in prompts]

    def update_weights(self, weights: Any, version: int) -> None:
        for name, _ in weights:
            self.taken.append(name)
            if self.fails:
                raise self.fails


@dataclass
class Gpu:
    """The GPU of a rank, with a sleeping engine and a given number of free bytes."""

    free: int
    gives_back: int = 100
    asleep: bool = False
    sleep_frees_bytes: int = 100

    def sleep(self) -> None:
        self.asleep = True
        self.free += self.gives_back


def everything() -> dict[str, Any]:
    ranks = ranks_of_world()
    rank = ranks.rank

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(4):
            torch.distributed.all_reduce(torch.ones(1))
            yield f"w{number}", torch.zeros(1)

    def refuse_on_2() -> Any:
        if rank == 2:
            raise ModelError("no such model")
        return Engine(rank)

    found: dict[str, Any] = {"start": error_of(lambda: DistributedEngine(refuse_on_2, GROUPS, ranks))}
    engine = DistributedEngine(lambda: Engine(rank), GROUPS, ranks)  # type: ignore[arg-type,return-value]
    own: Any = engine.own
    found["answers"] = [answer.tokens for answer in engine.generate(PROMPTS, 1, 0)]
    for kind, failure in (("ours", EngineError("asleep")), ("other", RuntimeError("out of memory\nhere"))):
        if rank == 2:
            own.fails = failure
        found[f"generate, {kind}"] = error_of(lambda: engine.generate(PROMPTS, 1, 0))
        found[f"update, {kind}"] = error_of(lambda: engine.update_weights(weights(), 1))
        found[f"version, {kind}"] = engine.version
    if own:
        own.fails = None
        own.taken.clear()
    engine.update_weights(weights(), 2)
    found["taken"], found["version"] = own and own.taken, engine.version

    def gpu_memory(gpu: Gpu | None) -> tuple[str, str]:
        def act() -> None:
            with GpuMemory(gpu, None, ranks, lambda: gpu.free if gpu else 0).training():
                found.setdefault("updates", []).append(name)

        return error_of(act)

    for name, short in (
        ("keeps its memory", Gpu(200, gives_back=10)),
        ("cannot wake", Gpu(-50)),
        ("shares nothing", None),
    ):
        found[name] = gpu_memory(short if rank == 1 else Gpu(200))
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_world(SIZE, everything)


def test_every_rank_gets_all_answers_in_order_from_engines_that_keep_an_episode_together(found):
    expected = [(0 if prompt.prefix[0] < 3 else 2, *prompt.prefix, prompt.seed) for prompt in PROMPTS]
    assert on_every_rank(found, "answers") == expected


def test_an_engine_that_does_not_start_is_the_same_error_everywhere(found):
    assert on_every_rank(found, "start") == ("ModelError", "rank 2: no such model")


@pytest.mark.parametrize("act", ["generate", "update"])
def test_an_engine_that_fails_is_the_same_error_everywhere(found, act):
    assert on_every_rank(found, f"{act}, ours") == ("EngineError", "rank 2: asleep")
    line = "rank 2: RuntimeError: out of memory; look at the log of that rank"
    assert on_every_rank(found, f"{act}, other") == ("TrainingError", line)


def test_after_an_update_that_failed_on_one_rank_no_rank_has_a_version_until_one_succeeds(found):
    assert on_every_rank(found, "version, ours") is None
    assert on_every_rank(found, "version, other") is None
    assert on_every_rank(found, "version") == 2
    assert [one["taken"] for one in found] == [["w0", "w1", "w2", "w3"], None, ["w0", "w1", "w2", "w3"]]


def test_a_gpu_with_too_little_memory_stops_every_rank_and_is_named(found):
    kind, line = on_every_rank(found, "keeps its memory")
    assert (kind, line.startswith("rank 1: the sleeping rollout engine gave back")) == ("EngineError", True)
    kind, line = on_every_rank(found, "cannot wake")
    assert (kind, line.startswith("rank 1: the rollout engine needs")) == ("EngineError", True)
    assert on_every_rank(found, "shares nothing") == ("none", "")
    assert on_every_rank(found, "updates") == ["cannot wake", "shares nothing"]


def shared() -> dict[str, Any]:
    """Ranks 0 and 1 share an engine, and rank 2 has one."""
    ranks = ranks_of_world()

    class Shared(Engine):
        def generate(self, prompts: list[RolloutPrompt], max_tokens: int, version: int) -> list[Continuation]:
            return [replace(one, tokens=one.tokens[1:]) for one in super().generate(prompts, max_tokens, version)]

    own = Shared(ranks.rank)
    engine = DistributedEngine(lambda: own, ((0, 1), (2,)), ranks)  # type: ignore[arg-type,return-value]
    found: dict[str, Any] = {"answers": [answer.tokens for answer in engine.generate(PROMPTS, 1, 0)]}
    if ranks.rank == 1:
        own.generate = lambda *_: [Continuation((7,), (), "length")] * 9  # type: ignore[method-assign]
    found["different"] = error_of(lambda: engine.generate(PROMPTS, 1, 0))
    if ranks.rank == 1:
        own.fails = RuntimeError("out of memory\nhere")
        del own.generate
        found["failure"] = error_of(lambda: engine.generate(PROMPTS, 1, 0))
    return found


def test_ranks_that_share_an_engine_give_each_answer_once_and_have_to_agree():
    found = run_world(SIZE, shared)
    assert on_every_rank(found, "answers") == [(*prompt.prefix, prompt.seed) for prompt in PROMPTS]
    kind, line = on_every_rank(found, "different")
    assert (kind, line.split(";")[0]) == (
        "EngineError",
        "ranks 0 and 1 share a rollout engine and got different tokens from it",
    )
    # It does not wait for ranks that wait for it inside of the engine.
    kind, line = found[1]["failure"]
    assert (kind, line.split(";")[0]) == ("LostContactError", "rank 1: out of memory")


def lose_engines() -> dict[str, Any]:
    """The engine of rank 2 ends while it generates, while it gets weights, and once too often."""
    ranks = ranks_of_world()
    sent = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        sent.append(len(sent))
        for number in range(2):
            torch.distributed.all_reduce(torch.ones(1))
            yield f"w{number}", torch.zeros(1)

    class Policy:
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return weights()

    engine = DistributedEngine(lambda: Engine(ranks.rank), GROUPS, ranks, resend=Policy)  # type: ignore[arg-type,return-value]
    own: Any = engine.own

    def lose() -> None:
        if ranks.rank == 2:
            own.fails = EngineLostError("gone")

    found: dict[str, Any] = {"before": engine.generate(PROMPTS, 1, 0), "sent": sent}
    lose()
    found["lost while generating"] = engine.generate(PROMPTS, 1, 0)
    lose()
    engine.update_weights(Policy(), 1)  # type: ignore[arg-type]
    found["restarts"] = own and own.restarts
    found["taken"], found["version"] = own and own.taken, engine.version
    lose()
    found["once too often"] = error_of(lambda: engine.generate(PROMPTS, 1, 1))
    # The policy may be changing while the engines generate.
    engine = DistributedEngine(lambda: Engine(ranks.rank), GROUPS, ranks)  # type: ignore[arg-type,return-value]
    own = engine.own
    lose()
    found["without weights"] = error_of(lambda: engine.generate(PROMPTS, 1, 1))
    return found


def test_an_engine_on_a_gpu_that_is_lost_gets_the_policys_weights_and_generates_again():
    found = run_world(SIZE, lose_engines)
    assert on_every_rank(found, "lost while generating") == on_every_rank(found, "before")
    assert [one["restarts"] for one in found] == [0, None, 2]
    assert [one["taken"] for one in found] == [["w0", "w1"] * 3, None, ["w0", "w1"]]
    assert on_every_rank(found, "sent") == [0, 1, 2], "once for generating, twice for the update that failed"
    assert on_every_rank(found, "version") == 1
    assert on_every_rank(found, "once too often") == ("EngineLostError", "rank 2: gone")
    assert on_every_rank(found, "without weights") == ("EngineLostError", "rank 2: gone")
