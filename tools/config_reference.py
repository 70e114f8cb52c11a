"""Regenerate the tables in ``configs/README.md``; run this after changing an option."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_rlpt.config.reference import BEGIN, END, reference  # noqa: E402


def main() -> None:
    """Replace the text between the two marker lines."""
    path = ROOT / "configs/README.md"
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    path.write_text(before + reference() + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
