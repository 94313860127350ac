"""Fixtures of the integration tests."""

import tempfile
from pathlib import Path

import pytest

from tests.support.fake_nvml import library


@pytest.fixture
def runtime_dir():
    """For sockets: the names below tmp_path grow too long for them."""
    with tempfile.TemporaryDirectory(prefix="ea-") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def fake_nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a stand-in for libnvidia-ml.so.1, for LD_LIBRARY_PATH."""
    return library.build(tmp_path_factory.mktemp("nvml"))
