"""What the hygiene of an evaluation found, in words; imports no numpy, so that a report can be made without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def hygiene_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what ``hygiene.check_hygiene`` found, in words: what it is about, and what was found."""
    sources = found["sources"]
    read = [one for one in sources if not one["problem"]]
    size, documents = sum(one["gib"] for one in read), sum(one["documents"] for one in read)
    whole = "all" if all(one["complete"] for one in read) else "the beginning"
    of = f"{len(read)} source{'s' * (len(read) != 1)}"
    compared = f"{documents:,} documents ({size_of(size)}, {whole} of {of})" if read else "not compared"
    if left_out := sum(one.get("left_out", 0) for one in read):
        compared += f"; {left_out:,} more were left out of training because they are held out"
    rows = [("training text", compared)]
    rows += [(f"training text {one['path']}", f"not compared: {one['problem']}") for one in sources if one["problem"]]
    for name, one in found["sets"].items():
        parts = [f"{one['prompts']} prompts"]
        if read and (longer := one["prompts"] - one["too_short"]):
            parts.append(f"{one['overlapping']} of {longer} share {found['ngram']} words in a row with training text")
        near = f"near-duplicates: {one['near_prompts']} of another prompt"
        parts.append(near + (f", {one['near_training']} of training text" if read else ""))
        rows.append((name, "; ".join(parts)))
    return rows


def hygiene_notes(found: Mapping[str, Any]) -> list[str]:
    """Return sentences about prompts that a model may know from training; none if there are none."""
    notes = []
    for name, one in found["sets"].items():
        near, overlapping, prompts = one["near_training"], one["overlapping"], one["prompts"]
        if one.get("dropped"):
            notes.append(f"{near} of {prompts} prompts of {name} were left out: near-duplicates of training text")
        elif overlapping or near:
            notes.append(
                f"of the {prompts} prompts of {name}, {near} are near-duplicates of training text and {overlapping} "
                f"share {found['ngram']} words in a row with it: a model may know them"
            )
    return notes


def size_of(gib: float) -> str:
    """Return a size in words: ``1.50 GiB``, ``12.0 MiB``."""
    return f"{gib:.2f} GiB" if gib >= 1 else f"{gib * 1024:.1f} MiB"
