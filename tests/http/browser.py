"""A real headless Chromium, told what to do over its own debugging protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE_S = 60.0


class Page:
    """One tab. `complaints` are errors of the page, its console, and what its policy forbade."""

    def __init__(self, wire: aiohttp.ClientWebSocketResponse) -> None:
        self._wire = wire
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.complaints: list[str] = []

    async def listen(self) -> None:
        """For a task of its own."""
        async for message in self._wire:
            told = message.json()
            if "id" in told:
                self._waiting.pop(told["id"]).set_result(told)
            elif told["method"] == "Runtime.exceptionThrown":
                self.complaints.append(str(told["params"]["exceptionDetails"]))
            elif told["method"] == "Log.entryAdded" and told["params"]["entry"]["level"] in ("error", "warning"):
                self.complaints.append(str(told["params"]["entry"]["text"]))

    async def call(self, method: str, **params: Any) -> Any:
        """One command of the protocol."""
        number = next(self._numbers)
        self._waiting[number] = answer = asyncio.get_running_loop().create_future()
        await self._wire.send_json({"id": number, "method": method, "params": params})
        told = await asyncio.wait_for(answer, PATIENCE_S)
        assert "error" not in told, told
        return told["result"]

    async def js(self, expression: str) -> Any:
        """What an expression is in the page."""
        told = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def until(self, expression: str) -> None:
        """Polls until an expression is true in the page; the limit only keeps a defect from hanging the suite."""
        async with asyncio.timeout(PATIENCE_S):
            while not await self.js(f"Boolean({expression})"):
                await asyncio.sleep(0.05)

    async def go(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.until(f"location.href.startsWith({url!r}) && document.readyState === 'complete'")

    async def look(self, width: int, height: int, scheme: str) -> None:
        """As on a screen of that size, by day (`light`) or night (`dark`)."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def shot(self) -> bytes:
        """A picture, PNG."""
        return base64.b64decode((await self.call("Page.captureScreenshot"))["data"])


@contextlib.asynccontextmanager
async def browsing(profile: Path) -> AsyncIterator[Page]:
    """A new browser with one tab, gone when the block ends."""
    assert CHROMIUM is not None
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        "--disable-dev-shm-usage",
    ]
    options += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        [CHROMIUM, *options, f"--user-data-dir={profile}", "about:blank"], stdout=quiet, stderr=quiet
    )
    try:
        told = profile / "DevToolsActivePort"
        async with asyncio.timeout(PATIENCE_S):
            while not told.exists() or not told.read_text().count("\n"):
                assert process.poll() is None, "the browser did not come up"
                await asyncio.sleep(0.05)
        port = told.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                tab = next(each for each in await answer.json(content_type=None) if each["type"] == "page")
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as wire:
                page = Page(wire)
                listening = asyncio.create_task(page.listen())
                for domain in ("Page", "Runtime", "Log"):
                    await page.call(f"{domain}.enable")
                yield page
                listening.cancel()
    finally:
        process.terminate()
        process.wait(60)
