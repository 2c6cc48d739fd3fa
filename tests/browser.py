"""A real browser, headless Chromium: it opens a page, whose script leaves what it saw in an element `result`."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="NO BROWSER: no page was opened. Install one: apt-get install chromium"
)
FLAGS = ("--headless=new", "--hide-scrollbars", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000")


def result_of(address: str, folder: Path) -> dict[str, Any]:
    """The JSON that a page wrote into its element `result`. folder: for the browser's profile."""
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(BROWSER), *FLAGS, "--virtual-time-budget=20000", profile, "--dump-dom", address]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="result">(.*?)</pre>', outcome.stdout, re.DOTALL)
    assert match, f"the browser did not load the page:\n{outcome.stderr[-2000:]}\n{outcome.stdout[-2000:]}"
    result: dict[str, Any] = json.loads(html.unescape(match[1]))
    return result
