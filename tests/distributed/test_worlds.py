"""The worlds of other tests: results by rank, faults reported, no process left behind."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from worlds import WorldError, run_world


def share(offset: int) -> tuple[int, list[int]]:
    rank = torch.distributed.get_rank()
    everyone = [torch.zeros(1, dtype=torch.int64) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, torch.tensor([rank + offset]))
    return rank, [int(value) for value in everyone]


def start_like_torchrun() -> int:
    assert not torch.distributed.is_initialized()
    torch.distributed.init_process_group("gloo")
    # A rank that ends while another still connects would break the connection.
    torch.distributed.barrier()
    return torch.distributed.get_world_size()


def fail_on_rank_1_while_0_waits(folder: Path) -> None:
    (folder / str(torch.distributed.get_rank())).write_text(str(os.getpid()))
    # A rank that ends while another still connects would break the connection.
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 1:
        raise ValueError("the reason")
    time.sleep(600)


def hang_with_a_child(folder: Path) -> None:
    child = subprocess.Popen(["sleep", "600"])
    (folder / "child").write_text(str(child.pid))
    this_is_where_it_hangs(child)


def this_is_where_it_hangs(child: subprocess.Popen) -> None:
    child.wait()


def has_ended(pid: int) -> bool:
    """Also true for a zombie: in a container without an init process nothing may reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_results_come_back_by_rank():
    assert run_world(3, share, 5) == [(rank, [5, 6, 7]) for rank in range(3)]


def test_a_function_may_start_the_group_itself_and_be_given_by_name():
    assert run_world(2, "test_worlds:start_like_torchrun", start_group=False) == [2, 2]


def test_the_fault_of_one_rank_is_told_and_the_others_are_ended(tmp_path):
    with pytest.raises(
        WorldError, match=r"(?s)2: a rank failed.*rank 0: still at it.*rank 1: exit code 1.*ValueError: the reason"
    ):
        run_world(2, fail_on_rank_1_while_0_waits, tmp_path)
    assert has_ended(int((tmp_path / "0").read_text()))


def test_a_world_that_hangs_says_where_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(WorldError, match=r"(?s)1: out of time.*rank 0: still at it.*this_is_where_it_hangs"):
        run_world(1, hang_with_a_child, tmp_path, limit=10)
    assert has_ended(int((tmp_path / "child").read_text()))
