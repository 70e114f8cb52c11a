"""``rlpt teacher serve`` with a fake vLLM: announced in any environment, and kept alive."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_vllm_server import write_fake_vllm
from redis_server import RedisServer

from megatron_rlpt.buffer.open import open_url
from megatron_rlpt.config import EndpointConfig, Role, load_config, model_of
from megatron_rlpt.errors import ModelError
from megatron_rlpt.judge_workers import teacher_server as server
from megatron_rlpt.judge_workers.discovery import KIND
from megatron_rlpt.observe import precision
from megatron_rlpt.observe.precision import resolve_dtypes
from megatron_rlpt.rollout.vllm.amx import MayUseAmx

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run's configuration, a fake model folder, and a fake package ``vllm``."""
    write_fake_vllm(tmp_path / "packages")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/config.json").write_text("{}")
    return tmp_path


def configured(folder: Path, **sections: dict) -> Path:
    settings = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(folder / "teacher")},
        "data": {"sources": [{"path": str(folder / "corpus.jsonl")}]},
        "candidates": {"rollouts": 3},
        "train": {"steps": 2, "global_batch": 4, "micro_batch": 2},
        "teacher": {"run_in": "workers"},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(settings | sections))
    return path


def command(config: Path, *arguments: str) -> list[str]:
    serve = [sys.executable, "-m", "megatron_rlpt", "teacher", "serve", "-c", str(config)]
    return [*serve, *arguments]


def environment(folder: Path, **variables: str) -> dict[str, str]:
    path = os.pathsep.join((str(folder / "packages"), str(Path(server.__file__).parents[2])))
    return {**os.environ, "PYTHONPATH": path, "STARTED": str(folder / "started.json"), **variables}


@contextlib.contextmanager
def serving(folder: Path, config: Path, *arguments: str, **variables: str):
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command(config, *arguments), stderr=log, env=environment(folder, **variables))
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, (folder / "log").read_text()
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def refusal(folder, rlpt, monkeypatch):
    """Run the command in this process; return its exit code and what it says."""
    for name, value in environment(folder).items():
        monkeypatch.setenv(name, value)  # for a server that it should not start

    def run(config: Path, *arguments: str) -> tuple[int, str]:
        code, _, said = rlpt("teacher", "serve", "-c", config, *arguments)
        return code, said.strip()

    return run


def await_(what, process: subprocess.Popen[bytes], folder: Path):
    deadline = time.monotonic() + 60
    while not (found := what()):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)
    return found


def test_a_proxy_of_the_environment_does_not_keep_it_from_being_announced(folder):
    buffer = open_url(f"sqlite:///{folder}/buffer.sqlite", "run")
    config = configured(folder, buffer={"url": f"sqlite:///{folder}/buffer.sqlite", "name": "run"})
    proxies = {"http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1", "no_proxy": "", "NO_PROXY": ""}
    with serving(folder, config, **proxies) as process:
        assert await_(lambda: buffer.announced(KIND), process, folder)
    assert not buffer.announced(KIND), "withdrawn at the end"
    buffer.close()


@pytest.mark.redis
def test_the_server_outlives_a_buffer_that_is_away_for_longer_than_it_is_retried_for(folder):
    with RedisServer(folder / "redis") as redis:
        options = {**redis.options, "name": "run"}
        config = configured(folder, buffer={**options, "retry": 0.2})
        buffer = open_url(**options)
        with serving(folder, config) as process:
            (name,) = await_(lambda: buffer.announced(KIND), process, folder)
            before = json.loads((folder / "started.json").read_text())["pid"]
            redis.kill()
            await_(lambda: "cannot announce the server" in (folder / "log").read_text(), process, folder)
            redis.start()
            buffer.withdraw(KIND, name)
            assert await_(lambda: buffer.announced(KIND), process, folder) == buffer.announced(KIND)
            assert json.loads((folder / "started.json").read_text())["pid"] == before
        buffer.close()


