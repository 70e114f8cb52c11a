"""``python -m megatron_rlpt`` is the ``rlpt`` command."""

from megatron_rlpt.cli import main

if __name__ == "__main__":  # checkpointing spawns processes that import this module again
    main()
