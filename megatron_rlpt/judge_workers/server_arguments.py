"""Arguments of vLLM's server that are refused, before a launch waits in a queue as well as before a server starts."""

from __future__ import annotations

from megatron_rlpt.errors import ConfigError

# vLLM reads underscores as dashes, and takes what an argument begins with for the whole of it.
_REFUSED = {
    "--trust": "would run code from the model's folder, which is never done; leave it out",
    "--api-k": "would be on a command line, which every user of the machine can read; put the key into a variable and "
    "name that in teacher.workers.key_env",
}
"""How an argument begins -> why it is refused."""


def check_argument(where: str, argument: str) -> None:
    """Refuse an argument that runs code or shows a key; its value is not repeated.

    Args:
        where: says in errors where it stands, such as ``teacher.arguments has``.
        argument: one argument for vLLM's server.

    Raises:
        ConfigError: it is such.
    """
    name = argument.partition("=")[0]
    for start, why in _REFUSED.items():
        if name.replace("_", "-").startswith(start):
            raise ConfigError(f"{where} {name}, which {why}")
