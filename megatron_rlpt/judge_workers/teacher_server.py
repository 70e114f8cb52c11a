"""``rlpt teacher serve``: run a vLLM server of the teacher and announce it to judge workers.

The server is vLLM's own (``python -m vllm.entrypoints.openai.api_server``). This module announces it in the rollout
buffer while it answers, and ends it with this process.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence

from megatron_rlpt.buffer.open import PASSWORD_VARIABLE, open_buffer
from megatron_rlpt.buffer.protocol import RolloutBuffer
from megatron_rlpt.config import Config, Dtype, EndpointConfig, RunIn, asks_teacher, needs_judge
from megatron_rlpt.distributed.addresses import LOOPBACK, free_port, here, is_loopback, reachable
from megatron_rlpt.distributed.processes import EndRequest, end_all, start_child
from megatron_rlpt.errors import BufferUnavailableError, ConfigError, ModelError, TeacherError
from megatron_rlpt.judge_workers.discovery import KIND, announcement, server_key
from megatron_rlpt.observe.log import get_logger
from megatron_rlpt.observe.machine import has_gpu
from megatron_rlpt.observe.precision import resolve_dtypes

_log = get_logger(__name__)

_HEARTBEAT = 5.0
"""Seconds between announcements; one expires at three times that age."""
_GRACE = 15.0
"""Seconds that the server has to exit after SIGTERM."""
_KEY = "VLLM_API_KEY"
"""Environment variable with the key that vLLM's server requires."""
_BIND, _NO_BIND = "VLLM_CPU_OMP_THREADS_BIND", "nobind"
_UNIPROC = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
_PARALLEL = ("-tp", "-pp", "-dp")
"""Short names of parallelism arguments; the long ones contain ``parallel``."""
_REMINDER = 60.0
"""Seconds between warnings while the server does not answer."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Ignores proxies of the environment, which could not reach a server on this machine."""


def serve_teacher(
    config: Config,
    *,
    host: str = LOOPBACK,
    port: int = 0,
    weight: float = 1.0,
    concurrency: int = 32,
    extra: Sequence[str] = (),
) -> None:
    """Run a server until SIGTERM, Ctrl-C or its exit.

    Args:
        config: the run's configuration; names the teacher and the buffer.
        host: address to listen on and announce; for 0.0.0.0 or :: (all addresses), announces the host name.
        port: 0 for a free one.
        weight: relative share of requests.
        concurrency: maximum concurrent requests per worker.
        extra: further arguments for vLLM's server.

    Raises:
        ConfigError: no worker would use a server, or the key is on the command line, not set, or not sent by workers.
        ModelError: the teacher's folder does not exist.
        TeacherError: the server exited; the message has its exit code.
    """
    config = resolve_dtypes(config)
    _require_use(config)
    for argument in extra:
        check_argument("further arguments have", argument)
    key = server_key(config.teacher.workers.key_env)
    if not key and os.environ.get(_KEY):
        raise ConfigError(
            f"{_KEY} is set and teacher.workers.key_env is not, so no worker would send the key; set "
            f"teacher.workers.key_env={_KEY}, for the workers as well"
        )
    if not os.path.isfile(os.path.join(config.teacher_path, "config.json")):
        raise ModelError(f"teacher.path is {config.teacher_path}; it needs to be a local Hugging Face folder")
    port = port or _free_port(host)
    name = f"{reachable(host)}:{port}"
    endpoint = EndpointConfig(url=f"http://{name}/v1", weight=weight, concurrency=concurrency)
    value = announcement(endpoint)
    if not key and not is_loopback(host):
        _log.warning("server without a key; set teacher.workers.key_env to require one", host=host)
    with contextlib.closing(open_buffer(config)) as buffer:
        request = EndRequest()
        request.listen()
        environment = _environment(config, key)
        server = start_child(_command(config, host, port, extra, environment), env=environment)
        try:
            _log.info("starting teacher server", model=config.teacher_path, url=endpoint.url)
            _keep_announced(server, buffer, name, value, f"http://{here(host)}:{port}/health", request)
            if not request.is_set():
                raise TeacherError(f"the teacher's server exited with code {server.wait()}; see its output above")
        finally:
            end_all([server], _GRACE)
            with contextlib.suppress(BufferUnavailableError):  # the announcement expires
                buffer.withdraw(KIND, name)


