"""Which engines end boots: markers before loads, counted at the next start."""

from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from edge_agent import durable
from edge_agent.engines.manifest import Manifest
from edge_agent.scheduling.quarantine import MARKER, QUARANTINE, Quarantine, read_boot_id
from tests.support.toy_engine import manifest


def named(name: str) -> Manifest:
    return msgspec.structs.replace(manifest(), name=name)


ALPHA, BETA = named("alpha"), named("beta")


def boots_that_end_in_a_load(state: Path, count: int, engine: Manifest = ALPHA) -> None:
    for number in range(count):
        Quarantine(state, f"{engine.name} {number}").begin(engine)


def test_two_boots_that_ended_in_its_load_keep_an_engine_out(tmp_path: Path):
    boots_that_end_in_a_load(tmp_path, 2)
    refusal = Quarantine(tmp_path, "now").refusal(ALPHA)
    assert refusal is not None
    assert (refusal.reason, refusal.code) == ("ENGINE_QUARANTINED", "FAILED_PRECONDITION")
    assert refusal.metadata == {"engine": "alpha", "boots": "2"}
    assert "engines release alpha" in refusal.message


def test_a_boot_that_ended_in_a_load_is_in_the_log(tmp_path: Path):
    boots_that_end_in_a_load(tmp_path, 1)
    with capture_logs() as logs:
        Quarantine(tmp_path, "now")
    assert logs == [
        {"event": "boot_ended_in_load", "log_level": "error", "engine": "alpha", "boots": 1}
    ]


def test_one_boot_may_be_chance(tmp_path: Path):
    boots_that_end_in_a_load(tmp_path, 1)
    assert Quarantine(tmp_path, "now").refusal(ALPHA) is None


def test_boots_add_up_over_good_loads_and_restarts_between(tmp_path: Path):
    boots_that_end_in_a_load(tmp_path, 1)
    good = Quarantine(tmp_path, "good")
    good.begin(ALPHA)
    good.end()
    Quarantine(tmp_path, "idle")
    Quarantine(tmp_path, "last").begin(ALPHA)
    assert Quarantine(tmp_path, "now").refusal(ALPHA) is not None


def test_a_daemon_that_crashed_in_a_load_is_no_boot_that_ended(tmp_path: Path):
    for _ in range(5):
        Quarantine(tmp_path, "same").begin(ALPHA)
    assert Quarantine(tmp_path, "same").refusal(ALPHA) is None
    assert not (tmp_path / MARKER).exists()
    assert Quarantine(tmp_path, "other").refusal(ALPHA) is None


def test_boots_in_which_only_the_daemon_crashed_do_not_add_up(tmp_path: Path):
    for boot in ("one", "two", "three"):
        Quarantine(tmp_path, boot).begin(ALPHA)
        Quarantine(tmp_path, boot)  # started again: the machine has lived on
    assert Quarantine(tmp_path, "now").refusal(ALPHA) is None


def test_a_boot_without_an_id_is_never_counted(tmp_path: Path):
    for _ in range(5):
        Quarantine(tmp_path, "").begin(ALPHA)
    assert Quarantine(tmp_path, "").refusal(ALPHA) is None


def test_a_boot_counts_once_however_often_its_marker_is_found(tmp_path: Path):
    Quarantine(tmp_path, "first").begin(ALPHA)
    marker = (tmp_path / MARKER).read_bytes()
    for number in range(3):  # power goes after it was counted and before the marker was removed
        Quarantine(tmp_path, f"later {number}")
        (tmp_path / MARKER).write_bytes(marker)
    assert Quarantine(tmp_path, "now").refusal(ALPHA) is None


def test_the_marker_is_gone_after_the_load(tmp_path: Path):
    quarantine = Quarantine(tmp_path, "one")
    quarantine.begin(ALPHA)
    assert (tmp_path / MARKER).exists()
    quarantine.end()
    quarantine.end()
    assert not (tmp_path / MARKER).exists()
    Quarantine(tmp_path, "two").begin(ALPHA)
    assert Quarantine(tmp_path, "three").refusal(ALPHA) is None


def test_a_released_engine_loads_again_also_after_a_restart(tmp_path: Path):
    boots_that_end_in_a_load(tmp_path, 2)
    quarantine = Quarantine(tmp_path, "now")
    assert quarantine.release(ALPHA)
    assert quarantine.release(ALPHA) is False
    assert quarantine.refusal(ALPHA) is None
    assert Quarantine(tmp_path, "now").refusal(ALPHA) is None


def test_a_release_that_cannot_be_written_is_none(tmp_path: Path, monkeypatch):
    boots_that_end_in_a_load(tmp_path, 2)
    quarantine = Quarantine(tmp_path, "now")

    def full(_path: Path, _content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "replace", full)
    with pytest.raises(OSError, match="space"):
        quarantine.release(ALPHA)
    assert quarantine.refusal(ALPHA) is not None


def test_another_engine_and_another_build_of_it_are_free(tmp_path: Path):
    boots_that_end_in_a_load(tmp_path, 2)
    boots_that_end_in_a_load(tmp_path, 1, BETA)
    quarantine = Quarantine(tmp_path, "now")
    assert quarantine.refusal(BETA) is None
    assert quarantine.refusal(msgspec.structs.replace(ALPHA, description="rebuilt")) is None
    assert quarantine.refusal(ALPHA) is not None


@pytest.mark.parametrize("name", [MARKER, QUARANTINE])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b'{"engine": 1}',
        b'{"engine": "a", "digest": "d", "boot_id": "b", "later": 1}',
        b'{"d": {"engine": "a", "boot_ids": ["b"], "later": 1}}',
        b"\xff\xfe",
    ],
)
def test_a_file_that_cannot_be_read_is_set_aside_and_the_daemon_comes_up(
    tmp_path: Path, name: str, content: bytes
):
    (tmp_path / name).write_bytes(content)
    with capture_logs() as logs:
        quarantine = Quarantine(tmp_path, "now")
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [
        ("quarantine_file_set_aside", "error")
    ]
    assert (tmp_path / f"{name}.unreadable").read_bytes() == content
    quarantine.begin(ALPHA)
    boots_that_end_in_a_load(tmp_path, 1)
    assert Quarantine(tmp_path, "later").refusal(ALPHA) is not None


def test_a_disk_that_takes_nothing_does_not_stop_the_daemon(tmp_path: Path, monkeypatch):
    boots_that_end_in_a_load(tmp_path, 2)

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(durable, "replace", read_only)
    monkeypatch.setattr(durable, "remove", read_only)
    with capture_logs() as logs:
        assert Quarantine(tmp_path, "now").refusal(ALPHA) is not None
    assert [entry["event"] for entry in logs] == ["boot_ended_in_load", "quarantine_not_kept"]


def test_a_file_that_can_neither_be_read_nor_set_aside_does_not_stop_the_daemon(
    tmp_path: Path, monkeypatch
):
    (tmp_path / QUARANTINE).write_bytes(b"{")

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(durable, "set_aside", read_only)
    with capture_logs() as logs:
        assert Quarantine(tmp_path, "now").refusal(ALPHA) is None
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [
        ("quarantine_file_set_aside", "error"),
        ("quarantine_file_not_set_aside", "error"),
    ]


def test_without_a_directory_nothing_is_remembered():
    quarantine = Quarantine(None, "now")
    quarantine.begin(ALPHA)
    quarantine.end()
    assert quarantine.refusal(ALPHA) is None
    assert not quarantine.release(ALPHA)


def test_the_boots_id_is_the_kernels(tmp_path: Path):
    assert read_boot_id(Path("/")) == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert read_boot_id(tmp_path) == ""
