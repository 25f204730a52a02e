"""A headless Chromium, and a gallery that it looks at."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from selenium import webdriver
from selenium.webdriver.remote.webelement import WebElement

from tests.gallery.conftest import application

__all__ = ["INSTALLING", "Page", "Programs", "browser", "eventually", "page", "programs", "served"]

INSTALLING = 900
"""How long installing a browser may take, in seconds."""

_PATIENCE = INSTALLING / 3

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PACKAGES = ("chromium", "chromium-driver")
SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--mute-audio",
)

Found = TypeVar("Found")


@dataclass(frozen=True)
class Programs:
    """Where the browser and its driver are."""

    browser: str
    driver: str


@contextlib.contextmanager
def programs() -> Iterator[Programs]:
    """Find a browser and its driver; in CI, or where INSTALL_CHROMIUM is set, install Debian's where there is none.

    Raises:
        LookupError: There is none.
        RuntimeError: It could not be installed.
    """
    found = _installed()
    wanted = os.environ.get("CI") or os.environ.get("INSTALL_CHROMIUM")
    if found is None and wanted and os.geteuid() == 0 and shutil.which("apt-get"):
        with _alone():  # another process of the tests may be at it
            found = _installed()
            if found is None:
                _install()
                found = _installed()
    if found is None:
        raise LookupError(
            "no Chromium or Chrome with its chromedriver is on the path (on Debian, INSTALL_CHROMIUM=1 lets root install them)"
        )
    yield found


def _installed() -> Programs | None:
    browser = next((path for path in map(shutil.which, BROWSERS) if path), None)
    driver = shutil.which("chromedriver")
    return Programs(browser, driver) if browser and driver else None


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Wait until no other process installs."""
    with Path(__file__).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _install() -> None:
    install = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
    try:
        _run(install)
    except RuntimeError:  # the lists of packages may be missing or old
        _run(["apt-get", "update"])
        _run(install)


def _run(command: Sequence[str]) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=INSTALLING / 3,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{' '.join(command)}: {error}") from error
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}: {(done.stderr or done.stdout)[-1000:]}")


@contextlib.contextmanager
def served(folder: Path, **environment: str) -> Iterator[str]:
    """Serve the gallery from a thread of this process, and give its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with application(folder, GALLERY_URL=address, **environment) as module:
            server = uvicorn.Server(uvicorn.Config(module.app, log_config=None, log_level="warning"))
            thread = threading.Thread(target=server.run, args=([listening],), name="gallery")
            thread.start()
            try:
                eventually(lambda: server.started or not thread.is_alive())
                assert server.started
                yield address
            finally:
                server.should_exit = True
                thread.join()


class Page:
    """A window of the browser, and what the tests ask of it."""

    def __init__(self, driver: webdriver.Chrome, address: str, shots: Path) -> None:
        self.driver = driver
        self.address = address
        self.shots = shots
        self.complaints_expected: list[str] = []

    def open(self, path: str = "/") -> None:
        self.driver.get(self.address + path)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def waits_for(self, script: str, *arguments: Any) -> Any:
        """Run a script that calls its last argument when it is done."""
        return self.driver.execute_async_script(script, *arguments)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> WebElement:
        return eventually(lambda: self.all(selector), f"there is no {selector}")[0]

    def texts(self, selector: str) -> list[str]:
        """The texts of elements, also of those that are out of sight."""
        found: list[str] = self.run("return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)", selector)
        return found

    def look(self, width: int, height: int = 900, *, dark: bool = False, still: bool = False) -> None:
        """Set the size of the window, and the preferences of its user."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def slow_down(self, upload: int) -> None:
        """Let it send so many bytes a second at most, or as many as it can with -1."""
        self.driver.execute_cdp_cmd("Network.enable", {})
        conditions = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": upload}
        self.driver.execute_cdp_cmd("Network.emulateNetworkConditions", conditions)

    def shoot(self, name: str) -> Path:
        """Take a picture of the whole page."""
        taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
        self.shots.mkdir(parents=True, exist_ok=True)
        path = self.shots / f"{name}.png"
        path.write_bytes(base64.b64decode(taken["data"]))
        return path

    def answers(self) -> list[tuple[int, str]]:
        """The status and the path of each answer since this was last asked."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        responses = [event["params"]["response"] for event in events if event["method"] == "Network.responseReceived"]
        return [
            (response["status"], response["url"].removeprefix(self.address))
            for response in responses
            if response["url"].startswith(self.address)
        ]

    def complaints(self) -> list[str]:
        """What stands in the console and was not expected: errors, and what the Content-Security-Policy has refused."""
        told = [entry["message"] for entry in self.driver.get_log("browser")]
        return [one for one in told if not any(expected in one for expected in self.complaints_expected)]


@contextlib.contextmanager
def browser(found: Programs) -> Iterator[webdriver.Chrome]:
    """Start a browser that has never been used before."""
    options = webdriver.ChromeOptions()
    options.binary_location = found.browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory() as own:  # its path is short, as that of a socket has to be
        for switch in (*SWITCHES, f"--user-data-dir={own}/profile"):
            options.add_argument(switch)
        places = {"TMPDIR": own, "XDG_RUNTIME_DIR": own}
        driver = webdriver.Chrome(options, webdriver.ChromeService(found.driver, env={**os.environ, **places}))
        try:
            driver.set_script_timeout(60)
            yield driver
        finally:
            driver.quit()


@contextlib.contextmanager
def page(driver: webdriver.Chrome, address: str, folder: Path) -> Iterator[Page]:
    """Open a window, in which nothing is known of other tests: each has a port of its own, and so an origin."""
    first = driver.current_window_handle
    driver.switch_to.new_window("window")
    for kind in ("browser", "performance"):
        driver.get_log(kind)
    try:
        yield Page(driver, address, Path(os.environ.get("GALLERY_SCREENSHOTS", folder / "screenshots")))
    finally:
        driver.close()
        driver.switch_to.window(first)


def eventually(look: Callable[[], Found], why: str = "it has not come to pass", seconds: float = 60) -> Found:
    """Look again until there is something to be seen."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, why
        time.sleep(0.05)
    return found
