"""The Halt latch: what each scope covers, and a record that fails towards being halted."""

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core import Halt, HaltScope
from edge_agent.errors import NotFound
from edge_agent.runs.halts import MAX_HALTS, UNREADABLE_ID, HaltLatch, covers_run, covers_tool


def halt(scope: HaltScope, target: str = "", halt_id: str = "h1") -> Halt:
    return Halt(halt_id, scope, target, "a person stood there", "operator", 1_700_000_000.5)


TEXT = st.text(max_size=8)
HALTS = st.lists(
    st.builds(Halt, TEXT, st.sampled_from(HaltScope), TEXT, TEXT, TEXT, st.floats(0, 2e9)),
    unique_by=lambda each: each.id,
    max_size=5,
).map(tuple)


@pytest.mark.parametrize(
    ("scope", "target", "covers"),
    [
        (HaltScope.ALL, "", True),
        (HaltScope.CLIENT, "arm", True),
        (HaltScope.CLIENT, "base", False),
        (HaltScope.CLIENT, "picker", False),  # an agent's name
        (HaltScope.AGENT, "picker", True),
        (HaltScope.AGENT, "packer", False),
        (HaltScope.AGENT, "arm", False),  # a client's name
        (HaltScope.TOOL, "arm", False),
        (HaltScope.TOOL, "picker", False),
    ],
)
def test_which_runs_a_halt_stops(scope: HaltScope, target: str, covers: bool):  # noqa: FBT001
    assert covers_run(halt(scope, target), client="arm", agent="picker") is covers


@pytest.mark.parametrize(
    ("scope", "target", "covers"),
    [
        (HaltScope.ALL, "", True),
        (HaltScope.TOOL, "move", True),
        (HaltScope.TOOL, "speak", False),
        (HaltScope.CLIENT, "move", False),
        (HaltScope.AGENT, "move", False),
    ],
)
def test_which_tools_a_halt_stops(scope: HaltScope, target: str, covers: bool):  # noqa: FBT001
    assert covers_tool(halt(scope, target), "move") is covers


