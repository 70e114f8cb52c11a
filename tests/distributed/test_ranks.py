"""Small exchanges among real processes: four ranks in two replicas of two."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import WorldError, error_of, on_every_rank, ranks_of_world, run_world

from megatron_rlpt.distributed.ranks import drain
from megatron_rlpt.errors import CheckpointError, DataError, TeacherError, TrainingError
from megatron_rlpt.teacher.distributed import DistributedJudge, DistributedRewriter
from megatron_rlpt.trainer.episode_feed import EpisodeFeed
from megatron_rlpt.types import Candidate, Episode, Group, Reward, Source

SIZE = 4
LEADERS = (0, 2)
HURRY = 6.0
"""Seconds after which the tests of absence report it; all ranks have just met when they begin."""


class OwnJudge:
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def judge(self, groups: list[Group]) -> list[Group]:
        return [Group(group.episode, group.candidates, (Reward(1.0, f"rank {self.rank}", "p"),)) for group in groups]


class OwnRewriter:
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def rewrite(self, episodes: list[Episode]) -> list[Candidate]:
        return [Candidate(Source.REWRITE, episode.suffix, seed=self.rank) for episode in episodes]


def episode(number: int) -> Episode:
    return Episode(f"e{number}", (1,), (number,), "c", "d", 0)


class OneBatch:
    """A stream that ends after one batch."""

    def __init__(self) -> None:
        self.taken = 0

    def take(self, count: int) -> list[Episode]:
        if self.taken:
            raise DataError("no further document")
        self.taken = count
        return [Episode(f"e{number}", (7, 1 << 30), (number,), "c", "d", 2) for number in range(count)]

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def metrics(self) -> dict[str, float]:
        return {"data/read": self.taken}


def everything() -> dict[str, Any]:
    """Run all cases on one rank; return its results by name."""
    ranks = ranks_of_world(tensor=2)
    rank = ranks.rank
    found: dict[str, Any] = {"self": (ranks.rank, ranks.size, ranks.is_main, ranks.is_leader)}
    found["gathered"] = ranks.all_gather({"rank": rank, "data": b"x" * rank})
    found["gathered on main"] = ranks.gather(rank * 10)
    found["broadcast"] = [ranks.broadcast(f"from {rank}", source) for source in range(SIZE)]
    found["broadcast from main"] = ranks.broadcast(rank)

    asked: list[Any] = []

    def count_on_main() -> str:
        asked.append("main")
        return f"work of {rank}"

    def fail_on_main() -> None:
        raise CheckpointError(f"the disk of rank {rank} is full")

    found["on main"] = ranks.on_main(count_on_main)
    found["on main asked"] = list(asked)
    found["on main error"] = error_of(lambda: ranks.on_main(fail_on_main))

    def full_disk(at: Any) -> Any:
        if rank in at:
            raise OSError(28, f"No space left for {rank}\nand more")
        return f"own of {rank}"

    found["on main, unexpected"] = error_of(lambda: ranks.on_main(lambda: full_disk((0,))))
    found["divide, unexpected"] = error_of(lambda: ranks.scatter_work(range(4), lambda _: full_disk((2,)), "the end"))
    found["everywhere"] = ranks.run_on_all_ranks(lambda: full_disk(()), "the end of loading")
    found["everywhere, unexpected"] = error_of(lambda: ranks.run_on_all_ranks(lambda: full_disk((1, 3)), "the end"))

    def fail_on_two() -> None:
        if rank in (2, 3):
            raise CheckpointError(f"no folder for {rank}")

    found["everywhere, two"] = error_of(lambda: ranks.run_on_all_ranks(fail_on_two, "the end"))

    def shared_stream() -> Any:
        for number in range(5):
            yield sum(ranks.all_gather(number))

    def take_some(stream: Any) -> None:
        asked.append(next(stream))
        full_disk((1,))
        asked.append(next(stream))

    asked.clear()
    use = take_some if rank < 3 else None
    found["stream"] = error_of(lambda: ranks.run_on_all_ranks(lambda: drain(shared_stream(), use), "the end"))
    found["of stream"] = list(asked)

    for count in (0, 1, 2, 5, 8):
        asked.clear()

        def work(share: list[int]) -> tuple[str, ...]:
            asked.append(list(share))
            return tuple(f"{item} by {rank}" for item in share)

        found[f"divide {count}"] = ranks.scatter_work(range(count), work, "the end of judging")
        found[f"asked {count}"] = list(asked)

    def fail_at_2(share: list[int]) -> list[int]:
        if rank == 2:
            raise TeacherError(f"no answer for {share}")
        return share

    def fail_everywhere(share: list[int]) -> list[int]:
        raise TeacherError(f"no answer for {share}")

    found["one leader fails"] = error_of(lambda: ranks.scatter_work(range(5), fail_at_2, "the end of judging"))
    found["both leaders fail"] = error_of(lambda: ranks.scatter_work(range(5), fail_everywhere, "the end of judging"))
    found["after errors"] = ranks.scatter_work(range(3), lambda share: share, "the end of judging")

    judge = DistributedJudge(OwnJudge(rank) if ranks.is_leader else None, ranks)
    rewriter = DistributedRewriter(OwnRewriter(rank) if ranks.is_leader else None, ranks)
    found["judged"] = judge.judge([Group(episode(number), ()) for number in range(3)])
    found["rewritten"] = rewriter.rewrite([episode(number) for number in range(3)])

    feed = EpisodeFeed(OneBatch() if rank == 0 else None, ranks, 3)
    found["fed"] = feed.take()
    found["fed, state"] = (feed.state_dict(), feed.metrics())
    found["fed, error"] = error_of(feed.take)
    feed.close()

    ranks.barrier("the end")  # returns once all ranks have arrived

    # Absence last: a group that timed out is unusable, so each case has its own groups.
    barrier, judging = ranks_of_world(HURRY, tensor=2), ranks_of_world(HURRY, tensor=2)
    ranks.barrier("the beginning of absence")
    found["two are absent"] = (
        ("none", "") if rank in (1, 3) else error_of(lambda: barrier.barrier("the exchange of weights"))
    )
    ranks.all_gather(None)

    def never_ends(share: list[int]) -> list[int]:
        if rank == 2:
            ranks.all_gather(None)  # until the other ranks have given up
            raise TrainingError("came too late")
        return share

    found["one never ends"] = error_of(lambda: judging.scatter_work(range(4), never_ends, "the end of judging"))
    if rank != 2:
        ranks.all_gather(None)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_world(SIZE, everything)


def test_each_rank_knows_itself(found):
    assert [one["self"] for one in found] == [(rank, SIZE, rank == 0, rank in LEADERS) for rank in range(SIZE)]


def test_one_rank_reads_and_all_get_the_same_episodes(found):
    episodes = [Episode(f"e{number}", (7, 1 << 30), (number,), "c", "d", 2) for number in range(3)]
    assert on_every_rank(found, "fed") == episodes
    assert [one["fed, state"] for one in found] == [({"taken": 3}, {"data/read": 3}), *[({}, {})] * (SIZE - 1)]
    assert on_every_rank(found, "fed, error") == ("DataError", "no further document")


def test_values_are_gathered_in_rank_order_and_broadcast_from_any_rank(found):
    assert on_every_rank(found, "gathered") == [{"rank": rank, "data": b"x" * rank} for rank in range(SIZE)]
    assert [one["gathered on main"] for one in found] == [[0, 10, 20, 30], None, None, None]
    assert on_every_rank(found, "broadcast") == [f"from {rank}" for rank in range(SIZE)]
    assert on_every_rank(found, "broadcast from main") == 0


def test_work_on_main_is_done_there_alone_and_known_to_all(found):
    assert on_every_rank(found, "on main") == "work of 0"
    assert [one["on main asked"] for one in found] == [["main"], [], [], []]
    assert on_every_rank(found, "on main error") == ("CheckpointError", "the disk of rank 0 is full")


@pytest.mark.parametrize("count", [0, 1, 2, 5, 8])
def test_divided_work_is_done_once_by_leaders_and_comes_back_whole_in_order(found, count):
    half = count // 2
    expected = [f"{item} by {0 if item < half else 2}" for item in range(count)]
    assert on_every_rank(found, f"divide {count}") == expected
    asked = [one[f"asked {count}"] for one in found]
    assert asked == [[list(range(half))], [], [list(range(half, count))], []]


def test_the_error_of_one_leader_is_raised_on_every_rank_with_its_text(found):
    assert on_every_rank(found, "one leader fails") == ("TeacherError", "no answer for [2, 3, 4]")
    assert on_every_rank(found, "both leaders fail") == ("TeacherError", "no answer for [0, 1]")
    assert on_every_rank(found, "after errors") == [0, 1, 2]


UNEXPECTED = "rank {0}: OSError: [Errno 28] No space left for {0}; look at the log of that rank"


@pytest.mark.parametrize(
    ("what", "rank"), [("on main, unexpected", 0), ("divide, unexpected", 2), ("everywhere, unexpected", 1)]
)
def test_an_error_that_is_not_ours_stops_every_rank_with_one_line(found, what, rank):
    assert on_every_rank(found, what) == ("TrainingError", UNEXPECTED.format(rank))


def test_work_everywhere_keeps_results_where_they_are_and_names_the_first_rank_that_failed(found):
    assert [one["everywhere"] for one in found] == [f"own of {rank}" for rank in range(SIZE)]
    assert on_every_rank(found, "everywhere, two") == ("CheckpointError", "rank 2: no folder for 2")


def test_a_rank_that_fails_in_a_shared_stream_goes_on_to_its_end_with_the_others(found):
    assert on_every_rank(found, "stream") == ("TrainingError", UNEXPECTED.format(1))
    assert [one["of stream"] for one in found] == [[0, 4], [0], [0, 4], []]


def lose_rank_1(folder: Path) -> None:
    ranks = ranks_of_world(30.0)
    ready = folder / "ready"
    if ranks.rank == 1:
        # Creating groups does not wait for all ranks: a death now would be one during creation.
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    ready.touch()

    def sum_up() -> None:
        torch.distributed.all_reduce(torch.ones(1))

    def alone() -> None:
        with ranks.contact():
            sum_up()

    def agreed() -> None:
        with ranks.contact():
            ranks.run_on_all_ranks(sum_up, "the end")

    (folder / "found").write_text("\n".join(": ".join(error_of(act)) for act in (alone, agreed)))


LOST = r"LostContactError: lost contact with another rank \(.*gloo/.*\); look at the logs of "


def test_a_rank_that_dies_in_a_collective_is_one_line_for_the_others(tmp_path):
    with pytest.raises(WorldError) as caught:
        run_world(2, lose_rank_1, tmp_path)
    assert (tmp_path / "found").exists(), str(caught.value)
    lines = (tmp_path / "found").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        assert re.match(LOST, line)


def test_teachers_of_leaders_work_for_all(found):
    judged, rewritten = on_every_rank(found, "judged"), on_every_rank(found, "rewritten")
    assert [(group.episode.id, group.rewards[0].judge) for group in judged] == [
        ("e0", "rank 0"),
        ("e1", "rank 2"),
        ("e2", "rank 2"),
    ]
    assert [(one.tokens, one.seed) for one in rewritten] == [((0,), 0), ((1,), 2), ((2,), 2)]


def test_ranks_that_do_not_come_are_named_on_rank_0_with_the_phase(found):
    tail = f"did not reach the exchange of weights within {HURRY:g} s (parallel.timeout); look at the log of that rank"
    assert found[0]["two are absent"] == ("LostContactError", f"ranks 1, 3 {tail}")
    assert found[2]["two are absent"] == ("LostContactError", f"another rank {tail}")


def test_a_leader_that_never_ends_its_share_is_named_on_rank_0_with_the_phase(found):
    tail = f"did not reach the end of judging within {HURRY:g} s (parallel.timeout); look at the log of that rank"
    assert found[0]["one never ends"] == ("LostContactError", f"rank 2 {tail}")
    for rank in (1, 3):
        assert found[rank]["one never ends"] == ("LostContactError", f"another rank {tail}")
