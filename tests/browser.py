"""Debian's Chromium without a window, driven over its DevTools protocol; nothing is downloaded and nothing reported."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

_START_SECONDS = 120.0
_ANSWER_SECONDS = 120.0
_OPTIONS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--no-sandbox",  # tests run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--disable-breakpad",
    "--metrics-recording-only",
    "--no-first-run",
    "--no-default-browser-check",
    "--no-pings",
    "--disable-features=MediaRouter,OptimizationHints,Translate,DialMediaRouteProvider",
    "--hide-scrollbars",
)


class Chromium:
    """A browser with one page. ``problems`` collects what its console says, ``requests`` what it asks for."""

    def __init__(self, folder: Path) -> None:
        """Start the browser with its profile in ``folder``."""
        folder.mkdir(parents=True)
        environment = os.environ | {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
        self._log = (folder / "chromium.log").open("wb")
        self._process = subprocess.Popen(
            ["chromium", *_OPTIONS, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            stdout=self._log, stderr=self._log, env=environment, start_new_session=True,
        )  # fmt: skip
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._number = 0
        self._loaded = False
        try:
            self._socket = self._attach(folder / "profile" / "DevToolsActivePort")
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol on the page and return its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def open(
        self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False, scripts: bool = True
    ) -> None:
        """Open a file in a window of that size and wait until it has loaded and drawn; its scripts may be disabled."""
        self.call("Emulation.setScriptExecutionDisabled", value=False)
        self.resize(width, height, dark=dark)
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.problems.clear()
        self.requests.clear()
        self._loaded = False
        self.call("Page.navigate", url=page.resolve().as_uri())
        deadline = time.monotonic() + _ANSWER_SECONDS
        while not self._loaded:
            assert time.monotonic() < deadline, "the page does not load"
            self._receive()
        if scripts:
            self.settle()

    def resize(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Give the page another size and color scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)  # fmt: skip
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.settle()

    def settle(self) -> None:
        """Wait until the page has drawn two frames, so that its observers have run."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; a promise is awaited."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, selector: str, index: int = 0) -> None:
        """Click on the middle of an element with the mouse."""
        x, y = self.middle(selector, index)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def hover(self, selector: str, index: int = 0) -> None:
        """Move the mouse to the middle of an element."""
        x, y = self.middle(selector, index)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settle()

    def middle(self, selector: str, index: int = 0) -> tuple[float, float]:
        """Scroll to an element and return where its middle is."""
        found = self.run(
            f"(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[{index}]; if (!e) return null;"
            "e.scrollIntoView({block: 'center', behavior: 'instant'}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        assert found, f"no element {selector}"
        return found[0], found[1]

    def press(self, *keys: str) -> None:
        """Press keys by name (``Enter``, ``ArrowDown``) or character."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            about: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": codes.get(key, 0)}
            self.call("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
            self.call("Input.dispatchKeyEvent", type="keyUp", **about)
        self.settle()

    def type(self, text: str) -> None:
        """Insert text where the focus is."""
        self.call("Input.insertText", text=text)
        self.settle()

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of the first visible ``select`` by keyboard, as a user does."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})].find(one => one.checkVisibility())"
        steps = self.run(
            f"(() => {{ const s = {found}; s.focus();"
            f"return [...s.options].findIndex(o => o.value === {json.dumps(value)}) - s.selectedIndex; }})()"
        )
        self.press(*["ArrowDown" if steps > 0 else "ArrowUp"] * abs(steps))
        assert self.run(f"{found}.value") == value

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Write the page as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        """Return the page as it prints."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"])

    def close(self) -> None:
        """End the browser and its processes."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _attach(self, port_file: Path) -> ClientConnection:
        deadline = time.monotonic() + _START_SECONDS
        while not (port_file.is_file() and len(lines := port_file.read_text().split()) == 2):
            assert self._process.poll() is None, "chromium ended; see chromium.log"
            assert time.monotonic() < deadline, "chromium does not start"
            time.sleep(0.05)
        with connect(f"ws://127.0.0.1:{lines[0]}{lines[1]}", proxy=None, open_timeout=_ANSWER_SECONDS) as browser:
            browser.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
            while (answer := json.loads(browser.recv(_ANSWER_SECONDS))).get("id") != 1:
                pass
            targets = answer["result"]["targetInfos"]
        page = next(one for one in targets if one["type"] == "page")
        address = f"ws://127.0.0.1:{lines[0]}/devtools/page/{page['targetId']}"
        return connect(address, max_size=None, proxy=None, open_timeout=_ANSWER_SECONDS)

    def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._socket.recv(_ANSWER_SECONDS))
        about = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.consoleAPICalled" if about["type"] in ("error", "warning", "assert"):
                self.problems.append(str(about["args"]))
            case "Runtime.exceptionThrown":
                self.problems.append(str(about["exceptionDetails"]))
            case "Log.entryAdded" if about["entry"]["level"] in ("error", "warning"):
                self.problems.append(about["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(about["request"]["url"])
        return message
