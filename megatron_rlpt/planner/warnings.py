"""What the figures of a plan do not say about themselves."""

from __future__ import annotations

from megatron_rlpt.planner.request import PlanRequest

MIXTURE_OF_EXPERTS = (
    "updates of a mixture of experts are uncalibrated: predicted 1.26 to 3.92 times as fast as NVIDIA publishes "
    "(Megatron-Bridge, docs/performance-summary.md, 25.11: GPT-OSS-120B and Qwen3-30B-A3B on H100, B200 and GB200); "
    "expect longer steps, higher cost, and fewer judges needed"
)
"""Not modelled: permuting tokens, the router in fp32, gaps between many small kernels, uneven experts. Measured by
``tools/bench/plan_public_rates.py``, as are dense models, which are within 0.85 to 1.14."""


def cautions(question: PlanRequest) -> tuple[str, ...]:
    """What to keep in mind with the plan of ``question``."""
    found = [_prefixes(question), *question.teacher_notes]
    if question.model.experts is not None:
        found.append(MIXTURE_OF_EXPERTS)
    return tuple(found)


def _prefixes(question: PlanRequest) -> str:
    longest = question.config.data.max_prefix
    if question.prefix_tokens is None:
        return (
            f"times and cost are at the longest prefix (data.max_prefix = {longest:,} tokens) for every episode; "
            "shorter documents take less: give the mean with --prefix-tokens"
        )
    return (
        f"times and cost are at prefixes of {question.prefix_tokens:,} tokens (--prefix-tokens); memory and what fits "
        f"are at the longest ({longest:,})"
    )
