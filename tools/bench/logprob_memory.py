"""Peak memory and time of the log-probability step, forward and backward, compared with a plain implementation.

    python tools/bench/logprob_memory.py [--tokens 512 2048 8192] [--vocab 49152 128256] [--chunks 256 1024]

The plain implementation computes all logits, log_softmax in fp32 and a gather; one rank holds the whole vocabulary.
Each measurement runs in a new process: the peak memory above that before the step (which holds weights and hidden
states; the gradients of both are part of the step), and the shortest time of the following steps, on one thread. With
the vocabulary split over two ranks it is the larger value of the two.

On a CPU memory is the process's peak resident set (VmHWM, reset through /proc/self/clear_refs), on a GPU the CUDA
allocator's peak. Time is CPU time on a CPU, which may be shared, and wall-clock time on a GPU. A size whose plain
step would not fit into --limit-gib is not measured, and the table says so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

MIB = 2**20
MANY_TOKENS = 2048
"""Longer steps are timed once: noise averages out within them."""
PLAIN_BYTES = {"fp32": 12, "bf16": 14}
"""Bytes per logit of the plain step at its peak: logits, their log_softmax and the gradient of that, and for bf16 the
gradient of the logits once more. Used only to skip sizes that would not fit."""


@dataclass(frozen=True)
class LossCase:
    """One measurement; ``chunk`` 0 is the plain step."""

    tokens: int
    vocab: int
    hidden: int
    dtype: str
    chunk: int
    ranks: int = 1

    def bytes_needed(self) -> int:
        """Return a generous estimate of the memory of the step with its inputs, over all ranks."""
        size = 2 if self.dtype == "bf16" else 4
        inputs = 2 * size * self.hidden * (self.vocab + self.ranks * self.tokens)
        held = self.chunk or self.tokens
        return inputs + PLAIN_BYTES[self.dtype] * min(held, self.tokens) * self.vocab + 8 * self.hidden * self.vocab


@dataclass(frozen=True)
class LossMemory:
    """Bytes above those before the step, and seconds of a step."""

    memory: int
    seconds: float


def _status(field: str) -> int:
    """Return a value of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}; run this on Linux")


def measure(case: LossCase, rank: int, meeting: str) -> LossMemory:
    """Take one measurement in this process, which must be new."""
    import torch

    from megatron_rlpt.policy.logprobs import vocab_parallel_logprobs

    torch.set_num_threads(1)
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_cuda else torch.device("cpu")
    group = None
    if case.ranks > 1:
        torch.distributed.init_process_group(
            "nccl" if on_cuda else "gloo", init_method=f"file://{meeting}", rank=rank, world_size=case.ranks
        )
        group = torch.distributed.group.WORLD
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[case.dtype]

    before = 0

    def step(tokens: int, vocab: int) -> float:
        rows = vocab // case.ranks
        # The same hidden states on every rank, as under tensor parallelism.
        torch.manual_seed(0)
        hidden = torch.empty(tokens, case.hidden, dtype=dtype, device=device).normal_().requires_grad_()
        targets = torch.randint(vocab, (tokens,), device=device)
        weight = torch.empty(rows, case.hidden, dtype=dtype, device=device).normal_(std=0.02).requires_grad_()
        nonlocal before
        before = _reset_peak()
        started = clock()
        if case.chunk:
            logprobs = vocab_parallel_logprobs(hidden, weight, targets, case.chunk, vocab=vocab, group=group)
        else:
            logits = torch.log_softmax(hidden @ weight.t(), dim=-1, dtype=torch.float32)
            logprobs = logits.gather(1, targets[:, None]).squeeze(1)
            del logits  # the graph holds what it needs
        logprobs.mean().backward()
        if on_cuda:
            torch.cuda.synchronize(device)
        return clock() - started

    def _reset_peak() -> int:
        if on_cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            return torch.cuda.memory_allocated(device)
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")

    clock = time.perf_counter if on_cuda else time.process_time
    step(8, 64)  # warm up: one-time set-up of libraries is not part of the step
    step(case.tokens, case.vocab)
    peak = torch.cuda.max_memory_allocated(device) if on_cuda else _status("VmHWM")
    memory = peak - before
    repeats = 3 if case.tokens <= MANY_TOKENS else 1
    return LossMemory(memory, min(step(case.tokens, case.vocab) for _ in range(repeats)))


def run(case: LossCase) -> LossMemory:
    """Take a measurement in new processes; return the larger value of the ranks."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--meeting", f"{folder}/meeting"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, env=environment, text=True)
            for rank in range(case.ranks)
        ]
        try:
            replies = [process.communicate()[0] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        for process in ranks:
            if process.returncode:
                raise SystemExit(f"{case} ended with exit code {process.returncode}")
    figures = [LossMemory(**json.loads(reply.splitlines()[-1])) for reply in replies]
    return LossMemory(max(figure.memory for figure in figures), max(figure.seconds for figure in figures))


def row(case: LossCase, plain: LossMemory | None, figures: Sequence[LossMemory | None]) -> str:
    """Return one line of the table."""
    cells = [f"{case.vocab:,}", f"{case.tokens:,}", case.dtype, f"{case.chunk:,}"]
    if plain:
        cells.append(f"{plain.memory / MIB:,.0f}")
    else:
        cells.append(f"does not fit (about {replace(case, chunk=0).bytes_needed() / 2**30:.0f} GiB)")
    for figure in figures:
        if figure is None:
            cells += ["not measured", "", ""]
            continue
        cells.append(f"{figure.memory / MIB:,.0f}")
        cells += (
            [f"{plain.memory / figure.memory:.1f}x", f"{figure.seconds / plain.seconds:.2f}"] if plain else ["", ""]
        )
    return "| " + " | ".join(cells) + " |"


def table(cases: Sequence[LossCase], limit: int, max_ranks: int) -> None:
    """Measure and print row by row."""
    names = ["vocabulary", "tokens", "dtype", "chunk", "plain MiB"]
    for layout in ("TP1", "TP2"):
        names += [f"{layout} MiB", f"{layout} less memory", f"{layout} time / plain"]
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names), flush=True)
    plains: dict[LossCase, LossMemory] = {}
    for case in cases:
        whole = replace(case, chunk=0)
        if whole not in plains and whole.bytes_needed() <= limit:
            plains[whole] = run(whole)
        figures: list[LossMemory | None] = []
        for ranks in (1, 2):
            split = replace(case, ranks=ranks)
            figures.append(run(split) if ranks <= max_ranks and split.bytes_needed() <= limit else None)
        print(row(case, plains.get(whole), figures), flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 128256], help="even sizes")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(PLAIN_BYTES), default=["bf16", "fp32"])
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--limit-gib", type=float, default=6.0, help="skip steps that would take more")
    for internal in ("--case", "--rank", "--meeting"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        figure = measure(LossCase(**json.loads(arguments.case)), int(arguments.rank), arguments.meeting)
        print(json.dumps(asdict(figure)))
        return
    import torch

    cases = [
        LossCase(tokens, vocab, arguments.hidden, dtype, chunk)
        for vocab, tokens, dtype, chunk in itertools.product(
            arguments.vocab, arguments.tokens, arguments.dtypes, arguments.chunks
        )
        if chunk <= tokens
    ]
    table(cases, int(arguments.limit_gib * 2**30), torch.cuda.device_count() if torch.cuda.is_available() else 2)


if __name__ == "__main__":
    main()
