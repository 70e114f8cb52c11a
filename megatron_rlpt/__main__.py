"""``python -m megatron_rlpt`` is the ``rlpt`` command."""

from megatron_rlpt.cli.main import entry

if __name__ == "__main__":  # vLLM starts processes that import this module again
    entry()