@pytest.mark.redis
def test_it_ends_well_also_while_the_buffer_is_away(folder):
    with RedisServer(folder / "redis") as redis:
        options = {**redis.options, "name": "run"}
        buffer = open_url(**options)
        with serving(folder, configured(folder, buffer={**options, "retry": 0.2})) as process:
            await_(lambda: buffer.announced(KIND), process, folder)
            redis.kill()
        redis.start()
        buffer.close()


def test_overrides_are_for_the_configuration_and_the_rest_is_for_the_server(folder):
    buffer = open_url(f"sqlite:///{folder}/other.sqlite", "run")
    extra = ["teacher.max_context=77", f"buffer.url=sqlite:///{folder}/other.sqlite", "buffer.name=run"]
    with serving(folder, configured(folder), "--enforce-eager", *extra, "--dtype", "float32") as process:
        await_(lambda: buffer.announced(KIND), process, folder)
    given = json.loads((folder / "started.json").read_text())["arguments"]
    assert given[given.index("--max-model-len") + 1] == "77"
    assert given[-3:] == ["--enforce-eager", "--dtype", "float32"]
    buffer.close()


def command_of_server(folder: Path, extra: list[str]) -> list[str]:
    config = resolve_dtypes(load_config(configured(folder)))
    served = server.Served.of([model_of(config, Role.judge)])
    return server._command(config, served, "127.0.0.1", 1, extra, server._environment(config, ""))


@pytest.mark.parametrize(("slow", "dtype"), [(True, ["--dtype", "float32"]), (False, [])])
def test_it_computes_in_fp32_where_bf16_is_slow_unless_asked_otherwise(slow, dtype, folder, monkeypatch):
    monkeypatch.setattr(precision, "bf16_is_slow", lambda: slow)
    command = command_of_server(folder, ["--dtype", "bfloat16"])
    before = command[: -len(["--dtype", "bfloat16"])]
    assert command[-2:] == ["--dtype", "bfloat16"], "the last one counts"
    assert [word for word in before if word in ("--dtype", "float32")] == dtype


@pytest.mark.parametrize(
    ("extra", "bind", "gpu", "whole"),
    [
        ([], None, False, True),
        (["--enforce-eager"], "nobind", False, True),
        ([], "0-7", False, False),
        ([], None, True, False),
        (["--tensor-parallel-size", "2"], None, False, False),
        (["-tp=2"], None, False, False),
    ],
)
def test_on_a_cpu_its_engine_computes_itself_unless_it_is_divided_or_bound(
    extra, bind, gpu, whole, folder, monkeypatch
):
    monkeypatch.setattr(server, "has_gpu", lambda: gpu)
    if bind:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bind)
    assert ("--distributed-executor-backend" in command_of_server(folder, extra)) is whole


@pytest.mark.parametrize("gpu", [False, True])
def test_on_a_cpu_nothing_is_compiled_before_it_answers_unless_asked_for(gpu, folder, monkeypatch):
    monkeypatch.setattr(server, "has_gpu", lambda: gpu)
    command = command_of_server(folder, ["--no-enforce-eager"])
    assert ("--enforce-eager" in command) is not gpu
    assert command[-1] == "--no-enforce-eager", "the last one counts"


@pytest.mark.parametrize("gpu", [False, True])
def test_on_a_cpu_its_processes_may_compute_in_bfloat16(gpu, folder, monkeypatch):
    """On one with AMX they would end with SIGILL."""
    monkeypatch.setattr(server, "has_gpu", lambda: gpu)
    command = command_of_server(folder, [])
    assert (f"{MayUseAmx.__module__}.{MayUseAmx.__qualname__}" in command) is not gpu


def test_an_override_with_a_wrong_key_is_refused_before_a_server_starts(folder, refusal):
    code, error = refusal(configured(folder), "teacher.max_contxt=77")
    assert (code, "nearest valid key is 'teacher.max_context'" in error) == (2, True), error
    assert not (folder / "started.json").exists()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["teacher.run_in=trainer"], "error: teacher.run_in is trainer; allowed: workers"),
        (["teacher.workers.own_model=true"], "error: teacher.workers.own_model is true; allowed: false"),
        (["objective.name=ntp", "candidates.rollouts=0"], "error: objective.name is ntp, which needs no judge"),
    ],
)
def test_a_server_that_nobody_would_ask_is_refused(folder, overrides, reason, refusal):
    code, error = refusal(configured(folder), *overrides)
    assert code == 2
    assert error.startswith(reason)
    assert not (folder / "started.json").exists()


