"""Rollouts per second of the policy's engine, against raw vLLM and ``generate`` of transformers, in turns.

    python tools/bench/rollouts.py [--prefix 448] [--suffix 64] [--k 4] [--prompts 8] [--json FILE] [--quick]

All three have the weights of SmolLM2-135M in fp32, the same prompts and K samples of each, and generate exactly
``--suffix`` tokens. Raw vLLM is ``vllm.LLM`` with its own defaults (compiled where it compiles), without
log-probabilities; ours returns the log-probability of every token and empties its cache before every call, so that a
resumed run samples the same. Keys: ``ours_tokens_per_s``, ``of_raw``, ``of_transformers`` (times as many tokens).
"""

from __future__ import annotations

import argparse
import random
import statistics
from typing import Any

import torch
from frame import MODEL, add_options, in_turns, peak_bytes, quiet, ratio_of, report

from megatron_rlpt.config import Dtype, RolloutConfig
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.models.families import expected_shapes
from megatron_rlpt.rollout.engine import RolloutPrompt
from megatron_rlpt.rollout.vllm.engine import VllmEngine
from megatron_rlpt.rollout.vllm.runtime import vllm_environment

OUR_ARGUMENTS = ("enforce_eager", "enable_chunked_prefill", "block_size")
"""Arguments that raw vLLM chooses itself."""


def raw_engine(longest: int, sequences: int, compiled: bool) -> Any:
    """Return vLLM as its users start it, with the same cache; compiling takes minutes."""
    with vllm_environment(1.0) as arguments:
        from vllm import LLM

        for name in OUR_ARGUMENTS if compiled else OUR_ARGUMENTS[1:]:
            arguments.pop(name, None)
        return LLM(model=str(MODEL), dtype="float32", max_model_len=longest, max_num_seqs=sequences, **arguments)


def main() -> None:
    """Print the figures, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefix", type=int, default=448, help="tokens of a prompt")
    parser.add_argument("--suffix", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--k", type=int, default=4, help="completions of a prompt")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a call")
    add_options(parser, "two prompts, three steps, and raw vLLM not compiled")
    given = parser.parse_args()
    if given.quick:
        given.prompts, given.steps = 2, 3
    quiet()
    draw = random.Random(0)
    prefixes = [tuple(draw.randrange(40_000) for _ in range(given.prefix)) for _ in range(given.prompts)]
    longest, sequences = given.prefix + given.suffix, given.prompts * given.k
    ours = VllmEngine(
        MODEL,
        expected_shapes(read_architecture(MODEL)),
        RolloutConfig(max_batch=sequences),
        dtype=Dtype.fp32,
        max_sequence=longest,
        seed=1,
    )
    ours._stop_tokens = []  # exactly as many tokens as the others
    raw = raw_engine(longest, sequences, compiled=not given.quick)

    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams, TokensPrompt

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    rows = torch.tensor(prefixes)

    def our_rollouts() -> None:
        prompts = [RolloutPrompt(prefix, seed) for seed, prefix in enumerate(prefixes) for _ in range(given.k)]
        found = ours.generate(prompts, given.suffix, 0)
        assert all(len(one.tokens) == given.suffix for one in found)

    def raw_rollouts() -> None:
        raw.reset_prefix_cache()
        sampling = SamplingParams(
            n=given.k, temperature=1.0, max_tokens=given.suffix, ignore_eos=True, detokenize=False
        )
        raw.generate([TokensPrompt(prompt_token_ids=list(prefix)) for prefix in prefixes], sampling, use_tqdm=False)

    def transformers_rollouts() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=rows,
                attention_mask=torch.ones_like(rows),
                max_new_tokens=given.suffix,
                min_new_tokens=given.suffix,
                do_sample=True,
                num_return_sequences=given.k,
                pad_token_id=0,
            )

    works = {"ours": our_rollouts, "raw": raw_rollouts, "transformers": transformers_rollouts}
    seconds = in_turns(works, given.steps)
    tokens = sequences * given.suffix
    report(
        {
            **{name: getattr(given, name) for name in ("prefix", "suffix", "k", "prompts", "steps")},
            **{f"{name}_tokens_per_s": tokens / statistics.median(row) for name, row in seconds.items()},
            # Caches and weights of the engines are there before: what counts is what generating adds.
            **{f"{name}_peak_bytes": peak_bytes(work) for name, work in works.items()},
            "of_raw": ratio_of(seconds, "raw", "ours"),
            "of_transformers": ratio_of(seconds, "transformers", "ours"),
        },
        given.json,
    )


if __name__ == "__main__":
    main()
