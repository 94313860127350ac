"""A ledger that is newer, older, broken or cut off opens, and nothing is thrown away."""

import asyncio
import contextlib
import itertools
import random
import shutil
from pathlib import Path
from typing import Any

import apsw
import pytest

from edge_agent.core import RunState
from edge_agent.errors import LedgerFailed, LedgerRowCorrupt
from edge_agent.ledger import opening, salvage, schema
from edge_agent.ledger.changes import CallRecorded, NewRun, ResultsAcked, StepRecorded
from edge_agent.ledger.ledger import Ledger
from edge_agent.ledger.opening import FILE_NAME
from tests.support.ledger import (
    call_record,
    changed,
    ended,
    new,
    opened,
    run,
    spec,
    step_record,
    went_on,
)

RUNS = 60


async def fill(ledger: Ledger, runs: int = RUNS) -> None:
    """So many runs; each second one has ended."""
    for n in range(runs):
        first = new(f"run-{n}", request_id=f"request-{n}")
        step = went_on(first.run, f"text {n} " * 20)
        records = StepRecorded(step_record(first.run.id)), CallRecorded(call_record(first.run.id))
        last = [ended(step.run)] if n % 2 else []
        await ledger.commit(first, step, *records, *last)


def filled(directory: Path, runs: int = RUNS) -> None:
    async def main():
        async with opened(directory) as ledger:
            await fill(ledger, runs)

    asyncio.run(main())


async def readable(ledger: Ledger, runs: int = RUNS) -> list[int]:
    """The runs that are there, whole."""
    found = []
    for n in range(runs):
        try:
            stored = await ledger.find(f"run-{n}")
        except LedgerRowCorrupt:
            continue
        if stored is not None:
            assert stored.spec == spec()
            assert stored.run.state.ended == bool(n % 2)
            assert len(stored.events) == 3 + n % 2
            found.append(n)
    return found


def overwrite(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


# --- other releases ---


NEXT = (
    "CREATE TABLE moods (id INTEGER PRIMARY KEY, name TEXT)",
    "ALTER TABLE heads ADD COLUMN mood TEXT",
    "ALTER TABLE runs ADD COLUMN mood TEXT NOT NULL DEFAULT 'calm'",
    "ALTER TABLE events ADD COLUMN mood TEXT",
    "ALTER TABLE outcomes ADD COLUMN mood TEXT",
    "INSERT INTO moods VALUES (1, 'of the next release')",
    "UPDATE heads SET mood = 'curious'",
    f"PRAGMA user_version = {schema.VERSION + 1}",
)


def test_this_release_works_with_a_ledger_of_the_next_that_only_added(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            assert ledger.degraded == ()
            assert await readable(ledger) == list(range(RUNS))
            step = went_on(went_on(run("run-0")).run)
            await ledger.commit(new("run-new"), step, ended(step.run))
            assert len(await ledger.results("arm", 0, 99)) == RUNS // 2 + 1
            await ledger.commit(ResultsAcked("arm", 99))
        async with opened(tmp_path) as ledger:
            stored = await ledger.find("run-0")
            assert stored is not None
            assert stored.run.state is RunState.SUCCEEDED

    filled(tmp_path)
    changed(tmp_path, *NEXT)
    asyncio.run(main())
    connection = apsw.Connection(str(tmp_path / FILE_NAME))
    assert connection.pragma("user_version") == schema.VERSION + 1
    assert connection.execute("SELECT name FROM moods").fetchone() == ("of the next release",)
    assert connection.execute("SELECT mood FROM heads WHERE run = 1").fetchone() == ("curious",)
    connection.close()


@pytest.mark.parametrize("with_log", [False, True])
def test_a_ledger_that_this_release_cannot_read_is_set_aside_as_it_was(
    tmp_path: Path,
    with_log: bool,  # noqa: FBT001
):
    async def main():
        async with opened(tmp_path) as ledger:
            (problem,) = ledger.problems
            assert problem in ledger.degraded
            assert "newer-7" in problem
            assert await ledger.unfinished() == ()
            first = new("run-new")
            (_, number) = await ledger.commit(first, ended(first.run))
            assert isinstance(number, int)
            assert number > RUNS // 2  # clients have had numbers up to here
        async with opened(tmp_path) as ledger:
            assert ledger.problems == ()
            assert await ledger.find("run-new") is not None

    filled(tmp_path)
    newer = ("UPDATE meta SET value = 7 WHERE key = 'min_reader'", "PRAGMA user_version = 7")
    path = tmp_path / FILE_NAME
    if with_log:
        connection = apsw.Connection(str(path))
        for statement in newer:
            connection.execute(statement)
        before = (path.read_bytes(), path.with_name(f"{path.name}-wal").read_bytes())
        assert before[1]
        for suffix in ("", "-wal"):
            shutil.copy(tmp_path / (FILE_NAME + suffix), tmp_path / ("copy" + suffix))
        connection.close()
        for suffix in ("", "-wal"):
            (tmp_path / ("copy" + suffix)).replace(tmp_path / (FILE_NAME + suffix))
    else:
        changed(tmp_path, *newer)
        before = (path.read_bytes(), b"")
    asyncio.run(main())
    aside = tmp_path / f"{FILE_NAME}.newer-7.1"
    assert aside.read_bytes() == before[0]
    if with_log:
        assert aside.with_name(f"{aside.name}-wal").read_bytes() == before[1]


def test_an_older_ledger_is_backed_up_and_then_migrated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def main():
        async with opened(tmp_path) as ledger:
            assert ledger.degraded == ()
            assert await readable(ledger) == list(range(RUNS))

    filled(tmp_path)
    later = "CREATE TABLE later (id INTEGER PRIMARY KEY); INSERT INTO later VALUES (1)"
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, later))
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    asyncio.run(main())
    asyncio.run(main())
    now = schema.VERSION
    for name, version in ((FILE_NAME, now), (f"{FILE_NAME}.before-{now}", now - 1)):
        connection = apsw.Connection(str(tmp_path / name))
        assert connection.pragma("user_version") == version
        assert connection.pragma("integrity_check") == "ok"
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (RUNS,)
        connection.close()


