"""A teacher server that misbehaves by script, over real sockets.

The script has one behavior per request for a reply; the last one repeats. Model listings and probes of the client,
which request one token, are counted separately and answered correctly, unless configured otherwise.
"""

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Exchange:
    """One request and the connection to its client."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def answer(self, status: int, data: bytes, headers: str = "", length: int | None = None) -> bool:
        """Send an answer, which may announce more than it has; return whether the connection can be reused."""
        head = f"HTTP/1.1 {status} Said\r\nContent-Type: application/json\r\n{headers}"
        self.writer.write(f"{head}Content-Length: {len(data) if length is None else length}\r\n\r\n".encode() + data)
        await self.writer.drain()
        return length is None

    async def until_client_leaves(self) -> None:
        while await self.reader.read(1 << 16):
            pass

    @property
    def is_probe(self) -> bool:
        return self.path.endswith("/models") or (self.path.endswith("/chat/completions") and self.tokens == 1)

    @property
    def tokens(self) -> int:
        return self.body.get("max_tokens", 0)


Behaviour = Callable[[Exchange], Awaitable[bool | None]]


def chat(content: object = "fine", **more: object) -> dict:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    return {"choices": [choice | more], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}


def says(body: object, status: int = 200, headers: str = "") -> Behaviour:
    """Answer with ``body`` as JSON, or bytes unchanged."""

    async def behave(exchange: Exchange) -> bool:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await exchange.answer(status, data, headers)

    return behave


ok = says(chat())


def refuses(status: int, headers: str = "", message: str = "no") -> Behaviour:
    return says({"error": {"message": message}}, status, headers)


def slow(seconds: float) -> Behaviour:
    async def behave(exchange: Exchange) -> bool:
        await asyncio.sleep(seconds)
        return await exchange.answer(200, json.dumps(chat()).encode())

    return behave


async def reset(exchange: Exchange) -> None:
    """Reset the TCP connection instead of answering."""
    raw = exchange.writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    exchange.writer.transport.abort()


async def half(exchange: Exchange) -> bool:
    """Send half of an answer."""
    data = json.dumps(chat()).encode()
    return await exchange.answer(200, data[: len(data) // 2], length=len(data))


async def hang(exchange: Exchange) -> None:
    """Send nothing."""
    await exchange.until_client_leaves()


async def hang_in_body(exchange: Exchange) -> None:
    """Send the start of an answer, then hang."""
    await half(exchange)
    await exchange.until_client_leaves()


async def hang_in_complaint(exchange: Exchange) -> None:
    """Send an error status, then hang before its body."""
    await exchange.answer(500, b"{", length=100)
    await exchange.until_client_leaves()


async def drip(exchange: Exchange) -> None:
    """Send one byte per second."""
    data = json.dumps(chat()).encode()
    await exchange.answer(200, b"", length=len(data))
    for byte in data:
        exchange.writer.write(bytes([byte]))
        await exchange.writer.drain()
        await asyncio.sleep(1)


async def huge(exchange: Exchange) -> None:
    """Send 10 MB in chunks, without announcing the size."""
    exchange.writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(160):
        exchange.writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
        await exchange.writer.drain()
    exchange.writer.write(b"0\r\n\r\n")


@dataclass
class HostileServer:
    """Serves on its own port inside the context."""

    script: list[Behaviour] = field(default_factory=lambda: [ok])
    probe: Behaviour = ok
    owner: str = "vllm"
    model: str = "teacher"
    root: str = ""
    """Folder that it says it has loaded the model from."""
    port: int = 0
    requests: list[Exchange] = field(default_factory=list)
    """Requests that the script answered."""
    probes: int = 0
    open: int = 0
    """Open connections."""
    busy: int = 0
    peak: int = 0
    """Most concurrent scripted requests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def __aenter__(self) -> "HostileServer":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        self._tasks: set[asyncio.Task] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and cut open connections; ``start`` serves on the same port again."""
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def until_open(self, count: int) -> None:
        """Wait until this many connections are open."""
        async with asyncio.timeout(10):
            while self.open != count:
                await asyncio.sleep(0.01)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        self.open += 1
        try:
            while (exchange := await self._receive(reader, writer)) is not None and await self._behave(exchange):
                pass
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.transport.abort() if writer.transport.is_closing() else writer.close()

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Exchange | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        except asyncio.IncompleteReadError:
            return None
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        data = await reader.readexactly(int(headers.get("content-length", 0)))
        return Exchange(method, path, headers, json.loads(data) if data else {}, reader, writer)

    async def _behave(self, exchange: Exchange) -> bool:
        if exchange.is_probe:
            self.probes += 1
            if self.probe is ok and exchange.path.endswith("/models"):
                listed = {"id": self.model, "owned_by": self.owner} | ({"root": self.root} if self.root else {})
                return await says({"data": [listed]})(exchange)
            return bool(await self.probe(exchange))
        behaviour = self.script[min(len(self.requests), len(self.script) - 1)]
        self.requests.append(exchange)
        self.busy += 1
        self.peak = max(self.peak, self.busy)
        try:
            return bool(await behaviour(exchange))
        finally:
            self.busy -= 1


@contextmanager
def serving(*script, probe=None, **settings):
    """Run a hostile server in a thread, because the command has its own event loop."""
    server = HostileServer(list(script), **({"probe": probe} if probe else {}), **settings)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
        yield server
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
