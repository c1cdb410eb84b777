"""A real browser without a window, spoken to over two pipes in its own protocol; nothing to install beside it."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # Chromium refuses to run as root with one, as in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
PATIENCE_SECONDS = 60.0


def find_browser() -> str | None:
    """Return a Chromium, also that of playwright; None where there is none."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    downloaded = sorted(Path.home().glob(".cache/ms-playwright/chromium*/*/chrome*"))
    return str(downloaded[-1]) if downloaded else None


class Browser:
    """Runs as long as the context."""

    def __init__(self) -> None:
        self._number = 0
        self._rest = b""
        self._messages: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        path = find_browser()
        assert path is not None, "ask find_browser() first"
        self._profile = tempfile.TemporaryDirectory(prefix="browser")
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()

        def wire() -> None:
            # Chromium reads commands from descriptor 3 and writes answers to 4.
            os.dup2(read_there, 63)
            os.dup2(write_there, 64)
            os.dup2(63, 3)
            os.dup2(64, 4)

        self._process = subprocess.Popen(
            [path, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            preexec_fn=wire,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_there)
        os.close(write_there)
        self._read, self._write = read_here, write_here
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        shutil.rmtree(self._profile.name, ignore_errors=True)
        self._profile.cleanup()

    def open(self, address: str, *, width: int, height: int = 900, dark: bool = False, javascript: bool = True) -> Page:
        """Open a page and wait until it is loaded."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.ask(f"{domain}.enable")
        page.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = "dark" if dark else "light"
        page.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        page.ask("Emulation.setScriptExecutionDisabled", value=not javascript)
        page.ask("Page.navigate", url=address)
        page.wait_for("Page.loadEventFired")
        return page

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its answer."""
        self._number += 1
        number, message = self._number, {"id": self._number, "method": method, "params": parameters}
        os.write(self._write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        for answer in self.messages():
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._messages.append(answer)
        raise AssertionError("unreachable")

    def heard(self, session: str) -> list[dict[str, Any]]:
        """Return what was told of a page so far."""
        return [message for message in self._messages if message.get("sessionId") == session]

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield messages as they come."""
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            while b"\0" in self._rest:
                message, _, self._rest = self._rest.partition(b"\0")
                yield json.loads(message)
            ready, _, _ = select.select([self._read], [], [], max(end - time.monotonic(), 0))
            piece = os.read(self._read, 2**20) if ready else b""
            if not piece:
                raise TimeoutError(f"The browser says nothing; it is {self._process.poll()}.")
            self._rest += piece

    def keep(self, message: dict[str, Any]) -> None:
        self._messages.append(message)


class Page:
    """A page that is open."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.ask(method, self._session, **parameters)

    def wait_for(self, method: str) -> None:
        if any(message.get("method") == method for message in self._browser.heard(self._session)):
            return
        for message in self._browser.messages():
            self._browser.keep(message)
            if message.get("method") == method and message.get("sessionId") == self._session:
                return

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def move_to(self, selector: str, *, right: float = 0.5, number: int = 0) -> None:
        """Move the pointer onto an element."""
        script = (
            f"(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[{number}]; e.scrollIntoView({{block:'center',"
            "behavior:'instant'}); const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()"
        )
        left, top, width, height = self.evaluate(script)
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=left + right * width, y=top + height / 2)

    @property
    def errors(self) -> list[str]:
        """What the console was told that is no plain message."""
        found = []
        for message in self._browser.heard(self._session):
            if message.get("method") == "Runtime.exceptionThrown":
                found.append(json.dumps(message["params"]))
            elif message.get("method") == "Runtime.consoleAPICalled":
                found.append(json.dumps(message["params"]["args"]))
            elif message.get("method") == "Log.entryAdded":
                found.append(message["params"]["entry"]["text"])
        return found

    @property
    def requests(self) -> list[str]:
        """What was asked for, the page itself included."""
        sent = [m for m in self._browser.heard(self._session) if m.get("method") == "Network.requestWillBeSent"]
        return [message["params"]["request"]["url"] for message in sent]

    def screenshot(self, path: str | Path, *, clip: tuple[int, int, int, int] | None = None) -> None:
        """Write what is seen as PNG."""
        area = dict(zip(("x", "y", "width", "height"), clip, strict=True)) | {"scale": 1} if clip else None
        options = {"clip": area, "captureBeyondViewport": True} if area else {}
        Path(path).write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png", **options)["data"]))
