"""The process state in which vLLM engines are built, set up before and restored after.

vLLM reads process-wide state while an engine is built (environment variables) and changes process-wide state (reseeded
random generators, a disabled ``torch.set_num_threads``, more environment variables). A trainer in the same process must
see neither, and two engines (policy and teacher) must not see each other's settings.
"""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from megatron_rlpt.rollout.placement import IN_THIS_PROCESS, EngineMode, EnginePlace
from megatron_rlpt.rollout.vllm.shared_memory import own_shared_memory

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHER_PREFIXES = ("GROUP_", "ROLE_", "TORCHELASTIC_")
"""Further variables of torchrun. With its TORCHELASTIC_USE_AGENT_STORE every new store waits for a server that another
process runs (torch/distributed/rendezvous.py), so an engine would wait forever. Slurm's variables stay: neither vLLM
nor torch reads them."""

_START_UP_SHARE = 0.01
"""``gpu_memory_utilization``: the share of a GPU's memory that must be free when an engine starts. The default of 0.92
is never free on a GPU that also holds a policy, and vLLM always checks it (vllm/v1/worker/utils.py: request_memory). It
has no other effect with ``kv_cache_memory_bytes`` (vllm/v1/worker/gpu_worker.py: determine_available_memory)."""


CPU_BLOCK_TOKENS = 32
"""Tokens per cache block on CPU. With vLLM's default of 128, the K rollouts of an episode, or a judge's questions about
it, could not share a prefix that is shorter than that."""


@contextmanager
def vllm_environment(
    kv_cache_gib: float, place: EnginePlace = IN_THIS_PROCESS, *, eager: bool = True
) -> Iterator[dict[str, Any]]:
    """Set up the state for building a vLLM engine; restore environment, random state and thread count afterwards.

    Use it as ``with vllm_environment(1.0) as arguments: llm = LLM(model=..., **arguments)``.

    Args:
        kv_cache_gib: memory for the engine's key-value cache in GiB; may be a fraction.
        place: where the engine runs. With a process of its own, the program's entry script needs its
            ``if __name__ == "__main__"``. That process sees only the engine's GPUs, by default the current one: if the
            engines of all ranks saw all GPUs, each would take the first.
        eager: launch kernels one by one; False replays CUDA graphs in decoding, on GPUs.

    Yields:
        The keyword arguments of ``vllm.LLM`` for this environment.
    """
    import numpy
    import torch

    # An engine tears down vLLM's process-wide groups when it is collected, even if a newer engine uses them. Engines
    # are cyclic garbage, so collect unreferenced ones before building a new one.
    gc.collect()
    environment = dict(os.environ)
    python_state, numpy_state, torch_state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()

    in_process = place.mode.in_process
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
    # The default pins OpenMP threads to cores that the training threads need too.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    # Takes whole GiB only and would override kv_cache_memory_bytes below (vllm/platforms/cpu.py).
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # Read when vllm is first imported; users can set it. vLLM's warnings, with tracebacks, are about intended settings
    # (no tokenizer, tied output layers without weights).
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not in_process:
        # Set for the trainer's collectives (policy/device_runtime.py); an engine's kernels may overlap.
        os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
        # A fork would keep the sockets of the process groups open, so peers would not notice that this process ended.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        gpus = place.gpus or ((torch.cuda.current_device(),) if torch.cuda.is_available() else ())
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(_visible_gpu, gpus))
    # vLLM would otherwise join the trainer's world.
    for name in list(os.environ):
        if name in _LAUNCHER_VARIABLES or name.startswith(_LAUNCHER_PREFIXES):
            del os.environ[name]
    if place.mode is EngineMode.IN_RANKS:
        # Here it has to join, also one that Slurm started; it cuts the world into groups of consecutive ranks.
        device = torch.cuda.current_device() if torch.cuda.is_available() else place.rank
        os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world), LOCAL_RANK=str(device))
    # The first engine of a process freezes vLLM's view of the environment (vllm/envs.py: enable_envs_cache).
    if (envs := sys.modules.get("vllm.envs")) is not None:
        envs.disable_envs_cache()
    # Importing vLLM creates a million lasting objects, which every collection meanwhile would scan in vain.
    collects = gc.isenabled()
    gc.disable()
    try:
        arguments: dict[str, Any] = {
            # Ignore the model folder's generation_config.json, which would change the sampling.
            "generation_config": "vllm",
            "use_tqdm_on_load": False,
            "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
            "tensor_parallel_size": place.tensor,
            "enable_expert_parallel": place.expert > 1,
        }
        if place.mode is EngineMode.IN_RANKS:
            arguments["distributed_executor_backend"] = "external_launcher"
        elif place.tensor > 1:
            from megatron_rlpt.rollout.vllm.executor import WatchedExecutor

            arguments["distributed_executor_backend"] = WatchedExecutor
        if eager or not torch.cuda.is_available():
            # Starts in seconds, and kernels do not depend on the batch.
            arguments["enforce_eager"] = True
        else:
            arguments["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        if torch.cuda.is_available():
            arguments["gpu_memory_utilization"] = _START_UP_SHARE
        else:
            # Chunked prefill rewinds the seeded generator of a request, which CPU generators do not support: "CPU
            # Generator does not use offset" (vllm/v1/worker/gpu_model_runner.py: _bookkeeping_sync).
            arguments["enable_chunked_prefill"] = False
            arguments["block_size"] = CPU_BLOCK_TOKENS
            if not in_process and place.tensor == 1:
                from vllm.v1.executor.uniproc_executor import UniProcExecutor

                # Given by name, vllm/platforms/cpu.py replaces it by one more process that binds threads to cores. That
                # process would double the start-up time and not end with the engine's.
                arguments["distributed_executor_backend"] = UniProcExecutor
        in_ranks_of_a_cpu = place.mode is EngineMode.IN_RANKS and not torch.cuda.is_available()
        with own_shared_memory() if in_ranks_of_a_cpu else nullcontext():
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


def generate_in_one_batch(llm: Any, prompts: Sequence[Any], parameters: Sequence[Any], **options: Any) -> list[Any]:
    """Run ``llm.generate`` with all requests queued before the first one starts.

    An engine in a separate process starts with the requests that have arrived, so timing would decide which requests
    are computed together and thereby the rounding of their log-probabilities. Pausing it meanwhile avoids that.

    Args:
        llm: a ``vllm.LLM``.
        prompts: as for ``llm.generate``.
        parameters: sampling parameters of each prompt.
        options: further arguments of ``llm.enqueue``.

    Returns:
        vLLM's outputs, in the order of ``prompts``.
    """
    core = llm.llm_engine.engine_core
    call: Callable[..., Any] = getattr(core, "call_utility", lambda *_: None)  # absent for an engine in this process
    call("pause_scheduler", "keep", False)
    try:
        llm.enqueue(prompts, parameters, use_tqdm=False, **options)
    finally:
        call("resume_scheduler")
    return list(llm.wait_for_completion(use_tqdm=False))


def _visible_gpu(index: int) -> str:
    """Return the CUDA_VISIBLE_DEVICES with which a child process sees only GPU ``index`` of this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)