class TestRecord:
    @given(halts=HALTS)
    def test_what_was_recorded_is_latched_after_a_restart(self, tmp_path_factory, halts):
        path = tmp_path_factory.mktemp("state") / "halts.json"
        HaltLatch(path).record(halts)
        assert HaltLatch(path).halts() == halts

    def test_nothing_is_halted_where_there_is_no_record(self, tmp_path: Path):
        assert HaltLatch(tmp_path / "halts.json").halts() == ()

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"null",
            b"{}",
            b'[{"id": "h1"}]',
            b'[{"id":"h1","scope":"GALAXY","target":"","reason":"","client":"","created_at_s":1}]',
            b"\xff\xfe",
        ],
        ids=["empty", "cut", "null", "an object", "fields missing", "a later scope", "no text"],
    )
    def test_a_record_that_cannot_be_read_halts_everything(self, tmp_path: Path, content: bytes):
        path = tmp_path / "halts.json"
        path.write_bytes(content)
        (found,) = HaltLatch(path).halts()
        assert (found.id, found.scope) == (UNREADABLE_ID, HaltScope.ALL)
        assert "halts.json" in found.reason
        assert found.created_at_s == path.stat().st_mtime
        assert HaltLatch(path).covering_run("anybody", "") == found
        assert HaltLatch(path).covering_tool("anything") == found

    def test_a_record_that_is_a_directory_halts_everything(self, tmp_path: Path):
        (tmp_path / "halts.json").mkdir()
        assert HaltLatch(tmp_path / "halts.json").halts()[0].scope is HaltScope.ALL

    def test_an_unreadable_record_is_overwritten_by_clearing_it(self, tmp_path: Path):
        path = tmp_path / "halts.json"
        path.write_bytes(b"{")
        latch = HaltLatch(path)
        latch.record(())
        latch.lift(latch.get(UNREADABLE_ID))
        assert latch.halts() == HaltLatch(path).halts() == ()

    def test_one_that_cannot_be_written_leaves_the_old_one(self, tmp_path: Path):
        path = tmp_path / "halts.json"
        latch = HaltLatch(path)
        latch.record((halt(HaltScope.ALL),))
        (tmp_path / "halts.json.partial").mkdir()  # in the way of the new one
        with pytest.raises(OSError, match="partial"):
            latch.record(())
        assert HaltLatch(path).halts() == (halt(HaltScope.ALL),)

    def test_a_write_that_fails_half_way_leaves_the_old_one(self, tmp_path: Path, monkeypatch):
        path = tmp_path / "halts.json"
        latch = HaltLatch(path)
        latch.record((halt(HaltScope.ALL),))

        def full(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            latch.record(())
        monkeypatch.undo()
        assert HaltLatch(path).halts() == (halt(HaltScope.ALL),)

    def test_the_bytes_are_on_disk_before_the_name_is(self, tmp_path: Path, monkeypatch):
        path = tmp_path / "halts.json"
        synced: list[tuple[str, bool]] = []
        fsync = os.fsync

        def watching(descriptor: int) -> None:
            fsync(descriptor)
            name = Path(f"/proc/self/fd/{descriptor}").readlink().name
            synced.append((name, path.exists()))

        monkeypatch.setattr(os, "fsync", watching)
        HaltLatch(path).record(())
        assert synced == [("halts.json.partial", False), (tmp_path.name, True)]

    def test_people_can_read_it(self, tmp_path: Path):
        HaltLatch(tmp_path / "halts.json").record((halt(HaltScope.TOOL, "move"),))
        (entry,) = msgspec.json.decode((tmp_path / "halts.json").read_bytes())
        assert (entry["scope"], entry["target"]) == ("TOOL", "move")


class TestLatch:
    def test_acts_before_it_is_recorded(self, tmp_path: Path):
        latch = HaltLatch(tmp_path / "halts.json")
        latch.latch(halt(HaltScope.AGENT, "picker"))
        assert latch.covering_run("arm", "picker") == halt(HaltScope.AGENT, "picker")
        assert latch.covering_run("arm", "packer") is None
        assert not (tmp_path / "halts.json").exists()

    def test_one_of_two_that_cover_the_same_is_enough(self, tmp_path: Path):
        latch = HaltLatch(tmp_path / "halts.json")
        latch.latch(halt(HaltScope.ALL, halt_id="h1"))
        latch.latch(halt(HaltScope.TOOL, "move", halt_id="h2"))
        latch.lift(latch.get("h1"))
        assert latch.covering_tool("move") == halt(HaltScope.TOOL, "move", halt_id="h2")
        assert latch.covering_tool("speak") is None

    def test_each_is_latched_by_itself_below_the_limit(self, tmp_path: Path):
        latch = HaltLatch(tmp_path / "halts.json")
        for number in range(MAX_HALTS):
            mine = halt(HaltScope.TOOL, "move", halt_id=f"h{number}")
            assert latch.latch(mine) == mine
        assert len(latch.halts()) == MAX_HALTS


class TestTheLimit:
    @pytest.fixture
    def full(self, tmp_path: Path) -> HaltLatch:
        latch = HaltLatch(tmp_path / "halts.json")
        for number in range(MAX_HALTS):
            latch.latch(halt(HaltScope.TOOL, f"tool-{number}", halt_id=f"h{number}"))
        return latch

    @pytest.mark.parametrize("scope", [HaltScope.CLIENT, HaltScope.AGENT, HaltScope.TOOL])
    def test_one_more_is_latched_as_one_of_everything_that_says_why(
        self, full: HaltLatch, scope: HaltScope
    ):
        latched = full.latch(halt(scope, "gripper", halt_id="more"))
        assert (latched.id, latched.scope, latched.target) == ("more", HaltScope.ALL, "")
        assert full.get("more") == latched
        assert str(MAX_HALTS) in latched.reason
        assert f"{scope} 'gripper'" in latched.reason
        assert "a person stood there" in latched.reason
        assert full.covering_run("anybody", "") == latched

    def test_one_of_everything_stays_what_it_is(self, full: HaltLatch):
        mine = halt(HaltScope.ALL, halt_id="more")
        assert full.latch(mine) == mine

    def test_what_is_latched_already_is_returned_as_it_is(self, full: HaltLatch):
        again = full.latch(halt(HaltScope.TOOL, "tool-7", halt_id="more"))
        assert again.id == "h7"
        assert len(full.halts()) == MAX_HALTS

    @pytest.mark.parametrize("scope", list(HaltScope))
    def test_one_of_everything_is_enough_for_all_that_come_after(
        self, full: HaltLatch, scope: HaltScope
    ):
        everything = full.latch(halt(HaltScope.ALL, halt_id="all"))
        target = "" if scope is HaltScope.ALL else "gripper"
        assert full.latch(halt(scope, target, halt_id="more")) == everything
        assert len(full.halts()) == MAX_HALTS + 1

    def test_a_lift_that_is_on_its_way_does_not_take_what_is_latched_again(self, full: HaltLatch):
        before = full.get("h7")
        again = full.latch(halt(HaltScope.TOOL, "tool-7", halt_id="more"))
        full.lift(before)
        assert full.get("h7") == again
        full.lift(again)
        with pytest.raises(NotFound):
            full.get("h7")

    def test_there_is_room_again_when_one_is_lifted(self, full: HaltLatch):
        full.lift(full.get("h0"))
        mine = halt(HaltScope.AGENT, "picker", halt_id="more")
        assert full.latch(mine) == mine


class TestFinding:
    def test_names_an_id_that_is_not_latched(self, tmp_path: Path):
        with pytest.raises(NotFound, match="'h9' is not latched"):
            HaltLatch(tmp_path / "halts.json").get("h9")
