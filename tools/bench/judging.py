"""Quality of chosen and rejected candidates by comparison scheme, with a judge that errs.

    python tools/bench/judging.py [--trials 2000] [--votes 1 5]      a simulated judge; prints a Markdown table
    python tools/bench/judging.py --prompted FOLDER [--groups 8]     a real one, through vLLM in this process

Simulated: candidates have normal quality. ``logistic``: the better of two wins with probability sigmoid(s difference),
s such that it wins 65, 75 or 85 % of the comparisons of random pairs. ``constant``: it wins with that probability
at any difference. ``stubborn``: logistic, but all votes on a pair are the same, as a judge's errors are not
independent. The gap is the true quality of the chosen minus that of the rejected candidate; ties are drawn. In
parentheses is the 95 % interval over trials.

Prompted: the candidates of a group are a held-out document's own continuation, the same with a growing share of its
words shuffled, and so on to all; their order is taken as the true quality.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

os.environ.setdefault("TQDM_DISABLE", "1")

from megatron_rlpt.config import Config, OptionOrder, PairScheme, load_config
from megatron_rlpt.observe.precision import resolve_dtypes
from megatron_rlpt.teacher.comparisons import comparisons, rank
from megatron_rlpt.teacher.judge_metrics import judge_health
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source

MODELS = ("logistic", "constant", "stubborn")


@dataclass(frozen=True)
class Estimate:
    """A mean ratio with the half width of its 95 % interval."""

    value: float
    half: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.value - self.half:.3f} to {self.value + self.half:.3f})"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Return the ratio of means over paired trials, with an interval by linearization."""
    value = fmean(numerators) / fmean(denominators)
    residuals = [n - value * d for n, d in zip(numerators, denominators, strict=True)]
    return Estimate(value, 1.96 * stdev(residuals) / math.sqrt(len(residuals)) / fmean(denominators))


def slope_of(accuracy: float) -> float:
    """Return the slope of a logistic judge that is right on ``accuracy`` of random standard normal pairs."""
    draw = random.Random(0)
    gaps = [abs(draw.gauss(0, 1) - draw.gauss(0, 1)) for _ in range(20_000)]
    low, high = 0.0, 50.0
    for _ in range(40):
        middle = (low + high) / 2
        right = fmean(1 / (1 + math.exp(-middle * gap)) for gap in gaps)
        low, high = (middle, high) if right < accuracy else (low, middle)
    return low


@dataclass(frozen=True)
class SimulatedJudge:
    """A simulated judge whose errors do not depend on the scheme: each question has one answer."""

    model: str
    accuracy: float
    slope: float

    def winner(self, qualities: Sequence[float], first: int, second: int, vote: int, seed: int) -> int:
        """Return the index of the candidate that vote number ``vote`` on the pair prefers."""
        low, high = min(first, second), max(first, second)
        difference = qualities[low] - qualities[high]
        if self.model == "constant":
            probability = self.accuracy if difference > 0 else 1 - self.accuracy
        else:
            probability = 1 / (1 + math.exp(-self.slope * difference))
        question = f"{seed} {low} {high}" if self.model == "stubborn" else f"{seed} {low} {high} {vote}"
        return low if random.Random(question).random() < probability else high


def gap_of(values: Sequence[float | Failed], qualities: Sequence[float], seed: int) -> float:
    """Return the true quality of the highest value minus that of the lowest; ties are drawn."""
    draw = random.Random(seed)
    known = [
        (value, draw.random(), quality)
        for value, quality in zip(values, qualities, strict=True)
        if not isinstance(value, Failed)
    ]
    return max(known)[2] - min(known)[2] if known else 0.0


def trial(judge: SimulatedJudge, scheme: PairScheme, qualities: Sequence[float], votes: int, seed: int) -> float:
    """Return the gap that ``scheme`` finds among candidates of these true qualities."""

    async def compare(first: int, second: int, vote: int) -> float:
        return float(judge.winner(qualities, first, second, vote, seed) == first)

    table, _ = asyncio.run(rank(scheme, len(qualities), votes, OptionOrder.random, seed, compare))
    return gap_of(table.axis_values, qualities, seed)


def simulate(trials: int, accuracies: Sequence[float], votes: Sequence[int], sizes: Sequence[int]) -> None:
    """Print the table."""
    print("| judge | accuracy | K | votes | scheme | comparisons | gap / oracle's | gap / round robin's |")
    print("|---|---|---|---|---|---|---|---|")
    for model in MODELS:
        for accuracy in accuracies:
            judge = SimulatedJudge(model, accuracy, slope_of(accuracy))
            for size in sizes:
                for count in votes:
                    _row(judge, size, count, trials)


