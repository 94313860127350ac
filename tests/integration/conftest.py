"""Fixtures of the integration tests."""

import tempfile
from pathlib import Path

import pytest


@pytest.fixture
def runtime_dir():
    """For sockets: the names below tmp_path grow too long for them."""
    with tempfile.TemporaryDirectory(prefix="ea-") as directory:
        yield Path(directory)
