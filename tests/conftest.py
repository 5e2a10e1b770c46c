"""What tests share as fixtures; plain helpers stand in helpers.py."""

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium; without one the test is skipped, or fails where DSL_REQUIRE_BROWSER=1."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if path:
        return path
    message = "no Chromium here: install one (on Debian: apt-get install chromium) or name it in CHROMIUM"
    if os.environ.get("DSL_REQUIRE_BROWSER") == "1":
        pytest.fail(message)
    pytest.skip(message)