def _row(judge: SimulatedJudge, size: int, votes: int, trials: int) -> None:
    groups = []
    for number in range(trials):
        draw = random.Random(f"{size} {number}")
        groups.append([draw.gauss(0, 1) for _ in range(size)])
    oracle = [max(group) - min(group) for group in groups]
    gaps = {
        scheme: [trial(judge, scheme, group, votes, number) for number, group in enumerate(groups)]
        for scheme in PairScheme
    }
    full = comparisons(PairScheme.round_robin, size, votes, OptionOrder.random)
    for scheme, found in gaps.items():
        asked = comparisons(scheme, size, votes, OptionOrder.random)
        cells = (judge.model, f"{judge.accuracy:.0%}", size, votes, scheme.value, f"{asked} ({asked / full:.0%})")
        print(
            f"| {' | '.join(map(str, cells))} "
            f"| {ratio(found, oracle)} | {ratio(found, gaps[PairScheme.round_robin])} |",
            flush=True,
        )


def spoil(words: list[str], share: float, draw: random.Random) -> list[str]:
    """Return ``words`` with ``share`` of them shuffled among themselves."""
    places = sorted(draw.sample(range(len(words)), round(share * len(words))))
    moved = draw.sample(places, len(places))
    spoiled = list(words)
    for place, source in zip(places, moved, strict=True):
        spoiled[place] = words[source]
    return spoiled


def prompted(folder: str, config: Config, count: int, size: int, votes: Sequence[int]) -> None:
    """Run all schemes with a real judge, and print their results and the judge's metrics."""
    from megatron_rlpt.data import heldout_episodes
    from megatron_rlpt.teacher.batched import BatchedJudge
    from megatron_rlpt.teacher.generative import GenerativeJudge
    from megatron_rlpt.teacher.vllm_generator import VllmGenerator

    tokenizer = PolicyTokenizer(config.model.path)
    episodes = heldout_episodes(
        config.data, count, tokenizer.encode, bos_id=tokenizer.bos_id, vocabulary=tokenizer.vocabulary
    )
    groups = [_spoiled_group(episode, size, tokenizer) for episode in episodes]
    qualities = [-float(index) for index in range(size)]
    generator = VllmGenerator(
        folder, config.teacher.max_context, config.teacher.kv_cache_gib, dtype=config.teacher.dtype
    )
    settings = config.teacher.generative
    print("| K | votes | scheme | comparisons | groups with a pair | ranks between chosen and rejected, of K - 1 |")
    print("|---|---|---|---|---|---|")
    health: dict[str, dict[str, float]] = {}
    for number in votes:
        for scheme in PairScheme:
            quality = replace(settings.quality, weight=1.0, votes=number, scheme=scheme)
            axes = replace(settings, quality=quality, safety=replace(settings.safety, weight=0.0),
                           factuality=replace(settings.factuality, weight=0.0))  # fmt: skip
            inner = GenerativeJudge(generator.name, tokenizer, axes, config.run.seed)
            judged = BatchedJudge(inner, generator).judge(groups)
            health[f"{scheme.value}, {number} votes"] = judge_health(judged)
            values = [[o.value if isinstance(o, Reward) else o for o in group.rewards] for group in judged]
            gaps = [gap_of(row, qualities, place) for place, row in enumerate(values)]
            paired = sum(sum(not isinstance(value, Failed) for value in row) > 1 for row in values)
            calls = sum(group.cost.calls for group in judged if group.cost)
            spread = f" (+- {1.96 * stdev(gaps) / math.sqrt(len(gaps)):.2f})" if len(gaps) > 1 else ""
            print(f"| {size} | {number} | {scheme.value} | {calls} | {paired} of {count} | {fmean(gaps):.2f}{spread} |")
    for name, figures in health.items():
        print(f"\n{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in figures.items()))


def _spoiled_group(episode: Episode, size: int, tokenizer: PolicyTokenizer) -> Group:
    """Make groups in which candidate number i has i / (K - 1) of its words shuffled."""
    words = tokenizer.text_of(episode.suffix, episode.prefix).split(" ")
    candidates = [Candidate(Source.ORIGINAL, episode.suffix)]
    for index in range(1, size):
        draw = random.Random(f"{episode.id} {index}")
        tokens = tokenizer.encode(" ".join(spoil(words, index / (size - 1), draw)))
        candidates.append(Candidate(Source.ROLLOUT, tuple(tokens)[: len(episode.suffix)]))
    return Group(episode, tuple(candidates))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000, help="groups per cell of the simulation")
    parser.add_argument(
        "--accuracies", type=float, nargs="+", default=[0.65, 0.75, 0.85], help="accuracies of the simulated judge"
    )
    parser.add_argument("--votes", type=int, nargs="+", default=[1, 5], help="votes per pair")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16], help="candidates per group")
    parser.add_argument("--prompted", metavar="FOLDER", help="a real judge: Hugging Face folder of an instruct model")
    parser.add_argument(
        "--config", default="configs/demo.yaml", help="tokenizer, held-out text and sampling for a real judge"
    )
    parser.add_argument("--groups", type=int, default=8, help="groups for a real judge, of the first size")
    arguments = parser.parse_args()
    if arguments.prompted:
        from megatron_rlpt.observe.log import quiet_libraries

        quiet_libraries()
        config = resolve_dtypes(load_config(arguments.config))
        prompted(arguments.prompted, config, arguments.groups, arguments.sizes[0], arguments.votes)
    else:
        simulate(arguments.trials, arguments.accuracies, arguments.votes, arguments.sizes)


if __name__ == "__main__":
    main()
