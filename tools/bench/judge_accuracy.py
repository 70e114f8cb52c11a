"""Accuracy of judges: how often they prefer the original suffix of a held-out document to a spoiled one.

    python tools/bench/judge_accuracy.py [--config configs/demo.yaml] [--episodes 96] [--prompted 24]

The likelihood judge compares each original with another document's text, its own words shuffled, and its first words
in a loop. The same model as a prompted judge compares original and shuffled words in both orders, with reasons and with
direct answers. A judge that guesses gets 0.5.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("TQDM_DISABLE", "1")

from megatron_rlpt.config import AnswerForm, Config, OptionOrder, load_config
from megatron_rlpt.data import heldout_episodes
from megatron_rlpt.evaluation.statistics import win_rate
from megatron_rlpt.observe.log import quiet_libraries
from megatron_rlpt.observe.precision import resolve_dtypes
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Candidate, Episode, Group, Reward, Source

Spoil = Callable[[int], tuple[int, ...]]
"""Index of an episode -> the spoiled suffix to compare with its original."""


def spoilers(episodes: Sequence[Episode], tokenizer: PolicyTokenizer) -> dict[str, Spoil]:
    """Return the ways to spoil a suffix; no result has more tokens than the original."""

    def other_document(index: int) -> tuple[int, ...]:
        return episodes[(index + 1) % len(episodes)].suffix

    def shuffled_words(index: int) -> tuple[int, ...]:
        episode = episodes[index]
        words = tokenizer.text_of(episode.suffix, episode.prefix).split(" ")
        random.Random(index).shuffle(words)
        return tuple(tokenizer.continue_with(episode.prefix, " ".join(words)))[: len(episode.suffix)]

    def loop(index: int) -> tuple[int, ...]:
        suffix = episodes[index].suffix
        return (suffix[:6] * len(suffix))[: len(suffix)]

    return {"another document's text": other_document, "its words shuffled": shuffled_words, "a loop": loop}


def pairs(episodes: Sequence[Episode], spoil: Spoil) -> list[Group]:
    """Return groups of original and spoiled suffix."""
    return [
        Group(episode, (Candidate(Source.ORIGINAL, episode.suffix), Candidate(Source.REWRITE, spoil(index))))
        for index, episode in enumerate(episodes)
    ]


def report(name: str, judged: Sequence[Group]) -> None:
    """Print the accuracy with its interval, and the number of pairs with a verdict."""
    rewards: list[list[float | None]] = []
    for group in judged:
        original, spoiled = group.rewards
        if isinstance(original, Reward) and isinstance(spoiled, Reward):
            gap = original.value - spoiled.value
            rewards.append([0.5 + 0.5 * (gap > 0) - 0.5 * (gap < 0)])
        else:
            rewards.append([None])
    decided = sum(row[0] is not None for row in rewards)
    if decided < 2:
        print(f"{name:60} {decided} of {len(rewards)} pairs have a verdict")
        return
    rate = win_rate(rewards)
    low, high = rate.ci95
    print(f"{name:60} {rate.mean:.2f} ({low:.2f} to {high:.2f}), {decided} of {len(rewards)} pairs have a verdict")


def likelihood(config: Config, episodes: Sequence[Episode], tokenizer: PolicyTokenizer) -> None:
    """Measure the likelihood judge with and without its repetition term."""
    from megatron_rlpt.teacher.likelihood import LikelihoodJudge

    judge = LikelihoodJudge(config.teacher_path, config.teacher.likelihood, "cpu", config.teacher.dtype)
    for name, spoil in spoilers(episodes, tokenizer).items():
        report(f"likelihood judge, original against {name}", judge.judge(pairs(episodes, spoil)))
    judge.config.repetition_weight = 0.0
    report(
        "likelihood alone, original against a loop",
        judge.judge(pairs(episodes, spoilers(episodes, tokenizer)["a loop"])),
    )


def prompted(config: Config, episodes: Sequence[Episode], tokenizer: PolicyTokenizer) -> None:
    """Measure the same model as a prompted pairwise judge, with reasons and with direct answers."""
    from megatron_rlpt.teacher.batched import BatchedJudge
    from megatron_rlpt.teacher.generative import GenerativeJudge
    from megatron_rlpt.teacher.vllm_generator import VllmGenerator

    settings = config.teacher.generative
    settings.quality.votes, settings.quality.order = 1, OptionOrder.both
    generator = VllmGenerator(
        config.teacher_path, config.teacher.max_context, config.teacher.kv_cache_gib, dtype=config.teacher.dtype
    )
    spoil = spoilers(episodes, tokenizer)["its words shuffled"]
    for form in AnswerForm:
        settings.answer = form
        judge = BatchedJudge(GenerativeJudge(generator.name, tokenizer, settings, config.run.seed), generator)
        started = time.perf_counter()
        judged = judge.judge(pairs(episodes, spoil))
        seconds = time.perf_counter() - started
        report(f"prompted judge, {form.value}, original against its words shuffled", judged)
        costs = [group.cost for group in judged if group.cost]
        calls, read, written = (
            sum(getattr(cost, name) for cost in costs) / len(costs)
            for name in ("calls", "prompt_tokens", "answer_tokens")
        )
        print(
            f"    per pair: {calls:.1f} requests, {read:.0f} tokens read, {written:.0f} written, "
            f"{seconds / len(costs):.2f} s"
        )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--episodes", type=int, default=96, help="pairs for the likelihood judge")
    parser.add_argument("--prompted", type=int, default=24, help="pairs for the prompted judge")
    arguments = parser.parse_args()
    quiet_libraries()
    config = resolve_dtypes(load_config(arguments.config))
    tokenizer = PolicyTokenizer(config.model.path)
    episodes = heldout_episodes(
        config.data, arguments.episodes, tokenizer.encode, bos_id=tokenizer.bos_id, vocabulary=tokenizer.vocabulary
    )
    likelihood(config, episodes, tokenizer)
    prompted(config, episodes[: arguments.prompted], tokenizer)


if __name__ == "__main__":
    main()
