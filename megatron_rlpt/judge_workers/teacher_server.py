"""``rlpt teacher serve``: run a vLLM server of a model of the teacher and announce it to judge workers.

The server is vLLM's own (``python -m vllm.entrypoints.openai.api_server``). This module announces it in the rollout
buffer, with the roles of its model, while it answers, and ends it with this process. Two models with the same base, of
which one or both are LoRA adapters, are on one server, which is announced once for each.
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
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rlpt.buffer.open import PASSWORD_VARIABLE, open_buffer
from megatron_rlpt.buffer.protocol import RolloutBuffer
from megatron_rlpt.config import (
    Config,
    Dtype,
    EndpointConfig,
    Role,
    RoleModel,
    RunIn,
    model_of,
    models_asked,
    needs_judge,
)
from megatron_rlpt.distributed.addresses import LOOPBACK, free_port, here, is_loopback, reachable
from megatron_rlpt.distributed.processes import EndRequest, end_all, start_child
from megatron_rlpt.errors import BufferUnavailableError, ConfigError, ModelError, TeacherError
from megatron_rlpt.judge_workers.discovery import KIND, announcement, server_key
from megatron_rlpt.models.adapters import Adapter, read_adapter, whole_model
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
_MAY_USE_AMX = "megatron_rlpt.rollout.vllm.amx.MayUseAmx"
_PARALLEL = ("-tp", "-pp", "-dp")
"""Short names of parallelism arguments; the long ones contain ``parallel``."""
_REMINDER = 60.0
"""Seconds between warnings while the server does not answer."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Ignores proxies of the environment, which could not reach a server on this machine."""


def serve_teacher(
    config: Config,
    *,
    role: Role | None = None,
    host: str = LOOPBACK,
    port: int = 0,
    weight: float = 1.0,
    concurrency: int = 32,
    extra: Sequence[str] = (),
) -> None:
    """Run a server until SIGTERM, Ctrl-C or its exit.

    Args:
        config: the run's configuration; names the teacher and the buffer.
        role: whose model to serve; None for all that fit on one server.
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
    served = Served.of(_models_to_serve(config, role))
    for argument in extra:
        check_argument("further arguments have", argument)
    key = server_key(config.teacher.workers.key_env)
    if not key and os.environ.get(_KEY):
        raise ConfigError(
            f"{_KEY} is set and teacher.workers.key_env is not, so no worker would send the key; set "
            f"teacher.workers.key_env={_KEY}, for the workers as well"
        )
    port = port or _free_port(host)
    name = f"{reachable(host)}:{port}"
    endpoint = EndpointConfig(url=f"http://{name}/v1", weight=weight, concurrency=concurrency)
    values = served.announcements(name, endpoint)
    if not key and not is_loopback(host):
        _log.warning("server without a key; set teacher.workers.key_env to require one", host=host)
    with contextlib.closing(open_buffer(config)) as buffer:
        request = EndRequest()
        request.listen()
        environment = _environment(config, key)
        server = start_child(_command(config, served, host, port, extra, environment), env=environment)
        try:
            _log.info("starting teacher server", model=served.paths, roles=served.roles, url=endpoint.url)
            _keep_announced(server, buffer, values, f"http://{here(host)}:{port}/health", request)
            if not request.is_set():
                raise TeacherError(f"the teacher's server exited with code {server.wait()}; see its output above")
        finally:
            end_all([server], _GRACE)
            with contextlib.suppress(BufferUnavailableError):  # announcements expire
                for one in values:
                    buffer.withdraw(KIND, one)


@dataclass(frozen=True)
class Served:
    """What one server serves: a whole model, and LoRA adapters of it."""

    base: Path
    """Hugging Face folder that vLLM loads."""
    models: tuple[RoleModel, ...]
    """The models asked of the server: the base, adapters of it, or both."""
    adapters: tuple[Adapter, ...]

    @classmethod
    def of(cls, models: Sequence[RoleModel]) -> Served:
        """Return what to load for ``models``, which share their base.

        Raises:
            ModelError: a folder holds neither a model nor an adapter of a local one.
        """
        for model in models:
            if not model.path or not _is_model(model.path):
                raise ModelError(f"{model.key} is {model.path or 'empty'}; it needs to be a local Hugging Face folder")
        adapters = tuple(filter(None, (read_adapter(model.path) for model in models)))
        return cls(whole_model(models[0].path), tuple(models), adapters)

    @property
    def paths(self) -> str:
        """Folders of the models, for the log."""
        return ", ".join(model.path for model in self.models)

    @property
    def roles(self) -> str:
        """Roles of the models, for the log."""
        return ", ".join(role for model in self.models for role in model.roles)

    @property
    def base_name(self) -> str:
        """Name under which the base is served."""
        return os.path.basename(os.path.abspath(self.base))

    @property
    def max_context(self) -> int:
        """Longest prompt plus answer of any of the models, in tokens."""
        return max(model.max_context for model in self.models)

    def announcements(self, name: str, endpoint: EndpointConfig) -> dict[str, str]:
        """Return name -> value to announce, one for each model; ``name`` and ``endpoint`` are of the server."""
        found = {}
        for model in self.models:
            adapter = read_adapter(model.path)
            own = replace(endpoint, model=adapter.name if adapter else self.base_name if self.adapters else "")
            found[name if len(self.models) == 1 else f"{name}/{model.who}"] = announcement(own, model.roles)
        return found

    def arguments(self) -> list[str]:
        """Return the arguments of vLLM's server for the models."""
        found = ["--model", str(self.base), "--served-model-name", self.base_name]
        found += ["--max-model-len", str(self.max_context)]
        if self.adapters:
            room = max(adapter.room for adapter in self.adapters)
            found += ["--enable-lora", "--max-loras", str(len(self.adapters)), "--max-lora-rank", str(room)]
            found += ["--lora-modules", *(f"{adapter.name}={adapter.folder}" for adapter in self.adapters)]
        return found


