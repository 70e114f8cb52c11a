"""What each of two ranks does in ``test_engine_process.py``: the rollout engine of a world; results as JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from rollout_contract import LENGTH, prompts
from tiny_runs import tiny_config

from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import EngineError
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.models.huggingface import WeightFolder
from megatron_rlpt.policy.layout import Layout
from megatron_rlpt.rollout.distributed_engine import DistributedEngine
from megatron_rlpt.rollout.placement import EngineMode, EnginePlace
from megatron_rlpt.rollout.vllm import engine as vllm_engine
from megatron_rlpt.rollout.vllm.engine import _MOST_RESTARTS, start_policy_engine
from megatron_rlpt.rollout.vllm.process import EngineProcess
from megatron_rlpt.trainer.gpu_memory import build_gpu_memory
from megatron_rlpt.trainer.stop import STOP_SIGNALS


def gathered(folder, break_at=None):
    """Yield the weights of a folder like a sharded policy: every tensor takes a collective of both ranks."""
    for index, (name, tensor) in enumerate(WeightFolder(Path(folder)).stream(read_architecture(Path(folder)))):
        torch.distributed.all_reduce(torch.ones(1))
        yield name, tensor[:-1] if index == break_at else tensor


def shared_memory_in_use():
    links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if entry.is_symlink()]
    return [link for link in links if link.startswith("/dev/shm")]


def error_of(call, *arguments):
    try:
        call(*arguments)
    except EngineError as error:
        return str(error)
    return None


def ask_slowly(own):
    """Make requests arrive one by one, as on a busy machine."""
    core = own._llm.llm_engine.engine_core
    add = core.add_request

    def add_slowly(request):
        time.sleep(0.02)
        add(request)

    core.add_request = add_slowly


class DyingAtFirst(EngineProcess):
    """Kills the first process that it watches before that computes anything."""

    is_first = True

    def __init__(self, *arguments):
        super().__init__(*arguments)
        if DyingAtFirst.is_first:
            DyingAtFirst.is_first = False
            self.end()


def die_during_two_calls(own, results):
    """Stop the process of the engine during a call, and kill it once a generation is waiting as well.

    Returns the thread of the first call.
    """

    def ask():
        with own._calling():
            own._llm.collective_rpc("rlpt_buffer_digests")

    process = own._process._processes[0]
    core, sent = own._llm.llm_engine.engine_core, threading.Event()
    send = core._send_input

    def send_and_tell(*arguments):
        send(*arguments)
        sent.set()

    core._send_input = send_and_tell
    os.kill(process.pid, signal.SIGSTOP)
    asking = threading.Thread(target=lambda: results.update({"death during a request": error_of(ask)}))
    asking.start()
    sent.wait(60)  # two threads that send through one socket at once abort the process
    own._drop_prefix_cache = lambda: None  # else the generation would wait for this first
    threading.Timer(2.0, process.kill).start()
    return asking


def main(served, other, corpus, out):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    config = tiny_config(
        out / f"config-{rank}.yaml",
        served,
        corpus,
        out / "run",
        model={"dtype": "fp32"},
        data={"max_prefix": 56},
        rollout={"kv_cache_gib": 0.02, "max_batch": 32, "sync_bucket_mib": 1},
    )
    results = {"torchrun": os.environ["TORCHELASTIC_USE_AGENT_STORE"]}
    ranks = Ranks(rank, Layout(world=2), timeout=300.0)
    place = EnginePlace(EngineMode.OWN_PROCESS)
    vllm_engine.EngineProcess = DyingAtFirst
    engine = DistributedEngine(lambda: start_policy_engine(config, place), groups=[[0]], ranks=ranks)
    results["torchrun variables kept"] = os.environ["WORLD_SIZE"]
    results["has an engine"] = engine.own is not None
    results["restarts at the start"] = engine.own._restarts if engine.own else 0

    def sampled(version):
        return [[r.tokens, r.logprobs] for r in engine.generate(prompts(), LENGTH, version)]

    if engine.own:
        # As where a scheduler sends them to every process of a job; the trainer has its last step to make.
        for number in STOP_SIGNALS:
            os.kill(engine.own._process._processes[0].pid, number)
    engine.self_check(lambda: gathered(served), 0)
    results["first"] = sampled(0)

    if engine.own:
        ask_slowly(engine.own)
    results["first, asked slowly"] = sampled(0)
    results["wrong update"] = error_of(engine.update_weights, gathered(served, break_at=4), 1)
    results["version after a wrong update"] = engine.version
    results["refused"] = error_of(sampled, 0)
    results["left in shared memory"] = shared_memory_in_use()

    began = time.monotonic()
    engine.update_weights(gathered(other), 1)
    results["update seconds"] = time.monotonic() - began
    results["second"] = sampled(1)
    with build_gpu_memory(config, engine, None, ranks).training():
        results["version while training"] = engine.version

    asking = die_during_two_calls(engine.own, results) if engine.own else None
    results["after death"] = sampled(1)
    if asking:
        asking.join()
    if engine.own:
        engine.own._restarts = _MOST_RESTARTS
        engine.own._process.end()
    results["death"] = error_of(sampled, 1)
    results["after the last death"] = error_of(engine.update_weights, gathered(served), 2)
    (out / f"rank-{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
