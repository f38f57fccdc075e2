"""A headless Chromium, if the machine has one: it opens a page, clicks, reads, and takes screenshots.

It is spoken to in the DevTools protocol over a pipe, so that no package and no port is needed. Debian has it as
`apt-get install chromium-headless-shell`.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome-headless-shell", "chrome")
PATH = next((path for name in NAMES if (path := shutil.which(name))), None)
WHY_NOT = f"no browser here: one of {', '.join(NAMES)} has to be installed"
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")


class Browser:
    """One tab of a headless browser, in a `with` statement. `errors` holds what its console says is wrong."""

    def __init__(self, folder: Path, width: int = 1280, height: int = 900, dark: bool = False):
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        os.set_inheritable(to_browser, True)
        os.set_inheritable(from_browser, True)

        def connect():  # the browser reads from descriptor 3 and writes to 4
            os.dup2(to_browser, 3)
            os.dup2(from_browser, 4)

        self._process = subprocess.Popen(
            [str(PATH), *OPTIONS, f"--user-data-dir={folder}"],
            pass_fds=(3, 4, to_browser, from_browser),
            preexec_fn=connect,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._received, self._number, self._session = b"", 0, None
        self.errors: list[str] = []
        self.loaded = 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def resize(self, width: int, height: int) -> None:
        is_phone = width < 600
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)

    def open(self, path: Path, fragment: str = "") -> float:
        """Open a page; return the seconds until it is drawn."""
        self._navigate("about:blank")  # else another place in the same page would load nothing
        started = time.perf_counter()
        self._navigate(f"{path.resolve().as_uri()}{fragment}")
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return time.perf_counter() - started

    def _navigate(self, address: str) -> None:
        before = self.loaded
        self.call("Page.navigate", url=address)
        while self.loaded == before:
            self._receive()

    def evaluate(self, code: str):
        """Return the value of JavaScript in the page."""
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        """Return the texts of the elements that a CSS selector finds."""
        return self.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")

    def click(self, selector: str) -> None:
        """Click on the middle of an element, as a mouse does."""
        place = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            at = {"x": place[0], "y": place[1]}
            self.call("Input.dispatchMouseEvent", type=kind, **at, button="left", clickCount=1)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Write a picture of the window, or of the whole page."""
        options = {"format": "png", "captureBeyondViewport": whole}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            options["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **options)["data"]))

    def call(self, method: str, **parameters):
        """Call a method of the DevTools protocol; return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self):
        while b"\0" not in self._received:
            assert select.select([self._from], [], [], 300)[0], "the browser does not answer"
            self._received += os.read(self._from, 1 << 20)
        text, _, self._received = self._received.partition(b"\0")
        message = json.loads(text)
        self._note(message.get("method"), message.get("params"))
        return message

    def _note(self, method, event) -> None:
        if method == "Page.loadEventFired":
            self.loaded += 1
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(event["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
            self.errors.append(str(event["args"]))
        elif method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            self.errors.append(str(event["entry"]))
        elif method == "Network.requestWillBeSent" and not event["request"]["url"].startswith(("file:", "about:")):
            self.errors.append(f"asked for {event['request']['url']}")
