"""A headless Chromium, driven over its DevTools protocol: open a page, ask it things, take its picture."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import pytest

from tests.integration.processes import until

OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
NO_REQUESTS = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
ANSWER_LIMIT_S = 60.0


class Chromium:
    """A context. `complaints`: what the page has written to the console as a warning or error, and what it raised.
    `asked`: the addresses of all that it has asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> Chromium:
        program = shutil.which("chromium") or shutil.which("chromium-browser")
        if program is None:
            pytest.fail("chromium is missing: `make test-long` installs it, or `apt-get install chromium`")
        command = [program, *OPTIONS, *NO_REQUESTS, "--remote-debugging-port=0", f"--user-data-dir={self._folder}"]
        self._process = subprocess.Popen(
            [*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._loop.run_until_complete(self._connect(until(self._page, "Chromium is up", 60)))
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.run_until_complete(self._disconnect())
        self._loop.close()
        self._process.terminate()
        self._process.wait(30)

    def open(self, url: str) -> None:
        self._ask("Page.navigate", url=url)

    def says(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def looks(self, *, width: int, height: int, phone: bool, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def picture(self, path: Path) -> None:
        """Of the whole page, as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        taken = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def _page(self) -> str | None:
        """Where the page can be driven."""
        try:
            port = (self._folder / "DevToolsActivePort").read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as response:
                pages = [each for each in json.load(response) if each["type"] == "page"]
        except (OSError, IndexError):
            return None
        return pages[0]["webSocketDebuggerUrl"] if pages else None

    async def _connect(self, url: str) -> None:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(url, max_msg_size=0)

    async def _disconnect(self) -> None:
        await self._socket.close()
        await self._session.close()

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        return self._loop.run_until_complete(asyncio.wait_for(self._answer(method, params), ANSWER_LIMIT_S))

    async def _answer(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == number:
                assert "error" not in message, message
                found: dict[str, Any] = message["result"]
                return found
            self._heard(message)

    def _heard(self, message: dict[str, Any]) -> None:
        match message.get("method"), message.get("params"):
            case "Runtime.exceptionThrown", params:
                self.complaints.append(json.dumps(params))
            case "Runtime.consoleAPICalled", {"type": "error" | "warning"} as params:
                self.complaints.append(json.dumps(params))
            case "Log.entryAdded", {"entry": {"level": "error" | "warning"} as entry}:
                self.complaints.append(json.dumps(entry))
            case "Network.requestWillBeSent", {"request": {"url": url}}:
                self.asked.append(url)
