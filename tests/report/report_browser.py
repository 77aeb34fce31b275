"""A real headless Chromium, driven over its debugging pipe: nothing but the browser itself is needed.

with Browser() as browser:
    page = browser.open(path, width=400)
    page.evaluate("document.title"); page.problems; page.requests
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]


def find_browser() -> str | None:
    """The path of a Chromium, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Page:
    """One opened page: what it asked for and what it complained about."""

    browser: Browser
    session: str
    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, through the debugger (it works with scripts switched off)."""
        answer = self.browser.call("Runtime.evaluate", {"expression": expression, "returnByValue": True}, self)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Writes the whole page as PNG."""
        answer = self.browser.call("Page.captureScreenshot", {"captureBeyondViewport": True}, self)
        path.write_bytes(base64.b64decode(answer["data"]))

    def pdf(self) -> bytes:
        """The page as it prints."""
        return base64.b64decode(self.browser.call("Page.printToPDF", {}, self)["data"])

    def press(self, key: str) -> None:
        """Presses a key."""
        codes = {"Tab": 9, "Enter": 13}
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            body = {
                "type": kind,
                "key": key,
                "code": key,
                "windowsVirtualKeyCode": codes[key],
                **(text if kind == "keyDown" else {}),
            }
            self.browser.call("Input.dispatchKeyEvent", body, self)


class Browser:
    """A Chromium process and the pipe to it."""

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        profile = self._stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        to_child, self._write = os.pipe()
        self._read, from_child = os.pipe()
        command = [str(find_browser()), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        # The browser reads commands on descriptor 3 and answers on 4.
        script = f'exec "$@" 3<&{to_child} 4>&{from_child}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command],
            pass_fds=(to_child, from_child),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(to_child)
        os.close(from_child)
        self._buffer, self._number = b"", 0
        self._pages: dict[str, Page] = {}
        self._seen: set[tuple[str, str]] = set()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.call("Browser.close", {})
        self._process.wait(timeout=20)
        os.close(self._read)
        os.close(self._write)
        self._stack.close()

    def call(self, method: str, parameters: dict[str, Any], page: Page | None = None) -> dict[str, Any]:
        """The answer to one command; events that come in between are noted on their page."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if page is not None:
            message["sessionId"] = page.session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def open(self, path: Path, *, width: int = 1000, dark: bool = False, scripts: bool = True) -> Page:
        """The page of a file, loaded to its end."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", {}, page)
        self.call(
            "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}, page
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", {"features": [scheme]}, page)
        self.call("Emulation.setScriptExecutionDisabled", {"value": not scripts}, page)
        self.call("Page.navigate", {"url": path.as_uri()}, page)
        while (session, "Page.loadEventFired") not in self._seen:
            self._note(self._next())
        page.evaluate("1")  # events raised while loading have arrived when this has its answer
        return page

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._read, 1 << 16)
            if not chunk:
                raise OSError("the browser went away")
            self._buffer += chunk
        message, self._buffer = self._buffer.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        session, method = event.get("sessionId", ""), event.get("method", "")
        self._seen.add((session, method))
        page = self._pages.get(session)
        if page is None:
            return
        match method:
            case "Network.requestWillBeSent":
                page.requests.append(event["params"]["request"]["url"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                page.problems.append(json.dumps(event["params"])[:400])
            case "Log.entryAdded":
                page.problems.append(event["params"]["entry"]["text"])