def _require_use(config: Config) -> None:
    """Raise ConfigError if no worker of this configuration would use a server."""
    if config.teacher.run_in is not RunIn.workers:
        raise ConfigError(
            f"teacher.run_in is {config.teacher.run_in.name}; allowed: workers, because only they ask a server"
        )
    if config.teacher.workers.own_model:
        raise ConfigError("teacher.workers.own_model is true; allowed: false, else workers ask no server")
    if not asks_teacher(config):
        judged = needs_judge(config)
        idle = (
            f"teacher.judge is {config.teacher.judge}, which asks no teacher"
            if judged
            else f"objective.name is {config.objective.name}, which needs no judge"
        )
        raise ConfigError(
            f"{idle}, and candidates.rewrite is false; allowed: something that a server of the teacher is asked for"
        )


def _keep_announced(
    server: subprocess.Popen[bytes],
    buffer: RolloutBuffer,
    name: str,
    value: str,
    health: str,
    request: EndRequest,
) -> None:
    """Announce the server while it answers; return when it has exited or should.

    Keeps the server if the buffer is unreachable, because it took minutes to load.
    """
    began = answered = reminded = time.monotonic()
    announced = False
    while server.poll() is None and not request.is_set():
        if _is_healthy(health):
            answered = reminded = time.monotonic()
            try:
                buffer.announce(KIND, name, value, 3 * _HEARTBEAT)
                if not announced:
                    _log.info("server ready and announced", name=name, seconds=round(answered - began))
                announced = True
            except BufferUnavailableError as error:
                _log.warning("cannot announce the server; retrying", name=name, reason=str(error))
                announced = False
            request.wait(_HEARTBEAT)
            continue
        if (now := time.monotonic()) - reminded >= _REMINDER:
            _log.warning("server does not answer", name=name, seconds=round(now - answered))
            reminded = now
        request.wait(1.0)


def _is_healthy(address: str) -> bool:
    try:
        with _DIRECT.open(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def _command(config: Config, host: str, port: int, extra: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    return [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        config.teacher_path,
        "--served-model-name",
        os.path.basename(os.path.abspath(config.teacher_path)),
        "--host",
        host,
        "--port",
        str(port),
        "--max-model-len",
        str(config.teacher.max_context),
        # Keep the model folder's generation_config.json from changing the sampling.
        "--generation-config",
        "vllm",
        "--enable-prompt-tokens-details",  # how many tokens of a prompt were cached
        # Later arguments win, so ``extra`` can override all of this.
        # Compiled kernels take two more minutes on a CPU and are a tenth faster (tools/bench/teacher_start.py).
        *([] if has_gpu() else ["--enforce-eager"]),
        *(["--dtype", "float32"] if config.teacher.dtype is Dtype.fp32 else []),
        *(["--distributed-executor-backend", _UNIPROC] if _needs_no_worker_process(extra, environment) else []),
        *extra,
    ]


def _needs_no_worker_process(extra: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Return True if the engine process needs no worker process, which would have to import vLLM first.

    On CPUs vLLM replaces the uniprocess executor by one with a worker (vllm/platforms/cpu.py), in order to bind threads
    to cores, but not if the executor is named by its class.
    """
    parallel = any(
        argument.startswith(_PARALLEL) or (argument.startswith("--") and "parallel" in argument) for argument in extra
    )
    return not has_gpu() and environment[_BIND] == _NO_BIND and not parallel


def _environment(config: Config, key: str) -> dict[str, str]:
    # The server does not need the buffer's password.
    environment = {name: value for name, value in os.environ.items() if name != PASSWORD_VARIABLE}
    if key:
        environment[_KEY] = key
    environment["VLLM_NO_USAGE_STATS"] = "1"
    # Used by vLLM only on CPUs, in whole GiB.
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(config.teacher.kv_cache_gib))))
    environment.setdefault(_BIND, _NO_BIND)
    return environment


def _free_port(host: str) -> int:
    """Return a free port; raise ConfigError if ``host`` is not an address of this machine."""
    try:
        return free_port(host)
    except OSError as error:
        raise ConfigError(
            f"--host {host} is not an address of this machine ({error.strerror}); allowed: one of its addresses, or "
            "0.0.0.0 for all of them"
        ) from None


# vLLM reads underscores as dashes, and accepts any unique prefix of an argument.
_REFUSED_ARGUMENTS = {
    "--trust": "would run code from the model's folder, which is never done; leave it out",
    "--api-k": "would be on a command line, which every user of the machine can read; put the key into a variable and "
    "name that in teacher.workers.key_env",
}
"""Prefix of an argument -> why it is refused."""


def check_argument(where: str, argument: str) -> None:
    """Refuse an argument that runs code or exposes a key; its value is not repeated.

    Args:
        where: beginning of the error, such as ``teacher.arguments has``.
        argument: one argument for vLLM's server.

    Raises:
        ConfigError: the argument is refused.
    """
    name = argument.partition("=")[0]
    for start, why in _REFUSED_ARGUMENTS.items():
        if name.replace("_", "-").startswith(start):
            raise ConfigError(f"{where} {name}, which {why}")
