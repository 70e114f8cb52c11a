"""GPUs, their networks and their prices from public sources, and the seconds that kernels take on them.

Every number is a ``Constant`` with its source. Units are SI: bytes, seconds, FLOP/s; 1 GB is 10^9 bytes. Data
sheets state memory in a unit between GB and GiB, so memory is what the driver reports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from megatron_rlpt.errors import ConfigError


class Constant(float):
    """A number with its source."""

    source: str

    def __new__(cls, value: float, source: str) -> Constant:
        """Attach ``source``: where ``value`` is published, or how it was found."""
        constant = super().__new__(cls, value)
        constant.source = source
        return constant


@dataclass(frozen=True)
class Gpu:
    """One GPU and its share of its node's network."""

    name: str
    capability: tuple[int, int]
    """CUDA's compute capability, by which libraries enable features."""
    bf16: Constant
    """Peak FLOP/s of dense bf16 matrix products."""
    fp8: Constant
    """The same in fp8; the bf16 value for a GPU without fp8."""
    matmul: Constant
    """Share of the peak that a large matrix product reaches in training, apart from partly filled waves of tiles."""
    multiprocessors: Constant
    memory: Constant
    """Bytes of HBM, as the driver reports them."""
    memory_bandwidth: Constant
    """Bytes per second of HBM."""
    link: Constant
    """Bytes per second to the other GPUs of its NVLink domain, in one direction."""
    network: Constant
    """Bytes per second to other nodes, in one direction."""
    domain: Constant
    """GPUs that NVLink connects."""
    price: Constant
    """US dollars per GPU and hour; a default for ``--price``."""

    def constants(self) -> dict[str, Constant]:
        """Return field -> constant."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Constant)}


MATMUL_EFFICIENCY = Constant(
    0.566,
    "fitted, with update.STEP_OVERHEAD, to the 16 points of the public Megatron-LM H100 table "
    "(tools/bench/plan_megatron_table.py --fit), and assumed for other GPUs and for fp8. It stands for what is not "
    "modelled: clocks that sink under load, communication that takes multiprocessors, gaps between kernels",
)
_A100 = "NVIDIA A100 80GB data sheet (SXM column; dense figures)"
_A100_CHIP = "NVIDIA A100 Tensor Core GPU architecture white paper"
_H100 = "NVIDIA H100 data sheet (SXM column; half of the figures with sparsity)"
_H100_CHIP = "NVIDIA H100 Tensor Core GPU architecture white paper (SXM5)"
_H200 = "NVIDIA H200 data sheet (SXM column; half of the figures with sparsity)"
_B200 = "NVIDIA DGX B200 data sheet, divided by 8 (half of the figures with sparsity)"
_GB200 = "NVIDIA GB200 NVL72 data sheet, divided by 72 (half of the figures with sparsity)"
_BLACKWELL_CHIP = "148 multiprocessors are reported by CUDA for B200 (torch.cuda.get_device_properties)"
_HDR = "one HDR InfiniBand port (200 Gb/s) per GPU, as in DGX A100's user guide"
_NDR = "one NDR InfiniBand port (400 Gb/s) per GPU, as in DGX H100's and B200's user guides"
_PRICE = "CoreWeave's public on-demand price list as quoted in February 2026, per GPU of the smallest instance"


def _gpu(
    name: str,
    data_sheet: str,
    *,
    capability: tuple[int, int],
    chip: tuple[int, str],
    network: tuple[float, str],
    **figures: float,
) -> Gpu:
    """Return one row of ``GPUS`` from values in 10^12 FLOP/s, MiB, 10^12 bytes/s (HBM) and 10^9 bytes/s (links)."""
    return Gpu(
        name,
        capability,
        bf16=Constant(figures["bf16"] * 1e12, data_sheet),
        fp8=Constant(figures["fp8"] * 1e12, data_sheet),
        matmul=MATMUL_EFFICIENCY,
        multiprocessors=Constant(*chip),
        memory=Constant(
            figures["memory"] * 2**20, f"{figures['memory']:,.0f} MiB, which nvidia-smi reports as total memory"
        ),
        memory_bandwidth=Constant(figures["bandwidth"] * 1e12, data_sheet),
        link=Constant(figures["link"] * 1e9, f"{data_sheet}; half of the sum of both directions"),
        network=Constant(network[0] * 1e9, network[1]),
        domain=Constant(figures["domain"], data_sheet),
        price=Constant(figures["price"], _PRICE),
    )


_AMPERE: Any = {"capability": (8, 0), "link": 300, "domain": 8, "chip": (108, _A100_CHIP), "network": (25, _HDR)}
_HOPPER: Any = {"capability": (9, 0), "link": 450, "domain": 8, "chip": (132, _H100_CHIP), "network": (50, _NDR)}
_BLACKWELL: Any = {"capability": (10, 0), "link": 900, "chip": (148, _BLACKWELL_CHIP), "network": (50, _NDR)}
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100", _A100, bf16=312, fp8=312, memory=81920, bandwidth=2.039, price=2.70, **_AMPERE),
        _gpu("h100", _H100, bf16=989.4, fp8=1978.9, memory=81559, bandwidth=3.35, price=6.16, **_HOPPER),
        _gpu("h200", _H200, bf16=989.4, fp8=1978.9, memory=143771, bandwidth=4.8, price=6.31, **_HOPPER),
        _gpu("b200", _B200, bf16=2250, fp8=4500, memory=183359, bandwidth=8, domain=8, price=8.60, **_BLACKWELL),
        _gpu("gb200", _GB200, bf16=2500, fp8=5000, memory=189471, bandwidth=8, domain=72, price=10.5, **_BLACKWELL),
    )
}
"""Name -> GPU."""

COLLECTIVE_EFFICIENCY = Constant(
    0.8, "assumed; nccl-tests on 8 x H100 commonly report 350 to 370 GB/s of 450 for an all-gather of large buffers"
)
"""Share of the bandwidth of NVLink or the network that a collective over large buffers reaches."""
MEMORY_EFFICIENCY = Constant(0.85, "assumed; STREAM-like kernels commonly reach 85 to 92 % of the data sheet's figure")
"""Share of HBM's bandwidth that a kernel reaches."""
TILE = (128, 256)
"""Rows and columns of the result that one multiprocessor computes at a time (CUTLASS default for Hopper)."""
ATTENTION_FORWARD = Constant(
    0.5, "about what figure 5 of FlashAttention-3 (arXiv 2407.08608) shows for head size 128, causal, 4k tokens"
)
ATTENTION_BACKWARD = Constant(
    0.4, "about what figure 6 of FlashAttention-3 (arXiv 2407.08608) shows for head size 128, causal, 4k tokens"
)
ATTENTION_BACKWARD_FLOPS = Constant(2.5, "FlashAttention-2 (arXiv 2307.08691), section 4.1: products of the backward")