def test_what_does_not_speak_http_is_not_healthy():
    with socket.create_server(("127.0.0.1", 0)) as odd:

        def answer() -> None:
            connection, _ = odd.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"good day\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert not server._is_healthy(f"http://127.0.0.1:{odd.getsockname()[1]}/health")
        thread.join()


def test_a_server_that_stays_silent_is_told_of(monkeypatch):
    monkeypatch.setattr(server, "_REMINDER", 0.0)
    warned = threading.Event()
    monkeypatch.setattr(server._log, "warning", lambda text, **_: "does not answer" in text and warned.set())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(["sleep", "600"])
    try:
        server._keep_announced(process, None, {"name": "value"}, f"http://127.0.0.1:{port}/health", warned)
    finally:
        process.kill()
        process.wait()
    assert warned.is_set()


def test_the_buffer_s_password_is_not_passed_on_to_the_server(folder):
    config = configured(folder, buffer={"url": f"sqlite:///{folder}/buffer.sqlite", "name": "run"})
    with serving(folder, config, RLPT_BUFFER_PASSWORD="secret") as process:
        await_(lambda: (folder / "started.json").exists() and (folder / "started.json").read_text(), process, folder)
    assert "RLPT_BUFFER_PASSWORD" not in json.loads((folder / "started.json").read_text())["variables"]


@pytest.mark.parametrize("arguments", [["--api-key", "secret"], ["--api-key=secret"], ["--api_key=secret"]])
def test_a_key_on_the_command_line_is_refused(folder, arguments, refusal):
    code, said = refusal(configured(folder), *arguments)
    assert code == 2
    assert "name that in teacher.workers.key_env" in said
    assert "secret" not in said


def test_it_listens_on_loopback_unless_asked_otherwise_and_announces_where_it_is_reached(folder):
    buffer = open_url(f"sqlite:///{folder}/buffer.sqlite", "run")
    config = configured(folder, buffer={"url": f"sqlite:///{folder}/buffer.sqlite", "name": "run"})
    for arguments, host, announced in (
        ([], "127.0.0.1", "127.0.0.1"),
        (["--host", "0.0.0.0"], "0.0.0.0", socket.gethostname()),
        (["--host", "::1"], "::1", "[::1]"),
    ):
        with serving(folder, config, *arguments) as process:
            (value,) = await_(lambda: buffer.announced(KIND).values(), process, folder)
        given = json.loads((folder / "started.json").read_text())["arguments"]
        assert given[given.index("--host") + 1] == host
        assert json.loads(value)["url"].startswith(f"http://{announced}:")
        open_to_all = "server without a key" in (folder / "log").read_text()
        assert open_to_all is (host == "0.0.0.0")
    buffer.close()


def test_an_address_of_another_machine_is_refused(folder, refusal):
    code, said = refusal(configured(folder), "--host", "192.0.2.1")
    assert code == 2
    assert "--host 192.0.2.1 is not an address of this machine" in said


def test_the_key_of_announced_servers_reaches_the_server_and_is_never_written(folder, refusal):
    buffer = open_url(f"sqlite:///{folder}/buffer.sqlite", "run")
    workers = {"key_env": "OUR_KEY"}
    sections = {"buffer": {"url": f"sqlite:///{folder}/buffer.sqlite", "name": "run"}}
    config = configured(folder, teacher={"run_in": "workers", "workers": workers}, **sections)
    code, said = refusal(config)
    assert (code, "teacher.workers.key_env is OUR_KEY, which is not set to a key" in said) == (2, True), said
    with serving(folder, config, "--host", "0.0.0.0", OUR_KEY="sesame") as process:
        (value,) = await_(lambda: buffer.announced(KIND).values(), process, folder)
    started = json.loads((folder / "started.json").read_text())
    assert started["key"] == "sesame"
    for text in (value, (folder / "log").read_text(), json.dumps(started["arguments"])):
        assert "sesame" not in text
    buffer.close()