def test_a_migration_that_fails_leaves_the_old_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def main():
        async with opened(tmp_path) as ledger:
            assert await readable(ledger) == list(range(RUNS))

    filled(tmp_path)
    with monkeypatch.context() as patched:
        broken = "CREATE TABLE later (id INTEGER PRIMARY KEY); INSERT INTO nowhere VALUES (1)"
        patched.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, broken))
        patched.setattr(schema, "VERSION", schema.VERSION + 1)
        with pytest.raises(LedgerFailed):
            asyncio.run(main())
    asyncio.run(main())


# --- broken files ---


def test_a_file_that_is_no_ledger_is_set_aside_and_a_new_one_begun(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            (problem,) = ledger.problems
            assert "nothing of it could be read" in problem
            first = new("run-1")
            (_, number) = await ledger.commit(first, ended(first.run))
            assert isinstance(number, int)
            assert number > 1_000_000  # above any that may have been given

    content = b"not a database, " * 1000
    (tmp_path / FILE_NAME).write_bytes(content)
    asyncio.run(main())
    assert (tmp_path / f"{FILE_NAME}.corrupt.1").read_bytes() == content


def test_a_database_of_something_else_is_set_aside(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            assert len(ledger.problems) == 1
            await ledger.commit(new("run-1"))

    connection = apsw.Connection(str(tmp_path / FILE_NAME))
    connection.execute("CREATE TABLE sheep (name TEXT)")
    connection.close()
    asyncio.run(main())
    assert (tmp_path / f"{FILE_NAME}.corrupt.1").exists()


def test_an_empty_file_is_a_new_ledger(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            assert ledger.problems == ()
            await ledger.commit(new("run-1"))

    (tmp_path / FILE_NAME).touch()
    asyncio.run(main())


@pytest.mark.parametrize("one_by_one", [2000, 1])
@pytest.mark.parametrize("pages", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_of_a_file_with_broken_pages_all_other_runs_are_kept(
    tmp_path: Path, seed: int, pages: int, one_by_one: int, monkeypatch: pytest.MonkeyPatch
):
    """A page holds the rows of a few runs. Where keys are tried is another matter."""

    async def main():
        async with opened(tmp_path) as ledger:
            (problem,) = ledger.problems
            found = await readable(ledger)
            assert len(found) >= (RUNS * 2 // 3 if pages < 4 else RUNS // 2), problem
            assert len(found) == RUNS or "corrupt" in problem
            everything: frozenset[RunState] = frozenset()
            assert len(await ledger.page(everything, None, 99)) >= len(found)
            first = new("run-new")
            (_, number) = await ledger.commit(first, ended(first.run))
            assert isinstance(number, int)
            assert number > RUNS // 2

    monkeypatch.setattr(salvage, "_ONE_BY_ONE", one_by_one)
    filled(tmp_path)
    path = tmp_path / FILE_NAME
    chance = random.Random(seed)  # noqa: S311
    table = apsw.Connection(str(path))
    roots = table.execute("SELECT rootpage FROM sqlite_schema WHERE rootpage > 0").fetchall()
    count = table.pragma("page_count")
    table.close()
    leaves = sorted(set(range(3, count + 1)) - {root for (root,) in roots})
    for page in chance.sample(leaves, pages):
        overwrite(path, (page - 1) * 4096, chance.randbytes(4096))
    broken = path.read_bytes()
    asyncio.run(main())
    assert (tmp_path / f"{FILE_NAME}.corrupt.1").read_bytes() == broken


def test_a_broken_index_costs_nothing(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            assert len(ledger.problems) == 1
            assert await readable(ledger) == list(range(RUNS))

    filled(tmp_path)
    connection = apsw.Connection(str(tmp_path / FILE_NAME))
    root = connection.execute(
        "SELECT rootpage FROM sqlite_schema WHERE name = 'runs_by_id'"
    ).fetchall()[0][0]
    assert isinstance(root, int)
    connection.close()
    content = (tmp_path / FILE_NAME).read_bytes()
    at = content.index(b"run-17", (root - 1) * 4096)
    overwrite(tmp_path / FILE_NAME, at, b"run-71")
    asyncio.run(main())


def test_a_wrong_checksum_in_a_broken_file_is_counted(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            (problem,) = ledger.problems
            assert "rows with a wrong checksum: 1 of heads, 2 of events" in problem
            assert "runs that are not whole: 3" in problem
            assert len(await readable(ledger)) == RUNS - 3

    filled(tmp_path)
    changed(
        tmp_path,
        "UPDATE heads SET deaths = 9 WHERE run = 4",
        "UPDATE events SET kind = 'x' WHERE run IN (5, 6) AND sequence = 1",
        "PRAGMA writable_schema = on",
        "UPDATE sqlite_schema SET sql = replace(sql, 'request_id !=', 'client !=')"
        " WHERE name = 'runs_by_request'",
        "DELETE FROM sqlite_schema WHERE name = 'steps_by_run'",
    )
    asyncio.run(main())


@pytest.mark.parametrize("moved", ["nothing", "log", "file"])
def test_a_salvage_that_was_cut_off_is_finished_by_the_next_start(
    tmp_path: Path, moved: str, monkeypatch: pytest.MonkeyPatch
):
    class Cut(Exception):
        pass

    def cut(_path: Path, _problem: str) -> str:
        raise Cut

    async def main():
        async with opened(tmp_path) as ledger:
            assert len(ledger.problems) == 1
            assert "corrupt.1" in ledger.problems[0]
            assert await readable(ledger) == list(range(RUNS))

    filled(tmp_path)
    path, aside = tmp_path / FILE_NAME, tmp_path / f"{FILE_NAME}.corrupt.1"
    changed(
        tmp_path,
        "PRAGMA writable_schema = on",
        "DELETE FROM sqlite_schema WHERE name = 'steps_by_run'",
    )
    broken = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(opening, "_swap", cut)
        with pytest.raises(Cut):
            asyncio.run(main())
    log, aside_log = path.with_name(f"{path.name}-wal"), aside.with_name(f"{aside.name}-wal")
    log.write_bytes(b"the log of the broken file")
    if moved != "nothing":
        log.replace(aside_log)
    if moved == "file":
        path.replace(aside)
    asyncio.run(main())
    assert aside.exists() or moved == "file"
    assert broken in [each.read_bytes() for each in tmp_path.glob(f"{FILE_NAME}.corrupt.?")]


@pytest.mark.parametrize("found_by", ["writing", "reading"])
def test_a_file_that_breaks_while_it_is_open_is_salvaged_and_work_goes_on(
    tmp_path: Path, found_by: str, monkeypatch: pytest.MonkeyPatch
):
    def with_a_small_cache(*args: Any, **kwargs: Any) -> opening.Opened:
        """Else what is broken on the disk is not looked at."""
        result = whole(*args, **kwargs)
        result.connection.pragma("cache_size", 1)
        result.connection.pragma("shrink_memory")
        return result

    async def main():
        async with opened(tmp_path) as ledger:
            await fill(ledger)
        async with opened(tmp_path) as ledger:
            for page in range(2, (tmp_path / FILE_NAME).stat().st_size // 4096):
                overwrite(tmp_path / FILE_NAME, page * 4096, b"\x07" * 64)
            async with asyncio.timeout(30):
                for n in itertools.count():
                    if ledger.problems:
                        break
                    with contextlib.suppress(LedgerFailed, LedgerRowCorrupt):
                        if found_by == "writing":
                            await ledger.commit(new(f"run-after-{n}", request_id=f"after-{n}"))
                        else:
                            await ledger.find("run-1")
            await ledger.commit(NewRun(run("run-later"), spec()))
            assert await ledger.find("run-later") is not None
            assert any("broken" in each for each in ledger.degraded)

    whole = opening.open_file
    monkeypatch.setattr(opening, "open_file", with_a_small_cache)
    asyncio.run(main())
