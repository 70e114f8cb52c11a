"""Start time and speed of a teacher server on this CPU, with and without compiled kernels.

    .venv/bin/python tools/bench/teacher_start.py [--requests 32] [--at-once 8]

For each of the two: seconds from the start of ``rlpt teacher serve`` until it is healthy, and the seconds for requests
of 120 tokens with answers of 16, measured three times. Caches of earlier starts are used.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"eager": "--enforce-eager", "compiled": "--no-enforce-eager"}
PORT, PATIENCE = 8124, 600.0


def serve(folder: Path, option: str) -> subprocess.Popen[bytes]:
    """Start a server for the demo's configuration, with its own buffer."""
    command = [sys.executable, "-m", "megatron_rlpt", "teacher", "serve", "-c", "configs/demo_cluster.yaml"]
    place = [f"buffer.url=sqlite:///{folder}/buffer.sqlite", "buffer.name=bench", f"run.dir={folder}/run"]
    return subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(PORT), *place, option],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def await_health(server: subprocess.Popen[bytes]) -> float:
    """Return the seconds until the server answers."""
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with exit code {server.returncode}; is port {PORT} in use?")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2):
                return time.monotonic() - began
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"the server did not answer within {PATIENCE:g} s")


def ask(number: int) -> None:
    """Send one request, whose prompt shares no prefix with the others."""
    prompt = [(number * 31 + place * 7) % 20_000 + 100 for place in range(120)]
    body = {"model": "smollm2-135m-instruct", "prompt": prompt, "max_tokens": 16, "ignore_eos": True, "seed": number}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        answer.read()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--at-once", type=int, default=8)
    arguments = parser.parse_args()
    for kind, option in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            server = serve(Path(folder), option)
            try:
                ready = await_health(server)
                ask(0)
                seconds = []
                for first in range(1, 3 * arguments.requests, arguments.requests):
                    began = time.monotonic()
                    with ThreadPoolExecutor(arguments.at_once) as pool:
                        list(pool.map(ask, range(first, first + arguments.requests)))
                    seconds.append(time.monotonic() - began)
            finally:
                server.terminate()
                server.wait()
        print(f"{kind}: answers after {ready:.0f} s; {arguments.requests} requests in {min(seconds):.1f} to "
              f"{max(seconds):.1f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