def test_a_key_that_no_worker_would_send_is_refused(folder):
    done = subprocess.run(
        command(configured(folder)), env=environment(folder, VLLM_API_KEY="sesame"), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "set teacher.workers.key_env=VLLM_API_KEY" in done.stderr


def two_models(folder: Path, rewriter: Path, **sections: dict) -> Path:
    teacher = {"run_in": "workers", "judge": "generative", "rewriter": {"path": str(rewriter)}}
    candidates = {"rollouts": 3, "rewrite": True}
    return configured(folder, teacher=teacher | sections.pop("teacher", {}), candidates=candidates, **sections)


@pytest.fixture
def writer(folder) -> Path:
    """The folder of a rewriter's own model."""
    (folder / "writer").mkdir()
    (folder / "writer/config.json").write_text("{}")
    return folder / "writer"


@pytest.fixture
def adapter(folder) -> Path:
    """A LoRA adapter of the judge's model."""
    (folder / "lora").mkdir()
    values = {"peft_type": "LORA", "r": 9, "base_model_name_or_path": str(folder / "teacher")}
    (folder / "lora/adapter_config.json").write_text(json.dumps(values))
    return folder / "lora"


def served(config: Path, role: Role | None, *overrides: str) -> tuple[dict[str, dict], list[str]]:
    """Return what a server of ``role`` announces, by name, and the arguments of vLLM's server."""
    found = server.Served.of(server._models_to_serve(load_config(config, overrides), role))
    values = found.announcements("here:1", EndpointConfig("http://here:1/v1"))
    return {name: json.loads(value) for name, value in values.items()}, found.arguments()


def test_a_server_announces_whose_model_it_serves(folder, writer):
    announced, _ = served(configured(folder), None)
    assert announced["here:1"]["roles"] == ["judge", "rewriter"]
    announced, arguments = served(two_models(folder, writer), Role.rewriter, "teacher.rewriter.max_context=99")
    assert announced["here:1"]["roles"] == ["rewriter"]
    assert arguments[arguments.index("--model") + 1] == str(writer)
    assert arguments[arguments.index("--max-model-len") + 1] == "99"
    assert "--enable-lora" not in arguments


def test_an_adapter_is_served_beside_its_base_and_each_is_announced(folder, adapter):
    announced, arguments = served(two_models(folder, adapter), None)
    assert {name: (one["roles"], one["model"]) for name, one in announced.items()} == {
        "here:1/judge": (["judge"], "teacher"),
        "here:1/rewriter": (["rewriter"], "lora"),
    }
    assert arguments[arguments.index("--model") + 1] == str(folder / "teacher")
    assert arguments[arguments.index("--max-lora-rank") + 1] == "16"
    assert arguments[arguments.index("--lora-modules") + 1] == f"lora={adapter}"
    alone, _ = served(two_models(folder, adapter), Role.rewriter)
    assert [(name, one["model"]) for name, one in alone.items()] == [("here:1", "lora")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the run asks two models, and a server has one; choose --role judge (FOLDER/teacher) or --role rewriter"),
        (["--role", "editor"], "--role is editor; allowed: judge or rewriter"),
        (["--role", "rewriter", "teacher.rewriter.path=", "candidates.rewrite=false"], "--role is rewriter, and candi"),
        (
            ["--role", "judge", "objective.name=sft_rewrite", "candidates.rollouts=0"],
            "--role is judge, and objective.name is sft_rewrite, which needs no judge; allowed: --role rewriter, or",
        ),
        (
            ["--role", "rewriter", "teacher.rewriter.path=/none"],
            "teacher.rewriter.path is /none; it needs to be a local",
        ),
    ],
)
def test_a_role_that_cannot_be_served_is_one_line(folder, writer, refusal, arguments, said):
    code, error = refusal(two_models(folder, writer), *arguments)
    assert code in (2, ModelError.exit_code)
    assert error.replace(str(folder), "FOLDER").startswith(f"error: {said}")
    assert len(error.splitlines()) == 1
    assert not (folder / "started.json").exists()
