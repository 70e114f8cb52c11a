"""Where a tensor lies in a layout: its pipeline stage and its expert-parallel rank."""

from __future__ import annotations

from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.models.families import EMBEDDING, Rule
from megatron_rlpt.policy.layout import Layout


def stage_of(rule: Rule, arch: Architecture, layout: Layout) -> int:
    """Pipeline rank of a tensor: model chunks of equal size are dealt to the ranks in turn, once per virtual stage.

    The embedding is on the first, final norm and output layer on the last.
    """
    if rule.layer is None:
        return 0 if rule.megatron == EMBEDDING else layout.pipeline - 1
    per_piece = arch.layers // (layout.pipeline * layout.virtual_stages)
    return rule.layer // per_piece % layout.pipeline


def expert_rank_of(rule: Rule, arch: Architecture, layout: Layout) -> int | None:
    """Expert-parallel rank of a tensor; None for what is not an expert's."""
    if rule.expert is None:
        return None
    assert arch.experts is not None
    return rule.expert // (arch.experts.count // layout.expert)
