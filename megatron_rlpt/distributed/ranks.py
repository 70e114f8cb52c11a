"""The ranks of a run: which one this process is, and how they exchange small things.

Tensors travel through Megatron's groups. What goes through here is small and of the host: episodes, judged groups,
decisions, "has everyone come this far". It uses gloo on every machine, because only gloo can tell who is missing.

A *replica* is the set of ranks that hold one copy of the model. Its first rank is the *leader*: it has the replica's
share of the episodes rewritten and judged, and afterwards every rank knows all of them.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from megatron_rlpt.errors import ConfigError, RlptError, TrainingError, first_line

_log = logging.getLogger(__name__)

_SLURM_PORTS = range(15000, 32000)
"""Rank 0's port in a Slurm step. Below those that Linux gives to outgoing connections (32768 and above), so that none
of these holds it by chance."""

T = TypeVar("T")
R = TypeVar("R")


class ReplicaShape(Protocol):
    """What ``Ranks`` needs of a layout: ranks in all, and how tensor, context and pipeline parallelism divide them."""

    @property
    def world(self) -> int: ...  # noqa: D102
    @property
    def tensor(self) -> int: ...  # noqa: D102
    @property
    def context(self) -> int: ...  # noqa: D102
    @property
    def pipeline(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class LauncherEnvironment:
    """Where the launcher put this process."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Number of this process on its machine; the GPU it uses."""
    address: str = "127.0.0.1"
    """Machine of rank 0."""
    port: int = 0
    """Port of rank 0's store; without meaning in a world of one."""


def read_launcher_environment(environment: Mapping[str, str] = os.environ) -> LauncherEnvironment:
    """Read the variables of torchrun, else those of a Slurm step, else this process is alone.

    Inside a batch script or ``salloc``, outside of ``srun``, Slurm's job variables are set but nothing was launched
    side by side; only a step has ``SLURM_STEP_NUM_TASKS``, and the step of an interactive shell has one task. Half of
    torchrun's variables without a step are refused: processes that each believe to be alone would all write the same
    run.

    Raises:
        ConfigError: a variable is missing or not a number, or rank 0's machine is not known.
    """
    try:
        if "RANK" in environment and "WORLD_SIZE" in environment:
            place = LauncherEnvironment(
                int(environment["RANK"]),
                int(environment["WORLD_SIZE"]),
                int(environment.get("LOCAL_RANK", "0")),
                environment.get("MASTER_ADDR", "127.0.0.1"),
                int(environment.get("MASTER_PORT", "0")),
            )
        elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
            place = LauncherEnvironment(
                int(environment["SLURM_PROCID"]),
                int(environment["SLURM_STEP_NUM_TASKS"]),
                int(environment["SLURM_LOCALID"]),
                environment.get("MASTER_ADDR") or _step_address(environment),
                # The same on every rank without asking anyone, and another one for the steps of other jobs.
                int(environment.get("MASTER_PORT") or _SLURM_PORTS[(job * 31 + step) % len(_SLURM_PORTS)]),
            )
        elif "RANK" in environment or "WORLD_SIZE" in environment:
            raise KeyError("RANK" if "WORLD_SIZE" in environment else "WORLD_SIZE")
        else:
            return LauncherEnvironment()
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"the launcher's variables are incomplete ({error}); start with torchrun, with srun, or without either"
        ) from None
    if not 0 <= place.rank < place.world:
        raise ConfigError(f"the launcher says rank {place.rank} of {place.world}; start with torchrun or srun")
    if place.world > 1 and not place.port:
        raise ConfigError("MASTER_PORT is not set; start with torchrun, which sets it, or set it to a free port")
    return place


def _step_address(environment: Mapping[str, str]) -> str:
    """Where the first node of a Slurm step is reached. Rank 0 runs there, unless it was asked to run elsewhere."""
    node = first_host(environment["SLURM_STEP_NODELIST"])
    own = environment["SLURMD_NODENAME"]
    if environment["SLURM_PROCID"] == "0" and own != node:  # srun --distribution=arbitrary, heterogeneous jobs
        raise ConfigError(f"rank 0 runs on {own}, not on {node}, the first node of the step; set MASTER_ADDR to {own}")
    if _resolves(node):
        return node
    # A node may have another name in Slurm than on the network; then Slurm knows how to reach it.
    try:
        scontrol = subprocess.run(["scontrol", "show", "node", node], capture_output=True, text=True, timeout=60)
        known = re.search(r"\bNodeAddr=(\S+)", scontrol.stdout)
    except (OSError, subprocess.TimeoutExpired):
        known = None
    if known is None or not _resolves(known[1]):
        raise ConfigError(f"the step's first node {node!r} has no known address; set MASTER_ADDR to the one of rank 0")
    return known[1]


def _resolves(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError):
        return False
    return True


