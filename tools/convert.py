"""``rlpt convert`` as a script: convert a checkpoint between Hugging Face, Megatron and (as input) GGUF."""

from __future__ import annotations

import sys

from megatron_rlpt.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
