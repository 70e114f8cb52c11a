"""A teacher server without a model, over real sockets: its verdict depends on the two texts alone.

For runs that are about something else than judging; a server with a model is tried in ``test_teacher_server.py``.
"""

from __future__ import annotations

import json
import re
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

_CONTINUATION = re.compile(r"\[begin continuation \d (\S+)\]\n(.*?)\n\[end continuation \d \1\]", re.DOTALL)


class JudgingServer:
    """Serves as long as the context lasts."""

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def teacher(self) -> dict[str, Any]:
        """The section of a configuration whose workers ask this server."""
        url = f"http://127.0.0.1:{self._server.server_port}/v1"
        workers = {"endpoints": [{"url": url}], "groups": 2, "lease": 5.0, "metrics_port": -1}
        return {"place": "workers", "judge": "generative", "workers": workers}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({"object": "list", "data": [{"id": "teacher", "object": "model"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        texts = [text for _, text in _CONTINUATION.findall(asked["messages"][-1]["content"])]
        better = max(range(len(texts)), key=lambda number: zlib.crc32(texts[number].encode()), default=0)
        content = json.dumps({"reasoning": "It has the larger sum.", "verdict": str(better + 1)})
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        self._answer({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 9}})

    def _answer(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass
