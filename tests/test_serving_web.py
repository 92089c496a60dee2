"""The playground in headless Chromium, over DevTools; keys are pressed as a person would. Skipped without Chromium."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websockets

from avray.serving.auth import Keys
from avray.settings.serve import JobSettings, ServeSettings
from tests.serving import listening, save_audio_gpt2, save_clips, save_codec_lm, save_continuation
from tests.test_serving import wav

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]
KEY = "a-key"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The gateway behind uvicorn, with a key."""
    folder = tmp_path_factory.mktemp("web")
    serve = ServeSettings(jobs=JobSettings(str(folder / "jobs")))
    runs = {"next": save_continuation(folder / "next"), "speech": save_codec_lm(folder / "speech"),
            "video": save_clips(folder / "video"), "writes": save_audio_gpt2(folder / "writes")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AVRAY_API_KEYS", KEY)
        keys = Keys.from_environment()
    with listening(runs, serve, keys) as port:
        yield f"127.0.0.1:{port}"


class Page:
    """A tab, through Chromium's own protocol."""

    def __init__(self, connection: Any) -> None:
        self.connection, self.numbers = connection, itertools.count(1)

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self.numbers)
        await self.connection.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(await asyncio.wait_for(self.connection.recv(), 30))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    async def value(self, script: str) -> Any:
        result = await self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, script: str) -> None:
        for _ in range(300):
            if await self.value(script):
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"{script}: {await self.value('document.body.innerText')}")

    async def press(self, key: str, code: int, text: str = "") -> None:
        common = {"key": key, "windowsVirtualKeyCode": code}
        await self.send("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        await self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    async def tab_to(self, element: str) -> None:
        for _ in range(30):
            if await self.value("document.activeElement.id") == element:
                return
            await self.press("Tab", 9)
        raise AssertionError(f"Tab never reaches {element}")

    async def type(self, text: str) -> None:
        await self.send("Input.insertText", text=text)


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator[str]:
    """A browser's DevTools address."""
    assert CHROMIUM is not None
    process = subprocess.Popen(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio",
         "--remote-debugging-port=0", f"--user-data-dir={tmp_path / 'profile'}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    said = tmp_path / "profile" / "DevToolsActivePort"
    deadline = time.monotonic() + 60
    while not (said.exists() and said.read_text().count("\n")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    yield said.read_text().splitlines()[0]
    process.terminate()
    process.wait()


def test_by_keyboard_alone(address: str, chromium: str, tmp_path: Path) -> None:
    import requests

    (tmp_path / "a.wav").write_bytes(wav())

    async def walk() -> None:
        tab = requests.put(f"http://127.0.0.1:{chromium}/json/new?about:blank", timeout=30).json()
        async with websockets.connect(tab["webSocketDebuggerUrl"], max_size=2**26) as connection:
            page = Page(connection)
            await page.send("Page.enable")
            await page.send("Page.navigate", url=f"http://me:{KEY}@{address}/")
            await page.until("document.title === 'avray playground' && !!document.getElementById('go')")
            await page.until("document.getElementById('error').textContent.includes('key')")
            await page.tab_to("key")
            await page.type(KEY)
            await page.press("Tab", 9)
            await page.until("document.querySelectorAll('#model option').length === 4")
            await page.tab_to("model")
            await page.press("ArrowDown", 40)
            await page.until("document.getElementById('model').value === 'speech'")
            await page.tab_to("prompt")
            await page.type("a bell")
            await page.tab_to("seconds")
            await page.type("0.4")
            await page.tab_to("seed")
            await page.type("3")
            await page.tab_to("go")
            await page.press("Enter", 13, "\r")
            await page.until("!document.getElementById('result').hidden")
            await page.until("document.getElementById('audio').duration > 0.3")
            assert "Seed 3" in await page.value("document.getElementById('again').textContent")
            drawn = ("(id => new Set(document.getElementById(id).getContext('2d').getImageData(0, 0, 300, 60).data)"
                     ".size)")
            assert await page.value(f"{drawn}('waveform')") > 1
            assert await page.value(f"{drawn}('spectrogram')") > 20
            await page.tab_to("copy-curl")
            await page.press("Enter", 13, "\r")
            await page.until("document.getElementById('code').textContent.includes('/v1/audio/generate')")
            code = await page.value("document.getElementById('code').textContent")
            assert '"input":"a bell"' in code and KEY not in code
            # A file, and the other model.
            document = await page.send("DOM.getDocument")
            chosen = await page.send("DOM.querySelector", nodeId=document["root"]["nodeId"], selector="#file")
            await page.send("DOM.setFileInputFiles", nodeId=chosen["nodeId"], files=[str(tmp_path / "a.wav")])
            await page.value("document.getElementById('model').focus()")
            await page.press("ArrowUp", 38)
            await page.until("document.getElementById('prompt-label').hidden")
            await page.tab_to("go")
            await page.press("Enter", 13, "\r")
            await page.until("document.getElementById('status').textContent.startsWith('Done')")
            assert await page.value("document.getElementById('error').textContent") == ""
            await page.tab_to("copy-python")
            await page.press("Enter", 13, "\r")
            await page.until("document.getElementById('code').textContent.includes('continuations')")
            # A clip, and what is heard, from the models that make them.
            await page.value("document.getElementById('model').focus()")
            for _ in range(2):
                await page.press("ArrowDown", 40)
            await page.until("document.getElementById('model').value === 'video'")
            assert await page.value("[...document.getElementById('task').options].map(o => o.value)") == [
                "audio", "video"]
            await page.tab_to("task")
            await page.press("ArrowDown", 40)
            await page.tab_to("prompt")
            await page.value("document.getElementById('prompt').select()")
            await page.type("show a")
            await page.tab_to("go")
            await page.press("Enter", 13, "\r")
            await page.until("document.getElementById('video').videoWidth === 64")
            assert await page.value("document.getElementById('audio').hidden")
            await page.value("document.getElementById('model').focus()")
            await page.press("ArrowDown", 40)
            await page.until("document.getElementById('format-label').hidden")
            await page.tab_to("go")
            await page.press("Enter", 13, "\r")
            await page.until("!document.getElementById('text').hidden")
            assert await page.value("document.getElementById('error').textContent") == ""
            unnamed = await page.value("[...document.querySelectorAll('input, select, textarea, button')].filter("
                                       "e => !e.labels?.length && !e.textContent.trim()).map(e => e.id)")
            assert unnamed == []

    asyncio.run(walk())
