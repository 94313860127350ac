"""The file that remembers what engines took."""

import asyncio
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from edge_agent import durable
from edge_agent.core import MeasuredLoad
from edge_agent.scheduling import footprints as module
from edge_agent.scheduling.footprints import Footprints
from tests.support.toy_engine import manifest

SHAPE = 2, 2048
GIB = 1 << 30


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "footprints.json"


def load(number: float, steady: int = GIB) -> MeasuredLoad:
    """The load that began at this time."""
    return MeasuredLoad(2 * steady, steady, "process", number)


def record(known: Footprints, *loads: MeasuredLoad, shape: tuple[int, int] = SHAPE) -> None:
    async def all_of_them() -> None:
        for each in loads:
            known.add(manifest(), *shape, each)
            await known.keep()

    asyncio.run(all_of_them())


def test_what_was_measured_is_known_after_a_restart(path: Path):
    record(Footprints(path, "orin"), load(1), load(2))
    again = Footprints(path, "orin")
    assert again.history(manifest(), *SHAPE) == (load(1), load(2))
    assert again.of(manifest(), *SHAPE).load_peak_bytes == 2 * GIB


@pytest.mark.parametrize(
    ("device", "shape"), [("thor", SHAPE), ("orin", (1, 2048)), ("orin", (2, 1024))]
)
def test_another_machine_other_slots_or_another_context_have_their_own(
    path: Path, device: str, shape: tuple[int, int]
):
    record(Footprints(path, "orin"), load(1))
    assert Footprints(path, device).history(manifest(), *shape) == ()


def test_later_figures_of_a_load_take_the_place_of_its_earlier_ones(path: Path):
    known = Footprints(path, "orin")
    record(known, load(1), load(2), load(2, 2 * GIB))
    assert known.history(manifest(), *SHAPE) == (load(1), load(2, 2 * GIB))


def test_only_the_last_loads_and_engines_are_kept(path: Path, monkeypatch):
    monkeypatch.setattr(module, "_KEPT_ENGINES", 3)
    known = Footprints(path, "orin")
    record(known, *(load(number) for number in range(30)))
    history = known.history(manifest(), *SHAPE)
    assert (len(history), history[-1]) == (20, load(29))
    for slots in range(3, 6):
        record(known, load(1), shape=(slots, 2048))
    again = Footprints(path, "orin")
    assert again.history(manifest(), *SHAPE) == ()
    assert again.history(manifest(), 3, 2048) == (load(1),)


def test_forgetting_begins_anew_also_after_a_restart(path: Path):
    known = Footprints(path, "orin")
    record(known, load(1))
    asyncio.run(known.forget(manifest(), *SHAPE))
    assert known.history(manifest(), *SHAPE) == ()
    assert Footprints(path, "orin").history(manifest(), *SHAPE) == ()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": [{"steady_bytes": "x"}]}', b"\xff"])
def test_a_file_that_cannot_be_read_is_set_aside_whole_and_begun_anew(path: Path, content: bytes):
    path.write_bytes(content)
    with capture_logs() as logs:
        known = Footprints(path, "orin")
    assert [entry["event"] for entry in logs] == ["footprints_set_aside"]
    assert path.with_name("footprints.json.unreadable").read_bytes() == content
    record(known, load(1))
    assert Footprints(path, "orin").history(manifest(), *SHAPE) == (load(1),)


def test_a_directory_in_its_place_does_not_stop_the_daemon(path: Path):
    path.mkdir()
    (path / "something").touch()
    assert Footprints(path, "orin").history(manifest(), *SHAPE) == ()


def test_a_full_disk_is_logged_and_what_was_measured_still_counts(path: Path, monkeypatch):
    def full(_path: Path, _content: bytes) -> None:
        raise OSError(28, "No space left on device")

    known = Footprints(path, "orin")
    monkeypatch.setattr(durable, "replace", full)
    with capture_logs() as logs:
        record(known, load(1))
    assert [entry["event"] for entry in logs] == ["footprints_not_kept"]
    assert known.history(manifest(), *SHAPE) == (load(1),)


def test_without_a_path_nothing_is_kept_and_everything_works():
    known = Footprints(None, "")
    record(known, load(1))
    assert known.history(manifest(), *SHAPE) == (load(1),)
