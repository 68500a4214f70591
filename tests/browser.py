"""A headless Chromium for tests, driven by its DevTools protocol over two pipes: pages are opened, looked into, and photographed."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

PROGRAMS = ("chromium", "chromium-browser", "chromium-headless-shell", "headless_shell", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
SECONDS = 120  # for an answer, on a machine that is busy with others
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-background-networking", "--remote-debugging-pipe")


def find_browser() -> str | None:
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Browser:
    """Use as a context; `profile` is an empty folder for what the browser keeps."""

    def __init__(self, profile: Path):
        to_browser, self._commands = os.pipe()
        self._answers, from_browser = os.pipe()
        # It reads file descriptor 3 and writes 4.
        line = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        command = ["bash", "-c", line, find_browser(), *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(command, pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        os.set_blocking(self._answers, False)
        self._number, self._rest, self.events = 0, b"", []

    def call(self, method: str, session: str | None = None, **parameters: object) -> dict:
        """Give a command and return its result; what the browser tells meanwhile is added to `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        return self._read_until(lambda told: told.get("id") == self._number)["result"]

    def wait_for(self, event: str) -> None:
        if not any(told["method"] == event for told in self.events):
            self._read_until(lambda told: told.get("method") == event)

    def _read_until(self, is_wanted) -> dict:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            *messages, self._rest = self._rest.split(b"\0")
            for place, message in enumerate(messages):
                told = json.loads(message)
                assert "error" not in told, told
                if "method" in told:
                    self.events.append(told)
                if is_wanted(told):
                    self._rest = b"".join(later + b"\0" for later in messages[place + 1 :]) + self._rest
                    return told
            assert self._process.poll() is None, "the browser has ended"
            try:
                self._rest += os.read(self._answers, 1 << 20)
            except BlockingIOError:
                time.sleep(0.01)
        raise AssertionError("the browser does not answer")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)


class Tab:
    """A page that is open, as wide as a screen, in the light or the dark."""

    def __init__(self, browser: Browser, page: Path, *, width: int, height: int = 900, dark: bool = False):
        self._browser = browser
        browser.events.clear()
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.call("Page.navigate", url=page.resolve().as_uri())
        browser.wait_for("Page.loadEventFired")

    def call(self, method: str, **parameters: object) -> dict:
        return self._browser.call(method, self._session, **parameters)

    def value(self, expression: str) -> object:
        """Return what a JavaScript expression comes to; AssertionError where it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def complaints(self) -> list[dict]:
        """Return errors, warnings and refusals that the browser has told of so far."""
        self.value("0")  # whatever came before it has been told by then
        return [told for told in self._browser.events if told["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")]

    def requests(self) -> list[str]:
        """Return the addresses that the page has asked for; one that is its own content is none."""
        self.value("0")
        asked = [told["params"]["request"]["url"] for told in self._browser.events if told["method"] == "Network.requestWillBeSent"]
        return [address for address in asked if not address.startswith("data:")]

    def photograph(self, out: Path, *, height: int | None = None) -> Path:
        """Write a PNG of the page from its top, `height` pixels of it or all."""
        width, whole = self.value("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": height or whole, "scale": 1}
        out.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]))
        return out
