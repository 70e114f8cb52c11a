"""A teacher server without a model: its verdict depends only on the two texts.

For tests that are not about judging; ``test_teacher_server.py`` tests a server with a model.
"""

from __future__ import annotations

import contextlib
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any

from hostile_server import Exchange, chat, says, serving

CONTINUATION = re.compile(r"\[begin continuation \d (\S+)\]\n(.*?)\n\[end continuation \d \1\]", re.DOTALL)


@contextlib.contextmanager
def judging() -> Iterator[dict[str, Any]]:
    """Yield the section of a configuration whose workers use this server, which runs inside the context."""
    with serving(judge_texts) as server:
        workers = {"endpoints": [{"url": server.url}], "groups": 2, "lease": 5.0, "metrics_port": -1}
        yield {"run_in": "workers", "judge": "generative", "workers": workers}


async def judge_texts(exchange: Exchange) -> bool | None:
    texts = [text for _, text in CONTINUATION.findall(exchange.body["messages"][-1]["content"])]
    better = max(range(len(texts)), key=lambda number: zlib.crc32(texts[number].encode()), default=0)
    verdict = {"reasoning": "It has the larger sum.", "verdict": str(better + 1)}
    return await says(chat(json.dumps(verdict)))(exchange)
