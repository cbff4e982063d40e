"""A headless Chromium that tests speak to over its debugging port."""

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions")
_LIMIT_SECONDS = 90


class Browser:
    """One page of a browser; its console's errors are kept.

    Args:
        profile: Folder for what the browser keeps.
    """

    def __init__(self, profile: Path) -> None:
        # Chromium writes the port it took into its profile.
        command = [
            str(CHROMIUM),
            *_FLAGS,
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
        ]
        self._process = subprocess.Popen(
            [*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._port = self._wait_for(profile / "DevToolsActivePort")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=_LIMIT_SECONDS)

    def visit(
        self, address: str, before: list[str], act: Callable[[], Any], after: list[str]
    ) -> tuple[list[Any], list[Any], list[str]]:
        """Opens a page and evaluates scripts in it, each again until it gives something true.

        Args:
            address: What to open.
            before: JavaScript expressions.
            act: What happens meanwhile.
            after: Expressions for afterwards.

        Returns:
            What both gave, and the errors of the console.
        """
        return asyncio.run(self._visit(address, before, act, after))

    async def _visit(
        self, address: str, before: list[str], act: Callable[[], Any], after: list[str]
    ) -> tuple[list[Any], list[Any], list[str]]:
        with urlopen(f"http://127.0.0.1:{self._port}/json/list") as answer:
            target = next(one for one in json.load(answer) if one["type"] == "page")
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket,
        ):
            page = _Page(socket)
            for domain in ("Page", "Runtime", "Log"):
                await page.call(f"{domain}.enable")
            await page.call("Page.navigate", url=address)
            old = [await page.until(script) for script in before]
            await asyncio.to_thread(act)
            new = [await page.until(script) for script in after]
            return old, new, page.errors

    def _wait_for(self, path: Path) -> int:
        deadline = time.monotonic() + _LIMIT_SECONDS
        while not (path.exists() and path.read_text().strip()):
            assert time.monotonic() < deadline, "chromium did not start"
            time.sleep(0.1)
        return int(path.read_text().split()[0])


class _Page:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0
        self.errors: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=_LIMIT_SECONDS)
            self._note(message)
            if message.get("id") == self._number:
                return message.get("result", {})

    async def until(self, script: str) -> Any:
        deadline = time.monotonic() + _LIMIT_SECONDS
        while True:
            answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
            value = answer.get("result", {}).get("value")
            if value:
                return value
            assert time.monotonic() < deadline, f"never true: {script}; {answer}"
            await asyncio.sleep(0.2)

    def _note(self, message: dict[str, Any]) -> None:
        told = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(told["exceptionDetails"])[:500])
        elif message.get("method") == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(told["entry"]["text"])
        elif message.get("method") == "Runtime.consoleAPICalled" and told["type"] == "error":
            self.errors.append(json.dumps(told["args"])[:500])
