"""Headless Chromium, where the machine has one: Debian's package `chromium` is enough."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)


def open_page(page: Path, folder: Path, size: tuple[int, int] = (1400, 1000)) -> tuple[list[str], np.ndarray]:
    """What a page says on the console (script and style errors, what its policy blocks), and a screenshot (h, w, 3).

    Skips the test on a machine without Chromium.
    """
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("no Chromium on the PATH; Debian's package `chromium` brings one")
    picture = folder / "screenshot.png"
    places = [f"--user-data-dir={folder / 'profile'}", f"--screenshot={picture}", f"--window-size={size[0]},{size[1]}"]
    ran = subprocess.run([found, *_QUIET, *places, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert picture.exists(), ran.stderr
    lines = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    return lines, np.asarray(Image.open(picture).convert("RGB"))
