"""What every vLLM engine in this project needs from its surroundings, in one place.

vLLM reads process-wide state while an engine is built (environment variables) and leaves process-wide state behind
(reseeded random generators, a disabled ``torch.set_num_threads``, more environment variables). A trainer that shares
the process must see neither, and two engines (policy and teacher) must not see each other's settings.
"""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHER_PREFIXES = ("GROUP_", "ROLE_", "TORCHELASTIC_")
"""What torchrun sets beside them. With its TORCHELASTIC_USE_AGENT_STORE every new store waits for a server that
somebody else runs (torch/distributed/rendezvous.py), and an engine would wait for ever. Slurm's variables stay: neither
vLLM nor torch reads them."""

_START_UP_SHARE = 0.01
"""``gpu_memory_utilization``: the share of a GPU's memory that has to be free when an engine starts, 0.92 by default,
which no GPU has beside a policy. vLLM checks it in any case (vllm/v1/worker/utils.py: request_memory). Beside
``kv_cache_memory_bytes`` it has no other effect: the size of the cache is then returned before the budget is looked at
(vllm/v1/worker/gpu_worker.py: determine_available_memory)."""


@contextmanager
def vllm_environment(
    kv_cache_gib: float, *, in_process: bool = True, gpu: int | None = None
) -> Iterator[dict[str, Any]]:
    """Build a vLLM engine inside this block; environment, random state and thread count are restored after it.

    Use it as ``with vllm_environment(1.0) as arguments: llm = LLM(model=..., **arguments)``.

    Args:
        kv_cache_gib: memory for the engine's key-value cache in GiB; fractions are fine.
        in_process: run the engine core in this process. False starts it in a process of its own, which is needed
            beside a ``torch.distributed`` world of more than one rank. The program's entry script then needs its
            ``if __name__ == "__main__"``.
        gpu: the only GPU the engine may see, as this process counts them; only for a process of its own. None is the
            GPU this process works on: a process that sees them all would take the first, as those of all ranks would.

    Yields:
        The keyword arguments of ``vllm.LLM`` that belong to this environment.
    """
    import numpy
    import torch

    # An engine tears down vLLM's process-wide groups when it is collected, whoever uses them by then. One that nothing
    # refers to any more has to go before the new one is there (engines are cyclic garbage: they wait for a collection).
    gc.collect()
    environment = dict(os.environ)
    python_state, numpy_state, torch_state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
    # The default pins OpenMP threads to cores; the training threads of this machine need those cores too.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    # Whole GiB only, and it overrides kv_cache_memory_bytes (vllm/platforms/cpu.py), which is used below instead.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # Read when vllm is first imported; a user who wants more sets it. Its warnings are about what we do on purpose
    # (no tokenizer, tied output layers that get no weights of their own), with tracebacks.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not in_process:
        # A fork would keep the world's sockets open, and its peers would not see this process end.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        if gpu is None and torch.cuda.is_available():
            gpu = torch.cuda.current_device()
        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = _visible_gpu(gpu)
    # vLLM would take the trainer's world for its own.
    for name in list(os.environ):
        if name in _LAUNCHER_VARIABLES or name.startswith(_LAUNCHER_PREFIXES):
            del os.environ[name]
    # The first engine of a process freezes vLLM's view of the environment (vllm/envs.py: enable_envs_cache).
    if (envs := sys.modules.get("vllm.envs")) is not None:
        envs.disable_envs_cache()
    # To import vLLM makes a million objects that stay: collections meanwhile look at them again and again for nothing.
    collects = gc.isenabled()
    gc.disable()
    try:
        arguments: dict[str, Any] = {
            # No compilation and no CUDA graphs: start-up in seconds, and the same kernels whatever the batch.
            "enforce_eager": True,
            # Keep the model folder's generation_config.json from changing the sampling behind our back.
            "generation_config": "vllm",
            "use_tqdm_on_load": False,
            "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
        }
        if torch.cuda.is_available():
            arguments["gpu_memory_utilization"] = _START_UP_SHARE
        else:
            # A prompt prefilled in parts rewinds its seeded generator, which CPU generators cannot do: "CPU Generator
            # does not use offset" (vllm/v1/worker/gpu_model_runner.py: _bookkeeping_sync).
            arguments["enable_chunked_prefill"] = False
            if not in_process:
                from vllm.v1.executor.uniproc_executor import UniProcExecutor

                # By name, vllm/platforms/cpu.py turns it into one more process, to bind threads to cores, which we do
                # not want; that process would start as slowly as the engine's and not end with it.
                arguments["distributed_executor_backend"] = UniProcExecutor
        yield arguments
    finally:
        if collects:
            gc.enable()
        os.environ.clear()
        os.environ.update(environment)
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        # The CPU worker replaces the function itself (vllm/v1/worker/cpu_worker.py: init_device).
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)


def generate_in_one_batch(llm: Any, prompts: Sequence[Any], parameters: Sequence[Any]) -> list[Any]:
    """``llm.generate``, with all requests there before the first of them is begun.

    An engine in a process of its own begins with what has arrived, so that chance decides which requests are computed
    together, and with that the last bits of their log-probabilities. Paused meanwhile, it begins with all of them.

    Args:
        llm: a ``vllm.LLM``.
        prompts: what ``llm.generate`` takes.
        parameters: sampling parameters of each prompt.

    Returns:
        vLLM's outputs, in the order of ``prompts``.
    """
    core = llm.llm_engine.engine_core
    call: Callable[..., Any] = getattr(core, "call_utility", lambda *_: None)  # an engine in this process has none
    call("pause_scheduler", "keep", False)
    try:
        llm.enqueue(prompts, parameters, use_tqdm=False)
    finally:
        call("resume_scheduler")
    return list(llm.wait_for_completion(use_tqdm=False))


def _visible_gpu(index: int) -> str:
    """What CUDA_VISIBLE_DEVICES must be for a child process to see only the GPU that is ``index`` here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)
