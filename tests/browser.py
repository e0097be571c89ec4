"""Chromium without a window: what a page says once its script ran, and how it looks."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--virtual-time-budget=5000",  # of the page's own clock: enough for what it does after loading
)


def find() -> str | None:
    """The browser's path, or None where none is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def run(*arguments: str, width: int = 1400, height: int = 1000, timeout: float = 120) -> subprocess.CompletedProcess:
    """Runs it once, with a profile of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = (*_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", *arguments)
        return subprocess.run([find() or NAMES[0], *flags], capture_output=True, text=True, timeout=timeout)


def dom(page: Path, view: str = "", **options) -> str:
    """The document's HTML after its script ran. `view`: what follows the address, "#..."."""
    return run("--dump-dom", f"{page.resolve().as_uri()}{view}", **options).stdout


def screenshot(page: Path, picture: Path, view: str = "", **options) -> str | None:
    """Takes a picture; its path, or None where there is no browser."""
    if find() is None:
        return None
    run(f"--screenshot={os.fspath(picture.resolve())}", f"{page.resolve().as_uri()}{view}", **options)
    return os.fspath(picture)
