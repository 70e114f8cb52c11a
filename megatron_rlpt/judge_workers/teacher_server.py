"""``rlpt teacher serve``: a vLLM server of the teacher that judge workers find by themselves.

The server is vLLM's own (``python -m vllm.entrypoints.openai.api_server``). What is added: it is announced in the
rollout buffer once it answers, for as long as it lives, and it ends with this process.
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
from megatron_rlpt.config import Config, EndpointConfig, RunIn, asks_teacher, needs_judge
from megatron_rlpt.distributed.addresses import LOOPBACK, free_port, here, is_loopback, reachable
from megatron_rlpt.distributed.processes import EndRequest, end_all, start_child
from megatron_rlpt.errors import BufferUnavailableError, ConfigError, ModelError, TeacherError
from megatron_rlpt.judge_workers.discovery import KIND, announcement, server_key
from megatron_rlpt.observe.log import get_logger
from megatron_rlpt.observe.machine import bf16_is_slow, has_gpu

_log = get_logger(__name__)

_SIGN_OF_LIFE = 5.0
"""Seconds between announcements; one that is three times as old counts no more."""
_GRACE = 15.0
"""Seconds the server has to end by itself."""
_KEY = "VLLM_API_KEY"
"""Variable in which vLLM's server looks for the key that it asks for."""
_BIND, _NO_BIND = "VLLM_CPU_OMP_THREADS_BIND", "nobind"
_UNIPROC = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
_DIVIDES = ("-tp", "-pp", "-dp")
"""Short names of arguments that divide a model; the long ones say ``parallel``."""
_PATIENCE = 60.0
"""Seconds without an answer of the server after which that is told, again and again."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""The server is on this machine; a proxy of the environment's is for others, and could not reach it."""


def serve_teacher(
    config: Config,
    *,
    host: str = LOOPBACK,
    port: int = 0,
    weight: float = 1.0,
    concurrency: int = 32,
    extra: Sequence[str] = (),
) -> None:
    """Run a server until SIGTERM, Ctrl-C or its own end.

    Args:
        config: that of the run; names the teacher and the buffer.
        host: address to listen on, and to be announced; with 0.0.0.0 or :: (all of them) the host name is announced.
        port: 0 chooses a free one.
        weight: relative share of requests.
        concurrency: most requests of one worker at once.
        extra: further arguments for vLLM's server.

    Raises:
        ConfigError: no worker would ask a server, or the key is on the command line, not set, or not sent by workers.
        ModelError: there is no such teacher.
        TeacherError: the server ended by itself; the message has its exit code.
    """
    _require_use(config)
    for argument in extra:
        check_argument("further arguments have", argument)
    key = server_key(config.teacher.workers.key_env)
    if not key and os.environ.get(_KEY):
        raise ConfigError(
            f"{_KEY} is set and teacher.workers.key_env is not, so that no worker would send the key; set "
            f"teacher.workers.key_env={_KEY}, for the workers as well"
        )
    if not os.path.isfile(os.path.join(config.teacher_path, "config.json")):
        raise ModelError(f"teacher.path is {config.teacher_path}; it needs to be a local Hugging Face folder")
    port = port or _free_port(host)
    name = f"{reachable(host)}:{port}"
    endpoint = EndpointConfig(url=f"http://{name}/v1", weight=weight, concurrency=concurrency)
    value = announcement(endpoint)
    if not key and not is_loopback(host):
        _log.warning("whoever reaches the server may ask it; set teacher.workers.key_env to ask for a key", host=host)
    with contextlib.closing(open_buffer(config)) as buffer:
        told = EndRequest()
        told.listen()
        environment = _environment(config, key)
        server = start_child(_command(config, host, port, extra, environment), env=environment)
        try:
            _log.info("starting a server of the teacher", model=config.teacher_path, url=endpoint.url)
            _keep_announced(server, buffer, name, value, f"http://{here(host)}:{port}/health", told)
            if not told.is_set():
                raise TeacherError(
                    f"the teacher's server ended by itself with exit code {server.wait()}; what it said is above"
                )
        finally:
            end_all([server], _GRACE)
            with contextlib.suppress(BufferUnavailableError):  # it runs out by itself
                buffer.withdraw(KIND, name)


