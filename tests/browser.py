"""A headless Chromium for the page tests: `from browser import open_browser`, or the `browser` fixture."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip


@contextmanager
def open_browser(width: int = 1280, height: int = 900, *, dark: bool = False) -> Iterator[Any]:
    """A selenium driver on a fresh profile; skips the test, with the reason, where there is no Chromium.

    `dark` makes pages see `prefers-color-scheme: dark`. Browser console messages: `driver.get_log("browser")`.
    """
    if not CHROMIUM or not DRIVER:
        pytest.skip(f"page test needs Chromium and its driver (chromium: {CHROMIUM}, chromedriver: {DRIVER})")
    from selenium import webdriver

    # A driver on the loopback is reached directly, whatever proxy the environment names.
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1,localhost"]))
    with tempfile.TemporaryDirectory(prefix="soma-browser-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        try:
            # The window cannot be narrower than 500 pixels, what the page sees can.
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
            yield driver
        finally:
            driver.quit()


@pytest.fixture
def browser() -> Iterator[Any]:
    """A wide, light browser window."""
    with open_browser() as driver:
        yield driver