def gpu_of(name: str, option: str) -> Gpu:
    """Return the GPU called ``name``, the value of ``option``.

    Raises:
        ConfigError: no such GPU; the error lists all names.
    """
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise ConfigError(f"{option} is {name!r}; known: {', '.join(GPUS)}") from None


@dataclass(frozen=True)
class Nodes:
    """Equal GPUs in equal nodes, with ranks numbered node by node."""

    gpu: Gpu
    gpus: int
    per_node: int

    def bandwidth(self, size: int, stride: int = 1) -> float:
        """Return the bytes per second that each of ``size`` ranks, ``stride`` apart, sends in a ring among them.

        Inside a node NVLink is the limit. A ring that leaves the node uses the network card of each of the group's q
        ranks there, so each rank gets the bandwidth of q cards, up to that of NVLink.
        """
        inside = max(1, self.per_node // stride)
        link = float(self.gpu.link)
        speed = link if size <= inside else min(link, inside * self.gpu.network)
        return speed * COLLECTIVE_EFFICIENCY

    def exchange_seconds(self, sent: float, size: int, stride: int = 1) -> float:
        """Return the seconds of an all-to-all in which each of ``size`` ranks keeps its own share of ``sent`` bytes."""
        inside = min(size, max(1, self.per_node // stride))
        near, far = sent * (inside - 1) / size, sent * (size - inside) / size
        return max(near / self.gpu.link, far / self.gpu.network) / COLLECTIVE_EFFICIENCY


def matmul_seconds(gpu: Gpu, rows: float, columns: float, inner: float, *, fp8: bool = False) -> float:
    """Return the seconds of [rows, inner] x [inner, columns] in bf16 or fp8: the longer of arithmetic and memory.

    Each multiprocessor computes one tile of the result at a time; the last wave of tiles may leave some idle (NVIDIA,
    "Matrix Multiplication Background User's Guide": wave quantization).
    """
    if not rows:
        return 0.0
    tiles = math.ceil(rows / TILE[0]) * math.ceil(columns / TILE[1])
    multiprocessors = int(gpu.multiprocessors)
    filled = tiles / (math.ceil(tiles / multiprocessors) * multiprocessors)
    peak = gpu.fp8 if fp8 else gpu.bf16
    arithmetic = 2.0 * rows * columns * inner / (peak * gpu.matmul * filled)
    return max(arithmetic, memory_seconds(gpu, 2.0 * (rows * columns + rows * inner + columns * inner)))


def linear_seconds(gpu: Gpu, rows: float, columns: float, inner: float, *, fp8: bool = False) -> tuple[float, float]:
    """Return the seconds of a linear layer, forward and backward (gradients of input and weights)."""
    backward = matmul_seconds(gpu, rows, inner, columns, fp8=fp8) + matmul_seconds(gpu, columns, inner, rows, fp8=fp8)
    return matmul_seconds(gpu, rows, columns, inner, fp8=fp8), backward


def attention_seconds(gpu: Gpu, sequences: float, length: float, width: float) -> tuple[float, float]:
    """Return the seconds of causal attention, forward and backward; ``width`` is that of all heads together."""
    flops = 2.0 * sequences * length * length * width
    forward = flops / (gpu.bf16 * ATTENTION_FORWARD)
    return forward, ATTENTION_BACKWARD_FLOPS * flops / (gpu.bf16 * ATTENTION_BACKWARD)


def memory_seconds(gpu: Gpu, moved: float) -> float:
    """Return the seconds to read or write ``moved`` bytes of HBM."""
    return moved / (gpu.memory_bandwidth * MEMORY_EFFICIENCY)
