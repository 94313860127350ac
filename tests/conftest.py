"""What every suite shares: where the engine under test is."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ENGINE = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def engine_store() -> Path:
    """The store that `make engine` fills; the tests only read it."""
    store = Path(os.environ.get("EDGE_AGENT_TEST_STORE", REPOSITORY / "build" / "engines"))
    if not (store / ENGINE / "manifest.json").exists():
        pytest.fail(f"no engine in {store}; run `make engine` first")
    return store