def ranks_on_this_machine(environment: Mapping[str, str] = os.environ) -> int | None:
    """Ranks that the launcher started beside this one, itself included; None where it does not say.

    Slurm writes ``4(x2),3`` for two nodes of 4 tasks and one of 3; the most of any node is taken.
    """
    if "LOCAL_WORLD_SIZE" in environment:
        return int(environment["LOCAL_WORLD_SIZE"])
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return max(map(int, counts), default=None)


def first_host(nodes: str) -> str:
    """First host of a Slurm node list: ``n[03-05,9],m1`` -> ``n03``; a name may have several ranges."""
    head = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if head is None:
        raise ValueError(f"SLURM_STEP_NODELIST is {nodes!r}")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", head[0])


class Ranks:
    """All ranks of a run. In a world of one every method answers at once.

    Attributes:
        rank: number of this process.
        size: number of processes.
        is_main: whether this is rank 0, which writes the run's files.
        is_leader: whether this rank has a teacher.
    """

    def __init__(self, rank: int = 0, layout: ReplicaShape | None = None, timeout: float = 1800.0) -> None:
        """Torch's process group of ``layout.world`` ranks must be there; a collective over all of them.

        Args:
            rank: number of this process.
            layout: how the ranks are divided; None is a world of one.
            timeout: seconds a rank may keep the others waiting before it is reported as absent.
        """
        self._arguments = (rank, layout, timeout)
        self.rank = rank
        self.size = layout.world if layout else 1
        self.is_main = rank == 0
        self._timeout = datetime.timedelta(seconds=timeout)
        self._replicas = _replicas(layout) if layout else [[0]]
        self._mine = next(index for index, members in enumerate(self._replicas) if rank in members)
        self.is_leader = self._replicas[self._mine][0] == rank
        if self.size > 1:
            import torch  # a world of one has no use for it, and much that does without torch names this class

            self._distributed = torch.distributed
            new_group = torch.distributed.new_group
            self._world: Any = new_group(backend="gloo", timeout=self._timeout)
            self._leaders: Any = new_group(
                [members[0] for members in self._replicas], backend="gloo", timeout=self._timeout
            )
            # Every rank enters for every replica, which costs those outside next to nothing. Synchronised among members
            # alone, a group is named after how many groups a rank is in already, and Megatron's stages differ in that.
            self._replica: Any = [
                new_group(members, backend="gloo", timeout=self._timeout) for members in self._replicas
            ][self._mine]

    @property
    def timeout(self) -> float:
        """Seconds that a rank may keep the others waiting."""
        return self._timeout.total_seconds()

    def clone_groups(self) -> Ranks:
        """The same ranks with process groups of their own, for a second thread; a collective over all of them.

        Collectives of two threads on one group would meet each other's.
        """
        return Ranks(*self._arguments)

    def barrier(self, phase: str) -> None:
        """Wait until every rank is here.

        Raises:
            LostContactError: some did not come in time; on rank 0 it names them.
        """
        if self.size == 1:
            return
        try:
            self._distributed.monitored_barrier(self._world, timeout=self._timeout, wait_all_ranks=True)
        except RuntimeError as error:
            named = re.search(r"Ranks? ([\d, ]*\d) failed", str(error))
            absent = "another rank"
            if self.is_main and named:
                absent = f"rank{'s' if ',' in named[1] else ''} {named[1]}"
            raise LostContactError(
                f"{absent} did not reach {phase} within {self._timeout.total_seconds():g} s (parallel.timeout); look "
                "at the log of that rank"
            ) from error

    def all_gather(self, value: T) -> list[T]:
        """``value`` of every rank, in rank order; anything that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._distributed.all_gather_object(values, value, group=self._world)
        return values

    def gather(self, value: T) -> list[T] | None:
        """``value`` of every rank, in rank order, on rank 0 alone; None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        self._distributed.gather_object(value, values, dst=0, group=self._world)
        return values

    def broadcast(self, value: T, source: int = 0) -> T:
        """``value`` of rank ``source`` on every rank."""
        if self.size == 1:
            return value
        box = [value]
        self._distributed.broadcast_object_list(box, src=source, group=self._world)
        return box[0]

    def on_main(self, work: Callable[[], R]) -> R:
        """``work()`` of rank 0, and its result on every rank.

        Raises:
            RlptError: ``work`` did; the same on every rank.
            TrainingError: ``work`` raised anything else, in a world of several.
        """
        if self.size == 1:
            return work()
        return _unpack(self.broadcast(self._attempt(work) if self.is_main else _Outcome()))

    def run_on_all_ranks(self, work: Callable[[], R], phase: str) -> R:
        """``work()`` on every rank, and its own result on each; or the same error on all, whoever failed.

        Results stay where they are; ``gather`` and ``all_gather`` exchange them.

        Args:
            work: may be collective work, if it joins the collectives to the end also where it fails
                (``drain``).
            phase: what others may wait for, for the error.

        Raises:
            RlptError: ``work`` did on some rank: that of the first such rank, which it names, on every rank.
            TrainingError: ``work`` raised anything else on some rank, in a world of several; or a rank did not finish
                in time.
        """
        if self.size == 1:
            return work()
        outcome = self._attempt(work, f"rank {self.rank}: ")
        self.barrier(phase)
        errors = self.gather(outcome.error)
        failure = self.broadcast(next(filter(None, errors), None) if errors else None)
        if failure is not None:
            raise failure
        return outcome.value

    def scatter_work(self, items: Sequence[T], work: Callable[[list[T]], Sequence[R]], phase: str) -> list[R]:
        """``work`` on ``items``, divided among the leaders in order; every rank gets all results in order.

        Args:
            items: the same on every rank.
            work: one result per item; called on leaders only.
            phase: what others may wait for, for the error.

        Raises:
            RlptError: ``work`` did on some rank; the same on every rank.
            TrainingError: ``work`` raised anything else, in a world of several; or a rank did not finish in time.
        """
        if self.size == 1:
            return list(work(list(items)))
        count = len(self._replicas)
        share = list(items[len(items) * self._mine // count : len(items) * (self._mine + 1) // count])
        outcomes: list[Any] = [None] * count
        mine = self._attempt(lambda: list(work(share))) if self.is_leader else _Outcome()
        self.barrier(phase)
        if self.is_leader:
            self._distributed.all_gather_object(outcomes, mine, group=self._leaders)
        if len(self._replicas[self._mine]) > 1:
            self._distributed.broadcast_object_list(outcomes, src=self._replicas[self._mine][0], group=self._replica)
        return [item for outcome in outcomes for item in _unpack(outcome)]

    def contact(self) -> contextlib.AbstractContextManager[None]:
        """Around work with collectives of any kind, see ``contact_kept``; in a world of one there is none to lose."""
        return contact_kept() if self.size > 1 else contextlib.nullcontext()

    def _attempt(self, work: Callable[[], Any], prefix: str = "") -> _Outcome:
        """What ``work`` came to, for others to know; ``prefix`` is put before what a user can mend."""
        try:
            return _Outcome(work())
        except RlptError as error:
            if is_lost_contact(error):
                raise
            return _Outcome(error=type(error)(f"{prefix}{error}") if prefix else error)
        except Exception as error:
            if is_lost_contact(error):  # there is nobody left to agree with
                raise
            _log.exception("rank %d failed", self.rank)
            return _Outcome(
                error=TrainingError(
                    f"rank {self.rank}: {type(error).__name__}: {first_line(error)}; look at the log of that rank"
                )
            )


class LostContactError(TrainingError):
    """Another rank has ended or did not come, so that nothing can be agreed on any more."""


@contextlib.contextmanager
def contact_kept() -> Iterator[None]:
    """Around work with collectives: that another rank has gone is one line, not a traceback.

    Raises:
        LostContactError: a collective failed because another rank ended or did not come.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        raise LostContactError(
            f"lost contact with another rank ({first_line(error)}); look at the logs of the other ranks for the one "
            "that failed first, then start the run again"
        ) from error


def is_lost_contact(error: BaseException) -> bool:
    """Whether ``error`` says that ranks cannot reach each other: torch's own errors, or gloo's, which have no type."""
    if isinstance(error, LostContactError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    import torch  # a world of one has no use for it

    return isinstance(error, torch.distributed.DistError) or re.search(r"\bgloo/", str(error)) is not None


def drain(stream: Iterable[T], use: Callable[[Iterator[T]], None] | None) -> None:
    """Give ``use`` a stream that all ranks go through together, and go on to its end where ``use`` stops or fails.

    The other ranks would wait for this one in the middle of the stream otherwise. Ranks without a use for the stream
    go through it all the same.

    Raises:
        Exception: what ``use`` raised, once the stream has ended.
    """
    items = iter(stream)
    try:
        if use:
            use(items)
    except Exception:
        _skip(items)
        raise
    _skip(items)


def _skip(items: Iterator[Any]) -> None:
    for _ in items:
        pass


@dataclass(frozen=True)
class _Outcome:
    """What work came to, in a form that travels."""

    value: Any = None
    error: RlptError | None = None


def _unpack(outcome: _Outcome) -> Any:
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


def _replicas(layout: ReplicaShape) -> list[list[int]]:
    """Ranks of every model replica, in Megatron's order: tensor fastest, then context, data, pipeline."""
    inner = layout.tensor * layout.context
    data = layout.world // (inner * layout.pipeline)
    return [
        [
            pipeline * inner * data + replica * inner + place
            for pipeline in range(layout.pipeline)
            for place in range(inner)
        ]
        for replica in range(data)
    ]