def _require_use(config: Config) -> None:
    """Raises ConfigError: no worker of this configuration would ask a server."""
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
    told: EndRequest,
) -> None:
    """Announce the server while it answers; returns when it ended or is to end.

    A buffer that cannot be reached is no reason to end a server that took minutes to load.
    """
    began = answered = reminded = time.monotonic()
    announced = False
    while server.poll() is None and not told.is_set():
        if _is_healthy(health):
            answered = reminded = time.monotonic()
            try:
                buffer.announce(KIND, name, value, 3 * _SIGN_OF_LIFE)
                if not announced:
                    _log.info("the server answers and is announced", name=name, seconds=round(answered - began))
                announced = True
            except BufferUnavailableError as error:
                _log.warning("the server cannot be announced; trying on", name=name, why=str(error))
                announced = False
            told.wait(_SIGN_OF_LIFE)
            continue
        if (now := time.monotonic()) - reminded >= _PATIENCE:
            _log.warning("the server does not answer yet, or no more", name=name, seconds=round(now - answered))
            reminded = now
        told.wait(1.0)


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
        # Keep the model folder's generation_config.json from changing the sampling behind our back.
        "--generation-config",
        "vllm",
        # What comes later counts: all of this can be asked for otherwise.
        # Compiled kernels come two minutes later on a CPU and are a tenth faster there (tools/bench/teacher_start.py).
        *([] if has_gpu() else ["--enforce-eager"]),
        *(["--dtype", "float32"] if bf16_is_slow() else []),
        *(["--distributed-executor-backend", _UNIPROC] if _computes_in_its_engine(extra, environment) else []),
        *extra,
    ]


def _computes_in_its_engine(extra: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether the process of the server's engine can do without workers, each of which has to import vLLM first.

    On CPUs vLLM makes a worker even of the executor that has none (vllm/platforms/cpu.py), in order to bind threads to
    cores; not so where it is named by its class.
    """
    divided = any(
        argument.startswith(_DIVIDES) or (argument.startswith("--") and "parallel" in argument) for argument in extra
    )
    return not has_gpu() and environment[_BIND] == _NO_BIND and not divided


def _environment(config: Config, key: str) -> dict[str, str]:
    # The server has nothing to do with the buffer.
    environment = {name: value for name, value in os.environ.items() if name != PASSWORD_VARIABLE}
    if key:
        environment[_KEY] = key
    environment["VLLM_NO_USAGE_STATS"] = "1"
    # Read by vLLM on CPUs only, and whole GiB only.
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(config.teacher.kv_cache_gib))))
    environment.setdefault(_BIND, _NO_BIND)
    return environment


def _free_port(host: str) -> int:
    """Raises ConfigError: ``host`` is no address of this machine."""
    try:
        return free_port(host)
    except OSError as error:
        raise ConfigError(
            f"--host {host} is no address of this machine ({error.strerror}); allowed: one of its addresses, or "
            "0.0.0.0 for all of them"
        ) from None


# vLLM reads underscores as dashes, and takes what an argument begins with for the whole of it.
_REFUSED = {
    "--trust": "would run code from the model's folder, which is never done; leave it out",
    "--api-k": "would be on a command line, which every user of the machine can read; put the key into a variable and "
    "name that in teacher.workers.key_env",
}
"""How an argument begins -> why it is refused."""


def check_argument(where: str, argument: str) -> None:
    """Refuse an argument that runs code or shows a key; its value is not repeated.

    Args:
        where: says in errors where it stands, such as ``teacher.arguments has``.
        argument: one argument for vLLM's server.

    Raises:
        ConfigError: it is such.
    """
    name = argument.partition("=")[0]
    for start, why in _REFUSED.items():
        if name.replace("_", "-").startswith(start):
            raise ConfigError(f"{where} {name}, which {why}")
