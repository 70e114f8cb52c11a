"""A package named vllm whose server answers at once: for tests of what starts, announces and ends it."""

from __future__ import annotations

from pathlib import Path

_SERVER = """
import http.server, json, os, socket, sys

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "fake", "owned_by": "vllm"}]}')
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}')
host, port = (sys.argv[sys.argv.index(f"--{what}") + 1] for what in ("host", "port"))
port = int(port)
with open(os.environ["STARTED"], "w") as file:
    json.dump({"pid": os.getpid(), "arguments": sys.argv[1:], "variables": sorted(os.environ),
               "key": os.environ.get("VLLM_API_KEY")}, file)
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
Server((host, port), Answer).serve_forever()
"""


def write_fake_vllm(folder: Path) -> Path:
    """Write the package into ``folder`` and return that, for PYTHONPATH.

    The server writes its process, arguments and variables to the file that the variable STARTED names.
    """
    inside = folder / "vllm/entrypoints/openai"
    inside.mkdir(parents=True)
    for package in (inside, *list(inside.parents)[:2]):
        (package / "__init__.py").touch()  # else the real package wins
    (inside / "api_server.py").write_text(_SERVER)
    return folder
