"""The ranks of a run and their collectives on host data.

Tensors travel through Megatron's process groups. This module exchanges small host objects: episodes, judged groups,
decisions, barriers. It uses gloo on every machine, because only gloo reports which ranks are missing.

A *replica* is the set of ranks that hold one copy of the model. Its first rank is the *leader*: it rewrites and judges
the replica's share of the episodes, and then shares the results with all ranks.
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
"""Range of rank 0's port in a Slurm step; below the ports of outgoing connections on Linux (32768 and above), which
could occupy it by chance."""

T = TypeVar("T")
R = TypeVar("R")


class ReplicaShape(Protocol):
    """The part of a layout that ``Ranks`` uses: world size, and tensor, context and pipeline parallel sizes."""

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
    """This process's position in the world, as set by the launcher."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Index of this process on its machine, and of the GPU it uses."""
    address: str = "127.0.0.1"
    """Host of rank 0."""
    port: int = 0
    """Port of rank 0's store; unused in a world of one."""


def read_launcher_environment(environment: Mapping[str, str] = os.environ) -> LauncherEnvironment:
    """Read the variables of torchrun, else those of a Slurm step; without either this process is a world of one.

    In a batch script or ``salloc``, outside of ``srun``, Slurm's job variables are set although no ranks were launched;
    only a step has ``SLURM_STEP_NUM_TASKS``, and the step of an interactive shell has one task. An incomplete set of
    torchrun's variables is refused: several processes that each assume a world of one would write the same run.

    Raises:
        ConfigError: a variable is missing or not a number, or the host of rank 0 is unknown.
    """
    try:
        if "RANK" in environment and "WORLD_SIZE" in environment:
            found = LauncherEnvironment(
                int(environment["RANK"]),
                int(environment["WORLD_SIZE"]),
                int(environment.get("LOCAL_RANK", "0")),
                environment.get("MASTER_ADDR", "127.0.0.1"),
                int(environment.get("MASTER_PORT", "0")),
            )
        elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
            found = LauncherEnvironment(
                int(environment["SLURM_PROCID"]),
                int(environment["SLURM_STEP_NUM_TASKS"]),
                int(environment["SLURM_LOCALID"]),
                environment.get("MASTER_ADDR") or _step_address(environment),
                # The same on every rank without communication, and different for steps of other jobs.
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
    if not 0 <= found.rank < found.world:
        raise ConfigError(f"the launcher says rank {found.rank} of {found.world}; start with torchrun or srun")
    if found.world > 1 and not found.port:
        raise ConfigError("MASTER_PORT is not set; start with torchrun, which sets it, or set it to a free port")
    return found


def _step_address(environment: Mapping[str, str]) -> str:
    """Return the address of a Slurm step's first node, on which rank 0 runs by default."""
    node = first_host(environment["SLURM_STEP_NODELIST"])
    own = environment["SLURMD_NODENAME"]
    if environment["SLURM_PROCID"] == "0" and own != node:  # srun --distribution=arbitrary, heterogeneous jobs
        raise ConfigError(f"rank 0 runs on {own}, not on {node}, the first node of the step; set MASTER_ADDR to {own}")
    if _resolves(node):
        return node
    # Node names in Slurm may differ from host names; Slurm then knows the address.
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
    """Return the number of ranks on this machine; None if the launcher does not say.

    Slurm writes ``4(x2),3`` for two nodes with 4 tasks and one with 3; the largest number is used.
    """
    if "LOCAL_WORLD_SIZE" in environment:
        return int(environment["LOCAL_WORLD_SIZE"])
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return max(map(int, counts), default=None)


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: ``n[03-05,9],m1`` -> ``n03``; a name may have several ranges."""
    head = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if head is None:
        raise ValueError(f"SLURM_STEP_NODELIST is {nodes!r}")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", head[0])


class Ranks:
    """All ranks of a run. In a world of one every method returns immediately.

    Attributes:
        rank: number of this process.
        size: number of processes.
        is_main: whether this is rank 0, which writes the run's files.
        is_leader: whether this rank is the first of its replica and has a teacher.
    """

    def __init__(self, rank: int = 0, layout: ReplicaShape | None = None, timeout: float = 1800.0) -> None:
        """Create the process groups; a collective over all ranks of torch's initialized default group.

        Args:
            rank: number of this process.
            layout: the parallel layout; None is a world of one.
            timeout: seconds after which a rank that others wait for is reported as absent.
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
            import torch  # not at the top: modules that work without torch import this class

            self._distributed = torch.distributed
            new_group = torch.distributed.new_group
            self._world: Any = new_group(backend="gloo", timeout=self._timeout)
            self._leaders: Any = new_group(
                [members[0] for members in self._replicas], backend="gloo", timeout=self._timeout
            )
            # Every rank creates the groups of all replicas, at little cost. If only the members created a group, torch
            # would name it after the number of groups that a rank is in, which differs between pipeline stages.
            self._replica: Any = [
                new_group(members, backend="gloo", timeout=self._timeout) for members in self._replicas
            ][self._mine]

    @property
    def timeout(self) -> float:
        """Seconds after which a rank that others wait for is reported as absent."""
        return self._timeout.total_seconds()

    def clone_groups(self) -> Ranks:
        """Return the same ranks with separate process groups for a second thread; a collective.

        Collectives of two threads on the same group could be mixed up.
        """
        return Ranks(*self._arguments)

    def barrier(self, phase: str) -> None:
        """Wait until every rank has reached ``phase``.

        Raises:
            LostContactError: some ranks did not arrive in time; on rank 0 the error names them.
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
            elif self.is_main and self.size == 2:  # gloo names no rank whose connection broke; here it can be no other
                absent = "rank 1"
            raise LostContactError(
                f"{absent} did not reach {phase} within {self._timeout.total_seconds():g} s (parallel.timeout); look "
                "at the log of that rank"
            ) from error

    def all_gather(self, value: T) -> list[T]:
        """Return the picklable ``value`` of every rank, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._distributed.all_gather_object(values, value, group=self._world)
        return values

    def gather(self, value: T) -> list[T] | None:
        """Return ``value`` of every rank, in rank order, on rank 0; None on other ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        self._distributed.gather_object(value, values, dst=0, group=self._world)
        return values

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return the ``value`` of rank ``source`` on every rank."""
        if self.size == 1:
            return value
        box = [value]
        self._distributed.broadcast_object_list(box, src=source, group=self._world)
        return box[0]

    def on_main(self, work: Callable[[], R]) -> R:
        """Run ``work`` on rank 0 and return its result on every rank.

        Raises:
            RlptError: ``work`` raised it; the same error on every rank.
            TrainingError: ``work`` raised any other error, in a world of several ranks.
        """
        if self.size == 1:
            return work()
        return _unpack(self.broadcast(self._attempt(work) if self.is_main else _Outcome()))

    def run_on_all_ranks(self, work: Callable[[], R], phase: str) -> R:
        """Run ``work`` on every rank; return each rank's own result, or raise the same error on all ranks.

        ``gather`` and ``all_gather`` exchange results.

        Args:
            work: may use collectives if it completes them even when it fails (see ``drain``).
            phase: what other ranks wait for, for the error.

        Raises:
            RlptError: ``work`` raised it on some rank; the error of the first such rank, with its number, on every
            rank. TrainingError: ``work`` raised any other error on some rank, in a world of several ranks; or a rank
            did not finish in time.
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
        """Split ``items`` among the leaders, in order; return the results of all items, in order, on every rank.

        Args:
            items: the same on every rank.
            work: returns one result per item; called on leaders only.
            phase: what other ranks wait for, for the error.

        Raises:
            RlptError: ``work`` raised it on some rank; the same error on every rank.
            TrainingError: ``work`` raised any other error, in a world of several ranks; or a rank did not finish in
                time.
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
        """Return ``contact_kept()`` for work with collectives; a null context in a world of one."""
        return contact_kept() if self.size > 1 else contextlib.nullcontext()

    def _attempt(self, work: Callable[[], Any], prefix: str = "") -> _Outcome:
        """Run ``work`` and return its outcome for other ranks; ``prefix`` is put before a user's error."""
        try:
            return _Outcome(work())
        except RlptError as error:
            if is_lost_contact(error):
                raise
            return _Outcome(error=type(error)(f"{prefix}{error}") if prefix else error)
        except Exception as error:
            if is_lost_contact(error):  # the other ranks cannot be reached
                raise
            _log.exception("rank %d failed", self.rank)
            return _Outcome(
                error=TrainingError(
                    f"rank {self.rank}: {type(error).__name__}: {first_line(error)}; look at the log of that rank"
                )
            )


class LostContactError(TrainingError):
    """Another rank has ended or does not answer, so that collectives are no longer possible."""


@contextlib.contextmanager
def contact_kept() -> Iterator[None]:
    """Turn the failure of a collective into a one-line error inside the block.

    Raises:
        LostContactError: a collective failed because another rank ended or did not answer.
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
    """Return whether ``error`` means that ranks cannot reach each other: torch's error types, or gloo's message."""
    if isinstance(error, LostContactError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    import torch  # not at the top: modules that work without torch import this one

    return isinstance(error, torch.distributed.DistError) or re.search(r"\bgloo/", str(error)) is not None


def drain(stream: Iterable[T], use: Callable[[Iterator[T]], None] | None) -> None:
    """Pass ``use`` a stream that all ranks read together, and read it to its end even if ``use`` stops or fails.

    Otherwise the other ranks would wait in the middle of the stream. Ranks without ``use`` read it as well.

    Raises:
        Exception: the error of ``use``, after the end of the stream.
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
    """The result or error of some work, picklable."""

    value: Any = None
    error: RlptError | None = None


def _unpack(outcome: _Outcome) -> Any:
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


def _replicas(layout: ReplicaShape) -> list[list[int]]:
    """Return the ranks of every model replica, in Megatron's order: tensor fastest, then context, data, pipeline."""
    inner = layout.tensor * layout.context
    data = layout.world // (inner * layout.pipeline)
    return [
        [
            pipeline * inner * data + replica * inner + index
            for pipeline in range(layout.pipeline)
            for index in range(inner)
        ]
        for replica in range(data)
    ]
