"""Share of an update's time that its matrix products alone take at the machine's own rate.

    python tools/bench/update_rate.py [--prefix 448] [--suffix 64] [--candidates 2] [--examples 4] [--quick]

Every matrix product of one update (reference, forward and backward pass) is recorded with its shapes and layout and
then run alone, in turns with updates. ``share`` is the products' time over the update's: 1 would be an update without
attention, norms, optimizer and copies. The policy has the sizes of SmolLM2-135M and random weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from frame import add_options, in_turns, quiet, ratio_of, report
from shared_prefix import Case, make_policy
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from megatron_rlpt.config import Dtype

_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class _Recorder(TorchDispatchMode):
    """Records every matrix product: operator, and shape and strides of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]]] = []
        self.flops = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            self.calls.append((func, tuple((tuple(one.shape), one.stride(), one.dtype) for one in args)))
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


def replay(calls: Sequence[tuple[Any, Any]]) -> Callable[[], None]:
    """Return a function that runs the products on random values in the same layout."""
    stores: dict[Any, torch.Tensor] = {}

    def like(description: Any) -> torch.Tensor:
        shape, strides, dtype = description
        if description not in stores:
            size = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
            stores[description] = torch.randn(size).to(dtype).as_strided(shape, strides)
        return stores[description]

    made = [(func, [like(one) for one in arguments]) for func, arguments in calls]

    def run() -> None:
        for func, arguments in made:
            func(*arguments)

    return run


def main() -> None:
    """Print the figures, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefix", type=int, default=448, help="tokens of a prefix")
    parser.add_argument("--suffix", type=int, default=64, help="tokens of a candidate")
    parser.add_argument("--candidates", type=int, default=2, help="candidates of an example")
    parser.add_argument("--examples", type=int, default=4, help="examples of an update")
    parser.add_argument("--layers", type=int, default=30, help="layers of the model")
    parser.add_argument("--dtype", choices=[dtype.name for dtype in Dtype], default="auto", help="as model.dtype")
    add_options(parser, "ten layers, three steps")
    given = parser.parse_args()
    if given.quick:
        given.layers, given.steps = 10, 3
    quiet()
    case = Case(given.prefix, given.suffix, given.candidates, given.examples)
    with tempfile.TemporaryDirectory() as folder:
        policy = make_policy(Path(folder), case, Dtype[given.dtype], given.layers)
    examples = case.batch(0)
    policy.update(examples)
    with _Recorder() as recorder:
        policy.update(examples)
    products = replay(recorder.calls)
    seconds = in_turns({"products": products, "update": lambda: policy.update(examples)}, given.steps)
    names = ("prefix", "suffix", "candidates", "examples", "layers", "steps")
    report(
        {
            **{name: getattr(given, name) for name in names},
            **{f"{name}_s": statistics.median(row) for name, row in seconds.items()},
            "products_gflops": recorder.flops / statistics.median(seconds["products"]) / 1e9,
            "share": ratio_of(seconds, "products", "update"),
        },
        given.json,
    )


if __name__ == "__main__":
    main()