def _is_model(path: str) -> bool:
    return (whole_model(path) / "config.json").is_file()


def _models_to_serve(config: Config, role: Role | None) -> list[RoleModel]:
    """Return the models to serve, with all roles that they have.

    Raises:
        ConfigError: no worker of this configuration would use a server, of ``role`` if one is given, or the run asks
            two models that do not fit on one server, and none is chosen.
        ModelError: an adapter cannot be used.
    """
    if config.teacher.run_in is not RunIn.workers:
        raise ConfigError(
            f"teacher.run_in is {config.teacher.run_in.name}; allowed: workers, because only they ask a server"
        )
    if config.teacher.workers.own_model:
        raise ConfigError("teacher.workers.own_model is true; allowed: false, else workers ask no server")
    asked = models_asked(config)
    if not asked:
        raise ConfigError(
            f"{_idle_judge(config)}, and candidates.rewrite is false; allowed: something that a server of the teacher "
            "is asked for"
        )
    if role is not None and not any(model.has(role) for model in asked):
        idle = "candidates.rewrite is false" if role is Role.rewriter else _idle_judge(config)
        raise ConfigError(f"--role is {role}, and {idle}; allowed: --role {asked[0].roles[0]}, or none")
    if role is None and len(asked) > 1:
        if len({os.path.realpath(whole_model(model.path)) if model.path else "" for model in asked}) > 1:
            models = " or ".join(f"--role {model.who} ({model.path or 'on other servers'})" for model in asked)
            raise ConfigError(f"the run asks two models, and a server has one; choose {models}")
        return [model_of(config, model.roles[0]) for model in asked]
    return [model_of(config, role or asked[0].roles[0])]


def _idle_judge(config: Config) -> str:
    if needs_judge(config):
        return f"teacher.judge is {config.teacher.judge}, which asks no teacher"
    return f"objective.name is {config.objective.name}, which needs no judge"


def _keep_announced(
    server: subprocess.Popen[bytes],
    buffer: RolloutBuffer,
    values: Mapping[str, str],
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
                for name, value in values.items():
                    buffer.announce(KIND, name, value, 3 * _HEARTBEAT)
                if not announced:
                    _log.info("server ready and announced", name=", ".join(values), seconds=round(answered - began))
                announced = True
            except BufferUnavailableError as error:
                _log.warning("cannot announce the server; retrying", name=", ".join(values), reason=str(error))
                announced = False
            request.wait(_HEARTBEAT)
            continue
        if (now := time.monotonic()) - reminded >= _REMINDER:
            _log.warning("server does not answer", name=", ".join(values), seconds=round(now - answered))
            reminded = now
        request.wait(1.0)


def _is_healthy(address: str) -> bool:
    try:
        with _DIRECT.open(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False


def _command(
    config: Config, served: Served, host: str, port: int, extra: Sequence[str], environment: Mapping[str, str]
) -> list[str]:
    return [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        *served.arguments(),
        "--host",
        host,
        "--port",
        str(port),
        # Keep the model folder's generation_config.json from changing the sampling.
        "--generation-config",
        "vllm",
        "--enable-prompt-tokens-details",  # how many tokens of a prompt were cached
        # Later arguments win, so ``extra`` can override all of this.
        # Compiled kernels take two more minutes on a CPU and are a tenth faster (tools/bench/teacher_start.py).
        *([] if has_gpu() else ["--enforce-eager", "--worker-extension-cls", _MAY_USE_AMX]),
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
