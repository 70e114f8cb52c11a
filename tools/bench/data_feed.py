"""How many times as many tokens the stream of episodes feeds as an update consumes.

    python tools/bench/data_feed.py [--config configs/demo.yaml] [--json FILE] [--quick]

Reading, tokenizing, shuffling and cutting the next batch (which a run does in a background thread of rank 0) take turns
with an update on as many pairs of the same lengths. On a cluster the other side is many GPUs, so the rate of the one
reader counts as well: ``feed_tokens_per_s``, and what the published runs consume beside it.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from frame import add_options, in_turns, peak_bytes, quiet, ratio_of, report

from megatron_rlpt.config import load_config
from megatron_rlpt.data import EpisodeStream
from megatron_rlpt.objectives import Example, build_objective
from megatron_rlpt.observe.precision import resolve_dtypes
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Candidate, Source


def main() -> None:
    """Print the figures, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"), help="a run's configuration")
    add_options(parser, "three steps")
    given = parser.parse_args()
    if given.quick:
        given.steps = 3
    quiet()
    config = resolve_dtypes(load_config(given.config, []))
    tokenizer = PolicyTokenizer(Path(config.model.path))
    stream = EpisodeStream(
        config.data,
        tokenizer.encode,
        config.run.seed,
        bos_id=tokenizer.bos_id,
        starts_character=tokenizer.starts_character,
        vocabulary=tokenizer.vocabulary,
    )
    policy = Policy(config, build_objective(config.objective), DeviceRuntime())
    batch = config.train.global_batch
    episodes = stream.take(batch)
    examples = [
        Example(episode, (Candidate(Source.ROLLOUT, episode.suffix), Candidate(Source.ROLLOUT, other.suffix)), (0, 1))
        for episode, other in zip(episodes, episodes[1:] + episodes[:1], strict=True)
    ]
    works = {"feed": lambda: stream.take(batch), "update": lambda: policy.update(examples)}
    seconds = in_turns(works, given.steps)
    tokens = sum(len(episode.prefix) + len(episode.suffix) for episode in episodes)
    report(
        {
            "episodes": batch,
            "tokens": tokens,
            "steps": given.steps,
            **{f"{name}_s": statistics.median(row) for name, row in seconds.items()},
            "feed_tokens_per_s": tokens / statistics.median(seconds["feed"]),
            **{f"{name}_peak_bytes": peak_bytes(work) for name, work in works.items()},
            "of_update": ratio_of(seconds, "update", "feed"),
        },
        given.json,
    )


if __name__ == "__main__":
    main()
