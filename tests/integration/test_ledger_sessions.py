"""Sessions in the ledger: kept with their history, over releases, retention and broken files."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path

import apsw
import pytest

from edge_agent.core import Message, Overflow, Role, Session, TextPart, ToolCall
from edge_agent.errors import LedgerRowCorrupt
from edge_agent.ledger import schema
from edge_agent.ledger.changes import Existing, NewRun, SessionDeleted, SessionKept
from edge_agent.ledger.ledger import Ledger
from edge_agent.ledger.opening import FILE_NAME
from tests.support.ledger import SETTINGS, changed, new, opened, run, spec, turn

CALL = ToolCall("1/call-1", "move_to", '{"x": 1}')
HISTORY = (
    Message(Role.SYSTEM, (TextPart("You are a robot."),)),
    Message(Role.USER, (TextPart("they spoke of lamps"),), is_summary=True),
    Message(Role.USER, (TextPart("Fahr zurück."),)),
    Message(Role.ASSISTANT, (), (CALL,)),
    Message(Role.TOOL, (TextPart("done"),), (), "1/call-1"),
    turn("I am back."),
)


def session(name: str, client: str = "arm", *, used_at_s: float = 2_000.0) -> Session:
    return Session(name, client, Overflow.SUMMARISE, 1_000.0, used_at_s, 3, HISTORY)


def kept(*names: str) -> tuple[SessionKept, ...]:
    return tuple(SessionKept(session(name)) for name in names)


def play(directory: Path, scenario: Callable[[Ledger], Awaitable[object]]) -> None:
    async def main() -> None:
        async with opened(directory) as ledger:
            await scenario(ledger)

    asyncio.run(main())


def test_a_session_is_there_after_a_restart_with_all_of_its_history(tmp_path: Path):
    async def read(ledger: Ledger) -> None:
        assert await ledger.session("arm", "shift") == (session("shift"), 2)
        assert await ledger.session("leg", "shift") == (None, 2)

    play(tmp_path, lambda ledger: ledger.commit(*kept("shift", "tour")))
    play(tmp_path, read)


def test_what_is_kept_later_takes_its_place_and_no_run_goes_on_in_it(tmp_path: Path):
    async def scenario(ledger: Ledger) -> None:
        later = dataclasses.replace(session("shift"), runs=4, messages=HISTORY[-1:])
        busy = dataclasses.replace(later, run_id="run-1")
        await ledger.commit(*kept("shift"), SessionKept(busy))
        assert await ledger.session("arm", "shift") == (later, 1)

    play(tmp_path, scenario)


def test_sessions_are_listed_without_histories_the_one_used_last_first(tmp_path: Path):
    async def scenario(ledger: Ledger) -> None:
        others = [session("b", "leg", used_at_s=3_000.0), session("c", used_at_s=2_500.0)]
        await ledger.commit(*kept("a"), *map(SessionKept, others))
        assert [each.id for each in await ledger.sessions(None)] == ["b", "c", "a"]
        found = await ledger.sessions("arm")
        assert [(each.id, each.messages) for each in found] == [("c", ()), ("a", ())]

    play(tmp_path, scenario)


def test_a_deleted_session_is_gone_and_the_client_s_others_stay(tmp_path: Path):
    async def scenario(ledger: Ledger) -> None:
        await ledger.commit(*kept("a", "b"), SessionKept(session("a", "leg")))
        await ledger.commit(SessionDeleted("arm", "a"))
        assert [(each.client, each.id) for each in await ledger.sessions(None)] == [
            ("leg", "a"),
            ("arm", "b"),
        ]

    play(tmp_path, scenario)


def test_a_session_that_nobody_uses_goes_after_its_own_retention(tmp_path: Path):
    settings = dataclasses.replace(SETTINGS, retention_s=9e9, session_retention_s=100.0)

    async def main() -> None:
        old = session("old", used_at_s=1_899.0)
        async with opened(tmp_path, settings) as ledger:
            await ledger.commit(SessionKept(old), *kept("new"), new("run-1", at_s=1.0))
        async with opened(tmp_path, settings) as ledger, asyncio.timeout(10):
            while len(found := await ledger.sessions(None)) > 1:
                await ledger.commit(*kept("new"))  # the writer sweeps between its groups
                await asyncio.sleep(0)
            assert [each.id for each in found] == ["new"]
            assert await ledger.find("run-1") is not None

    asyncio.run(main())


def test_a_changed_row_is_an_error_of_its_session_alone(tmp_path: Path):
    async def read(ledger: Ledger) -> None:
        with pytest.raises(LedgerRowCorrupt):
            await ledger.session("arm", "a")
        assert (await ledger.session("arm", "b"))[0] == session("b")
        assert [each.id for each in await ledger.sessions(None)] == ["b"]

    play(tmp_path, lambda ledger: ledger.commit(*kept("a", "b")))
    changed(tmp_path, "UPDATE sessions SET used_at_s = used_at_s + 1 WHERE id = 'a'")
    play(tmp_path, read)


def test_sessions_of_a_broken_file_are_salvaged(tmp_path: Path):
    async def read(ledger: Ledger) -> None:
        assert "is set aside" in ledger.degraded[0]
        assert (await ledger.session("arm", "a"))[0] == session("a")

    play(tmp_path, lambda ledger: ledger.commit(*kept("a"), new("run-1")))
    changed(
        tmp_path, "PRAGMA writable_schema = on", "DELETE FROM sqlite_schema WHERE name = 'meta'"
    )
    play(tmp_path, read)


def of_first_release(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
    monkeypatch.setattr(schema, "VERSION", 1)
    play(directory, lambda ledger: ledger.commit(new("run-1")))


def test_a_ledger_without_sessions_gets_them_and_keeps_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def scenario(ledger: Ledger) -> None:
        assert await ledger.find("run-1") is not None
        await ledger.commit(*kept("a"))
        assert (await ledger.session("arm", "a"))[0] == session("a")

    with monkeypatch.context() as earlier:
        of_first_release(tmp_path, earlier)
    play(tmp_path, scenario)
    assert (tmp_path / f"{FILE_NAME}.before-2").exists()


def test_what_is_broken_of_a_ledger_without_sessions_lacks_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def read(ledger: Ledger) -> None:
        assert "is set aside" in ledger.degraded[0]
        assert "sessions" not in ledger.degraded[0]

    with monkeypatch.context() as earlier:
        of_first_release(tmp_path, earlier)
    changed(
        tmp_path, "PRAGMA writable_schema = on", "DELETE FROM sqlite_schema WHERE name = 'meta'"
    )
    play(tmp_path, read)


def test_the_release_before_sessions_opens_a_ledger_that_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def read(ledger: Ledger) -> None:
        assert ledger.degraded == ()
        assert await ledger.find("run-1") is not None

    play(tmp_path, lambda ledger: ledger.commit(*kept("a")))
    with monkeypatch.context() as earlier:
        of_first_release(tmp_path, earlier)
        play(tmp_path, read)
    play(tmp_path, lambda ledger: ledger.session("arm", "a"))
    connection = apsw.Connection(str(tmp_path / FILE_NAME))
    assert connection.execute("SELECT id FROM sessions").fetchone() == ("a",)
    connection.close()


def test_a_request_is_found_with_whether_it_asked_for_the_same(tmp_path: Path):
    async def scenario(ledger: Ledger) -> None:
        await ledger.commit(NewRun(run("run-1", request_id="once"), spec()))
        assert await ledger.requested("arm", "once", spec()) == Existing("run-1", same_body=True)
        other = spec("something else")
        assert await ledger.requested("arm", "once", other) == Existing("run-1", same_body=False)
        assert await ledger.requested("leg", "once", spec()) is None
        assert await ledger.requested("arm", "", spec()) is None

    play(tmp_path, scenario)
