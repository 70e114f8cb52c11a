"""Recovery of a teacher server: seconds from its return to the first good reply, while a worker keeps requesting.

    python tools/bench/teacher_recovery.py [--down 0.5 3 20] [--runs 10]

The server stops listening, cuts open connections, and listens again after the given seconds. The client's breaker,
cool-down and back-off are those of a worker.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import time
from statistics import median

from megatron_rlpt.config import EndpointConfig
from megatron_rlpt.judge_workers.client.pool import TeacherPool
from megatron_rlpt.observe.log import ROOT
from megatron_rlpt.teacher.generator import Message, Reply, Request
from megatron_rlpt.types import Failed

_ASKERS = 16
_DEADLINE = 120.0
_QUESTION = Request((Message("user", "Which is better?"),), seed=1, max_tokens=64)


class Server:
    """A server that answers every request immediately."""

    def __init__(self) -> None:
        self.port = 0
        self._open: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Listen, on the same port as before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Refuse connections and cut open ones."""
        self._server.close()
        for writer in self._open:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        choice = {"message": {"content": "The first."}, "finish_reason": "stop"}
        data = json.dumps({"choices": [choice], "data": [{"id": "teacher"}]}).encode()
        self._open.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                await reader.readexactly(int(lengths[0].split(b":")[1]) if lengths else 0)
                await asyncio.sleep(0.05)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()


async def recover(down: float) -> tuple[float, int]:
    """Return the seconds from the server's return to the first good reply, and the number of failed requests."""
    server, replies, failed = Server(), asyncio.Queue[float](), 0
    await server.start()

    async def keep_asking() -> None:
        nonlocal failed
        while True:
            reward = await pool(_QUESTION)
            failed += isinstance(reward, Failed)
            if isinstance(reward, Reply):
                replies.put_nowait(time.monotonic())

    async with TeacherPool([EndpointConfig(f"http://127.0.0.1:{server.port}/v1")], _DEADLINE) as pool:
        await pool.wait_until_ready(10)
        askers = [asyncio.create_task(keep_asking()) for _ in range(_ASKERS)]
        for _ in range(_ASKERS):
            await replies.get()
        server.stop()
        # Vary the point in the client's back-off.
        await asyncio.sleep(down + random.random())
        while not replies.empty():
            replies.get_nowait()
        await server.start()
        back = time.monotonic()
        first = await replies.get()
        for task in askers:
            task.cancel()
        await asyncio.gather(*askers, return_exceptions=True)
    server.stop()
    return first - back, failed


def main() -> None:
    """Run the command line: one line per length of the outage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--down", type=float, nargs="+", default=[0.5, 3.0, 20.0], help="seconds of the outage")
    parser.add_argument("--runs", type=int, default=10)
    arguments = parser.parse_args()
    logging.getLogger(ROOT).setLevel(logging.ERROR)

    async def measure(down: float) -> list[tuple[float, int]]:
        return [await recover(down) for _ in range(arguments.runs)]

    for down in arguments.down:
        measured = asyncio.run(measure(down))
        seconds = sorted(first for first, _ in measured)
        print(
            f"away {down:g} to {down + 1:g} s: first good reply {median(seconds):.2f} s after the return "
            f"({seconds[0]:.2f} to {seconds[-1]:.2f} over {arguments.runs} runs), "
            f"{sum(failed for _, failed in measured)} of all requests failed"
        )


if __name__ == "__main__":
    main()
