"""Update and reference log-probabilities with and without shared prefixes, alternating in one process.

    python tools/bench/shared_prefix.py --prefix 1920 --suffix 128 --candidates 2 [--json FILE] [--quick]

The policy has the sizes of SmolLM2-135M and random weights. One step is what the trainer computes for a batch: the
reference's log-probabilities of every candidate, and an update. Without sharing, every candidate is a row with a prefix
of its own. ``max_error`` compares both in fp32 on the same weights.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from frame import add_options, in_turns, peak_bytes, quiet, ratio_of, report

from megatron_rlpt.config import (
    CandidatesConfig,
    Config,
    DataConfig,
    Dtype,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Recompute,
    TrainConfig,
)
from megatron_rlpt.objectives import Example, LossInputs, LossTerms, Selection
from megatron_rlpt.objectives.facts import ObjectiveFacts
from megatron_rlpt.observe.precision import resolve_dtypes
from megatron_rlpt.policy.batching import shape_of
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.types import Candidate, Episode, Group, Source

SIZES = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
"""Of SmolLM2-135M, which has 30 layers."""


class FirstAgainstOthers:
    """Raises the first candidate above the mean of the others, with a reference; for any number of candidates."""

    facts = ObjectiveFacts(needs_reference=True, sequences=None, least_candidates=2)

    def select(self, groups: Sequence[Group]) -> Selection:
        """Select nothing: the examples are made here."""
        return Selection()

    def loss(self, inputs: LossInputs) -> LossTerms:
        """Return the logistic loss of the first candidate's log-ratio less the others' mean."""
        assert inputs.reference is not None
        ratios = ((inputs.logprobs - inputs.reference) * inputs.mask).sum(dim=1).split(inputs.sizes)
        margins = torch.stack([ratio[0] - ratio[1:].mean() for ratio in ratios])
        return LossTerms(-torch.nn.functional.logsigmoid(0.1 * margins))


@dataclass(frozen=True)
class Case:
    """Lengths of an update."""

    prefix: int
    suffix: int
    candidates: int
    examples: int
    vocab: int = SIZES["vocab_size"]
    """Tokens to draw from."""

    def batch(self, seed: int) -> list[Example]:
        """Return examples of random tokens."""
        draw = random.Random(seed)

        def tokens(count: int) -> tuple[int, ...]:
            return tuple(draw.randrange(self.vocab) for _ in range(count))

        found = []
        for number in range(self.examples):
            suffixes = [tokens(self.suffix) for _ in range(self.candidates)]
            episode = Episode(f"e{number}", tokens(self.prefix), suffixes[0], "bench", "d", self.prefix)
            candidates = tuple(Candidate(Source.ROLLOUT, suffix) for suffix in suffixes)
            found.append(Example(episode, candidates, tuple(range(self.candidates))))
        return found


def make_policy(folder: Path, case: Case, dtype: Dtype, layers: int, recompute: Recompute = Recompute.none) -> Policy:
    """Return a policy of ``layers`` layers with random weights, saved in ``folder``."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    longest = case.prefix + case.suffix
    own = {"vocab_size": case.vocab, "num_hidden_layers": layers, "max_position_embeddings": max(2048, longest)}
    sizes = LlamaConfig(**SIZES | own)
    LlamaForCausalLM(sizes).save_pretrained(folder)
    config = Config(
        model=ModelConfig(path=str(folder), dtype=dtype),
        data=DataConfig(max_prefix=case.prefix, suffix_length=case.suffix),
        candidates=CandidatesConfig(rollouts=case.candidates),
        objective=ObjectiveConfig(name="online_dpo"),
        optimizer=OptimizerConfig(lr=1e-5),
        train=TrainConfig(steps=1000, global_batch=case.examples, micro_batch=case.examples, recompute=recompute),
    )
    return Policy(resolve_dtypes(config, teacher=False), FirstAgainstOthers(), DeviceRuntime())


def largest_error(folder: Path, case: Case, layers: int) -> float:
    """Return the largest difference, in fp32, of log-probabilities (nats), loss and gradient norm (relative)."""
    examples = case.batch(0)
    found = []
    for packed in (True, False):
        policy = make_policy(folder, case, Dtype.fp32, layers)
        policy.packed = packed
        logprobs = policy.logprobs(examples)
        metrics = policy.update(examples)
        found.append((logprobs, metrics["loss"], metrics["grad_norm"]))
    (ours, loss, norm), (theirs, other_loss, other_norm) = found
    return max(float((ours - theirs).abs().max()), abs(loss - other_loss), abs(norm / other_norm - 1.0))


def updates_of(policy: Policy, case: Case) -> dict[str, Callable[[], None]]:
    """Return the same update with and without sharing."""
    examples = case.batch(0)

    def update(packed: bool) -> None:
        policy.packed = packed
        policy.update(examples)

    return {"shared": lambda: update(True), "separate": lambda: update(False)}


def main() -> None:
    """Print the figures, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefix", type=int, default=1920, help="tokens of a prefix")
    parser.add_argument("--suffix", type=int, default=128, help="tokens of a candidate")
    parser.add_argument("--candidates", type=int, default=2, help="candidates of an example")
    parser.add_argument("--examples", type=int, default=0, help="examples of an update; default: about 4,096 tokens")
    parser.add_argument("--layers", type=int, default=0, help="layers of the model; default: 30, or 4 with --quick")
    parser.add_argument(
        "--vocabulary",
        type=int,
        default=SIZES["vocab_size"],
        help="of the model; fewer layers with a smaller one have the proportions of more layers",
    )
    parser.add_argument("--dtype", choices=[dtype.name for dtype in Dtype], default="auto", help="as model.dtype")
    parser.add_argument(
        "--recompute",
        choices=[one.name for one in Recompute],
        default="none",
        help="as train.recompute, both with and without sharing; 16 separate candidates need it: 2 GB a layer",
    )
    add_options(parser, "fewer layers: minutes instead of a quarter of an hour")
    given = parser.parse_args()
    for name in ("prefix", "suffix", "steps"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} is {getattr(given, name)}; allowed: at least 1")
    if given.candidates < 2:
        parser.error(f"--candidates is {given.candidates}; allowed: at least 2")
    quiet()
    layers = given.layers or (4 if given.quick else 30)
    examples = given.examples or max(1, 4096 // (given.candidates * (given.prefix + given.suffix)))
    case = Case(given.prefix, given.suffix, given.candidates, examples, given.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        error = largest_error(Path(folder) / "small", case, min(layers, 2))
        policy = make_policy(Path(folder) / "model", case, Dtype[given.dtype], layers, Recompute[given.recompute])
        works = updates_of(policy, case)
    seconds = in_turns(works, given.steps)
    batch = case.batch(0)
    faster = ratio_of(seconds, "separate", "shared")
    report(
        {
            **{name: getattr(case, name) for name in ("prefix", "suffix", "candidates", "examples", "vocab")},
            "layers": layers,
            **{f"{name}_s": statistics.median(row) for name, row in seconds.items()},
            **faster,
            "tokens_ratio": shape_of(batch, packed=False).tokens / shape_of(batch).tokens,
            "max_error": error,
            **{f"{name}_peak_bytes": peak_bytes(work) for name, work in works.items()},
        },
        given.json,
    )


if __name__ == "__main__":
    main()
