"""The order of operations in the loop, with fakes of everything heavy that write to one journal."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from text_tokens import NUMBERS

from megatron_rlpt.config import (
    CandidatesConfig,
    CheckpointConfig,
    Config,
    EvaluationConfig,
    RolloutConfig,
    TeacherConfig,
    TrainConfig,
)
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import EngineError, NothingLearntError, RunStopped, TeacherError, TrainingError
from megatron_rlpt.objectives import Example, Selection
from megatron_rlpt.objectives.nll import NextToken
from megatron_rlpt.objectives.online_dpo import OnlineDpo
from megatron_rlpt.observe import StageTimer
from megatron_rlpt.rollout.engine import Continuation, RolloutPrompt
from megatron_rlpt.trainer.candidates import CandidateGenerator
from megatron_rlpt.trainer.curriculum import Curriculum
from megatron_rlpt.trainer.episode_feed import EpisodeFeed
from megatron_rlpt.trainer.gpu_memory import GpuMemory
from megatron_rlpt.trainer.judging import InTrainerJudging
from megatron_rlpt.trainer.learning import Learning
from megatron_rlpt.trainer.pipeline import Pipeline
from megatron_rlpt.trainer.stop import STOP_FILE, StopRequest
from megatron_rlpt.trainer.train import Training, train
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward

Journal = list[tuple[Any, ...]]


class CountingStream:
    def __init__(self) -> None:
        self.taken = 0

    def take(self, count: int) -> list[Episode]:
        first, self.taken = self.taken, self.taken + count
        return [Episode(f"e{index}", (index, 1), (9, 9), "c", "d", 2) for index in range(first, self.taken)]

    def load_state_dict(self, state: int) -> None:
        self.taken = state

    def state_dict(self) -> int:
        return self.taken

    def metrics(self) -> dict[str, float]:
        return {"data/read": self.taken}


class StrictEngine:
    """An engine that refuses to generate with any version but its own."""

    def __init__(self, journal: Journal) -> None:
        self.version: int | None = 0
        self._journal = journal

    def generate(self, prompts: Sequence[RolloutPrompt], max_tokens: int, version: int) -> list[Continuation]:
        if version != self.version:
            raise EngineError(f"asked for version {version}, holding {self.version}")
        self._journal.append(("generate", version))
        return [Continuation((prompt.seed % 97, 3), (-1.0, -1.0), "length") for prompt in prompts]

    def update_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        self._journal.append(("sync", version, dict(weights)))
        self.version = version


class CountingPolicy:
    """A policy whose weights are its version."""

    def __init__(self, journal: Journal, gap: float = 0.0) -> None:
        self.version = 0
        self._journal, self._gap = journal, gap

    def update(self, examples: Sequence[Example]) -> dict[str, float]:
        self._journal.append(("update", self.version, [example.episode.id for example in examples]))
        self.version += 1
        return {"loss": 1.0, "logprob_gap": self._gap}

    def sync_metrics(self) -> dict[str, float]:
        return {}

    def weights(self) -> Iterable[tuple[str, int]]:
        yield "version", self.version


class ScriptedJudge:
    """Rewards candidates with 0, 1, 2…; on the given steps all equally, or with the given number failed."""

    def __init__(self, ties: set[int] = frozenset(), failures: dict[int, int] | None = None) -> None:
        self._ties, self._failures, self._step = ties, failures or {}, -1

    def judge(self, groups: Sequence[Group]) -> list[Group]:
        self._step += 1
        failing = self._failures.get(self._step, 0)
        return [Group(group.episode, group.candidates, self._rewards(group, failing)) for group in groups]

    def _rewards(self, group: Group, failing: int) -> tuple[Reward | Failed, ...]:
        return tuple(
            Failed("no verdict")
            if index < failing
            else Reward(0.0 if self._step in self._ties else float(index), "scripted", "1")
            for index in range(len(group.candidates))
        )


class Recorder:
    """Observer and saver."""

    def __init__(self, journal: Journal, staleness: int = 0) -> None:
        self.metrics: list[dict[str, float]] = []
        self._journal, self._oldest = journal, staleness + 1

    def step(self, step: int, version: int, metrics: dict[str, float], groups: Sequence[Group], selection: Selection):
        self.metrics.append(metrics)
        self._journal.append(("record", step, version))
        assert all(version - self._oldest <= candidate.policy_version <= version for candidate in rollouts(groups))
        assert len(selection.examples) + len(selection.skipped) == len(groups)

    def save(self, done: int) -> None:
        self._journal.append(("save", done))

    def poll(self) -> None:
        """Nothing is written in the background."""

    def finish(self) -> None:
        self._journal.append(("finish",))


def rollouts(groups: Sequence[Group]) -> list[Candidate]:
    return [candidate for group in groups for candidate in group.candidates if candidate.policy_version is not None]


def training(
    steps: int = 3,
    gap: float = 0.0,
    every: int = 100,
    done: int = 0,
    staleness: int = 0,
    background: bool = False,
    objective: Any = None,
    window: int = 20,
    evaluation: Any = None,
    **judge,
) -> tuple[Training, Journal]:
    journal: Journal = []
    engine = StrictEngine(journal) if objective is None else None
    recorder = Recorder(journal, staleness)
    config = Config(
        train=TrainConfig(steps=steps, global_batch=2, micro_batch=2, staleness=staleness, empty_window=window),
        candidates=CandidatesConfig(rollouts=2 if engine else 0),
        rollout=RolloutConfig(max_logprob_gap=0.5),
        teacher=TeacherConfig(max_failure_rate=0.4),
        checkpoint=CheckpointConfig(every=every),
        evaluation=EvaluationConfig(every=2 if evaluation else 0),
    )
    proposer = CandidateGenerator(
        text=NUMBERS, original=True, rewriter=None, engine=engine, suffix_length=2, run_seed=config.run.seed
    )
    judging = InTrainerJudging(ScriptedJudge(**judge) if engine else None, Ranks(), on_submit=background)
    pipeline = Pipeline(
        EpisodeFeed(CountingStream(), Ranks(), 2),
        proposer,
        judging,
        Curriculum(config.candidates, config.run.seed),
        Ranks(),
        batch=2,
        part=2,
        steps=steps,
        staleness=staleness,
        background=background,
    )
    run = Training(
        config,
        pipeline,
        objective or OnlineDpo(0.1),
        CountingPolicy(journal, gap),
        engine,
        evaluation and evaluation(engine, journal),
        GpuMemory(None, None, Ranks()),
        recorder,
        recorder,
        StageTimer(None),
        StopRequest(Path("no such folder"), Ranks()),
        Learning(config.train.empty_window, config.train.max_empty_share),
        done,
    )
    pipeline.load_state_dict(
        {
            "stream": 2 * done,
            "curriculum": {"level": config.candidates.rollouts, "wins": []},
            "proposed": done,
            "pending": {},
        }
    )
    pipeline.start(done)
    return run, journal


def happened(journal: Journal, *kinds: str) -> Journal:
    return [entry for entry in journal if entry[0] in kinds]


def test_every_step_generates_updates_syncs_and_records_in_this_order():
    run, journal = training(steps=2)
    train(run)
    assert journal == [
        ("generate", 0),
        ("update", 0, ["e0", "e1"]),
        ("sync", 1, {"version": 1}),
        ("record", 0, 1),
        ("generate", 1),
        ("update", 1, ["e2", "e3"]),
        ("sync", 2, {"version": 2}),
        ("record", 1, 2),
        ("save", 2),
        ("finish",),
    ]
    assert run.done == 2


def test_the_engine_is_always_asked_for_the_policys_version_also_after_steps_without_an_update():
    run, journal = training(steps=5, ties={1, 2})
    train(run)
    assert [version for _, version in happened(journal, "generate")] == [0, 1, 1, 1, 2]
    assert [version for _, version, _ in happened(journal, "sync")] == [1, 2, 3]


class JournaledEvaluation:
    def __init__(self, engine: StrictEngine | None, journal: Journal) -> None:
        self._engine, self._journal = engine, journal

    def begin(self, version: int) -> dict[str, float]:
        self._journal.append(("begin", version))
        return {"evaluation/x": 0.5}

    def measure(self, version: int) -> dict[str, float]:
        if self._engine:
            self._engine.generate([], 1, version)
        self._journal.append(("evaluate", version))
        return {"evaluation/x": float(version)}


def test_an_evaluation_gets_the_new_weights_and_is_recorded_with_its_step():
    run, journal = training(steps=3, evaluation=JournaledEvaluation)
    train(run)
    assert happened(journal, "begin", "evaluate", "sync", "record") == [
        ("begin", 0),
        ("sync", 1, {"version": 1}),
        ("record", 0, 1),
        ("sync", 2, {"version": 2}),
        ("evaluate", 2),
        ("record", 1, 2),
        ("sync", 3, {"version": 3}),
        ("evaluate", 3),
        ("record", 2, 3),
    ]
    assert [metrics.get("evaluation/x") for metrics in run.observer.metrics] == [0.5, 2.0, 3.0]


def test_without_rollouts_weights_are_sent_only_for_an_evaluation():
    run, journal = training(steps=3, objective=NextToken(), evaluation=JournaledEvaluation)
    run.engine = StrictEngine(journal)
    run.evaluation = JournaledEvaluation(run.engine, journal)
    train(run)
    assert [version for _, version, _ in happened(journal, "sync")] == [2, 3]


def test_a_step_with_nothing_to_train_on_is_recorded_and_changes_nothing():
    run, journal = training(steps=2, ties={0})
    train(run)
    assert happened(journal, "update", "record") == [
        ("record", 0, 0),
        ("update", 0, ["e2", "e3"]),
        ("record", 1, 1),
    ]
    assert run.policy.version == 1
    assert run.pipeline.feed.state_dict() == 4
    first = run.observer.metrics[0]
    assert (first["examples"], first["skipped/tie"]) == (0, 2)
    assert "loss" not in first


def test_an_engine_whose_update_failed_half_way_gets_its_weights_again():
    run, journal = training(steps=2, ties={0})
    original = run.engine.generate

    def generate_then_lose_weights(*args):
        found = original(*args)
        run.engine.version = None
        return found

    run.engine.generate = generate_then_lose_weights
    train(run)
    assert [version for _, version, _ in happened(journal, "sync")] == [0, 1]


def test_judgments_that_fail_too_often_stop_the_run_before_the_update():
    run, journal = training(steps=3, every=1, failures={1: 2})
    with pytest.raises(TeacherError, match="failed on 4 of 6 candidates"):
        train(run)
    assert happened(journal, "update", "save") == [("update", 0, ["e0", "e1"]), ("save", 1)]
    assert run.policy.version == run.done == 1


def test_failures_below_the_limit_are_reported_and_left_out():
    run, journal = training(steps=1, failures={0: 1})
    train(run)
    assert run.observer.metrics[0]["failure_rate"] == pytest.approx(1 / 3)
    assert "reward/original" not in run.observer.metrics[0], "the original is the one that failed"
    assert happened(journal, "update") == [("update", 0, ["e0", "e1"])]


@pytest.mark.parametrize("gap", [0.51, float("inf")])
def test_an_engine_that_disagrees_with_the_trainer_stops_the_run_without_a_checkpoint(gap):
    run, journal = training(steps=2, gap=gap, every=1)
    with pytest.raises(TrainingError) as caught:
        train(run)
    assert "more than rollout.max_logprob_gap = 0.5" in str(caught.value)
    assert happened(journal, "save", "sync", "record") == []


def test_an_engine_that_agrees_well_enough_goes_on():
    run, _ = training(steps=2, gap=0.5)
    train(run)
    assert run.done == 2


@pytest.mark.parametrize(
    ("every", "steps", "saves"), [(2, 5, [2, 4, 5]), (2, 4, [2, 4]), (100, 3, [3]), (1, 3, [1, 2, 3])]
)
def test_checkpoints_come_at_their_cadence_and_once_at_the_end(every, steps, saves):
    run, journal = training(steps=steps, every=every)
    train(run)
    assert [done for _, done in happened(journal, "save")] == saves


def test_a_checkpoint_is_written_after_its_step_is_recorded():
    """A kill in between then repeats the step; the other order would lose its record."""
    run, journal = training(steps=1)
    train(run)
    assert [entry[0] for entry in journal[-3:]] == ["record", "save", "finish"]


def test_a_resumed_run_does_the_remaining_steps():
    run, journal = training(steps=5, every=2, done=3)
    train(run)
    assert [step for _, step, _ in happened(journal, "record")] == [3, 4]
    assert [done for _, done in happened(journal, "save")] == [4, 5]


def test_a_run_that_is_done_does_nothing_more():
    run, journal = training(steps=3, done=3)
    run.policy.version = 3
    train(run)
    assert journal == [("finish",)]


@pytest.mark.parametrize("every", [1, 100])
def test_a_run_whose_every_step_was_empty_is_no_success_and_publishes_nothing_at_its_end(every):
    run, journal = training(steps=3, every=every, ties={0, 1, 2})
    with pytest.raises(NothingLearntError, match=r"none of 3 steps left an example.*most frequent: 6 x tie"):
        train(run)
    assert happened(journal, "record") == [("record", step, 0) for step in range(3)]
    assert happened(journal, "save") == ([("save", 1), ("save", 2)] if every == 1 else [])


def test_a_long_streak_of_empty_steps_ends_the_run_before_its_end():
    run, journal = training(steps=50, every=1, window=4, ties=set(range(2, 50)))
    with pytest.raises(
        NothingLearntError, match=r"4 of the last 4 steps left no example \(100%, more than train\.max_"
    ):
        train(run)
    assert happened(journal, "record")[-1] == ("record", 5, 2)
    assert happened(journal, "save", "finish")[-2:] == [("save", 6), ("finish",)]
    run.learning.check(2, last=True)  # a repaired run starts without the steps that ended it
    assert [figures["empty_share"] for figures in run.observer.metrics] == [0, 0, 1 / 3, 0.5, 0.75, 1]


def test_a_run_that_was_never_updated_is_not_exported_by_starting_it_once_more():
    run, _ = training(steps=3, done=3)
    with pytest.raises(NothingLearntError):
        train(run)


def test_an_objective_without_engine_and_judge_trains_on_the_corpus():
    run, journal = training(steps=2, objective=NextToken())
    train(run)
    assert [entry[0] for entry in journal] == ["update", "record", "update", "record", "save", "finish"]
    assert run.observer.metrics[0]["original_chosen_rate"] == 1.0


def test_every_stage_is_timed():
    run, _ = training(steps=1)
    train(run)
    timed = {name.removeprefix("seconds/") for name in run.observer.metrics[0] if name.startswith("seconds/")}
    assert timed == {"generate", "judge", "update", "wait", "sync", "total"}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_ahead_of_the_trainer_every_batch_is_proposed_by_the_weights_of_so_many_updates_before(staleness, background):
    run, journal = training(steps=6, staleness=staleness, background=background)

    def step(number, version, metrics, groups, selection):
        assert {c.policy_version for c in rollouts(groups)} == {max(0, number - staleness)}
        assert [group.episode.id for group in groups] == [f"e{2 * number}", f"e{2 * number + 1}"]
        journal.append(("record", number, version))

    run.observer.step = step
    train(run)
    run.pipeline.close()
    assert [version for _, version in happened(journal, "generate")] == [max(0, n - staleness) for n in range(6)]
    assert [version for _, version, _ in happened(journal, "sync")] == [1, 2, 3, 4, 5, 6]
    assert run.pipeline.feed.state_dict() == 12, "nothing is proposed that is never learnt from"


def test_weights_change_only_after_what_they_generate_is_there():
    """The engine refuses another version than its own, so a sync too early would raise."""
    run, journal = training(steps=4, staleness=1, background=True)
    generate = run.engine.generate

    def slowly(prompts, max_tokens, version):
        time.sleep(0.05)
        return generate(prompts, max_tokens, version)

    run.engine.generate = slowly
    train(run)
    order = [entry[:2] for entry in happened(journal, "generate", "sync")]
    assert order.index(("generate", 1)) > order.index(("sync", 1))
    assert order.index(("generate", 2)) < order.index(("sync", 3))


def test_the_policy_learns_while_the_next_batch_is_generated():
    run, _ = training(steps=3, staleness=1, background=True)
    learning, generating = threading.Event(), threading.Event()
    generate, update = run.engine.generate, run.policy.update
    calls = []

    def generated(prompts, max_tokens, version):
        calls.append(version)
        if len(calls) == 3:  # the batch that is ahead during the second update
            generating.set()
            assert learning.wait(30), "the policy waits for the engine"
        return generate(prompts, max_tokens, version)

    def updated(examples):
        if run.policy.version == 1:
            assert generating.wait(30), "the engine waits for the policy"
            learning.set()
        return update(examples)

    run.engine.generate, run.policy.update = generated, updated
    train(run)
    assert run.done == 3


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_an_error_while_generating_in_the_background_stops_the_run(fails_at):
    run, journal = training(steps=6, staleness=1, background=True)
    generate, calls = run.engine.generate, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == fails_at:
            raise EngineError("out of order")
        return generate(*arguments)

    run.engine.generate = failing
    with pytest.raises(EngineError, match="out of order"):
        train(run)
    assert not happened(journal, "save")


def test_asked_to_stop_it_finishes_the_step_saves_and_says_that_it_can_be_gone_on_with(tmp_path):
    run, journal = training(steps=5, every=100)
    run.stop = StopRequest(tmp_path, Ranks())
    record = run.observer.step

    def ask_after_the_second(step, *rest):
        record(step, *rest)
        if step == 1:
            (tmp_path / STOP_FILE).touch()

    run.observer.step = ask_after_the_second
    with pytest.raises(RunStopped, match="after 2 of 5 steps"):
        train(run)
    assert happened(journal, "record", "save", "finish") == [
        ("record", 0, 1),
        ("record", 1, 2),
        ("save", 2),
        ("finish",),
    ]
    assert not (tmp_path / STOP_FILE).exists(), "the next start would stop as well"


def test_asked_to_stop_while_judges_do_not_answer_it_does_not_wait_for_them(tmp_path):
    run, journal = training(steps=5, every=1)
    run.stop = StopRequest(tmp_path, Ranks())
    answer, asked = run.pipeline.judging.collect, []

    def silent_in_the_second_step(first, count, version):
        if first == 0:
            return answer(first, count, version)
        asked.append(first)
        if len(asked) == 3:
            (tmp_path / STOP_FILE).touch()
        return None

    run.pipeline.judging.collect = silent_in_the_second_step
    with pytest.raises(RunStopped, match="after 1 of 5 steps"):
        train(run)
    assert len(asked) == 3
    assert happened(journal, "update", "save", "finish") == [("update", 0, ["e0", "e1"]), ("save", 1), ("finish",)]
