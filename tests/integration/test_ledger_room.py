"""Room runs out, in the file or on the disk: who is refused, what goes, and what never does."""

import asyncio
import contextlib
import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.core import Run
from edge_agent.errors import LedgerFull
from edge_agent.ledger import ballast, upkeep
from edge_agent.ledger.changes import CallRecorded, ResultsAcked, StepRecorded
from edge_agent.ledger.ledger import Ledger
from edge_agent.ledger.opening import FILE_NAME
from edge_agent.ledger.settings import LedgerSettings
from tests.support.ledger import SETTINGS, call_record, ended, new, opened, step_record, went_on

SMALL = LedgerSettings(max_bytes=1 << 20, retention_s=3600.0, ballast_bytes=0)
LONG = "a long story " * 300


async def whole_run(
    ledger: Ledger, name: str, *, client: str = "arm", at_s: float = 2_000.0
) -> int:
    """A run with a few kilobytes; its result number."""
    first = new(name, client=client, at_s=at_s - 1)
    step = went_on(first.run, LONG)
    values = await ledger.commit(first, step, ended(step.run, at_s=at_s))
    number = values[2]
    assert isinstance(number, int)
    return number


async def begun(ledger: Ledger, name: str) -> Run:
    """A run that has not ended."""
    first = new(name)
    step = went_on(first.run, LONG)
    await ledger.commit(first, step)
    return step.run


async def begin_until_refused(ledger: Ledger, prefix: str, *, asks: bool) -> LedgerFull:
    """Runs, until one is refused: by who asks first, or by the ledger itself."""
    for n in range(5_000):
        try:
            if asks:
                ledger.accepts_new_runs()
            await begun(ledger, f"{prefix}-{n}")
        except LedgerFull as error:
            return error
    raise AssertionError("nothing was refused")


async def idle_until(ledger: Ledger, run_id: str) -> None:
    """Wait for retention to remove a run."""
    async with asyncio.timeout(20):
        while await ledger.find(run_id) is not None:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.01)


# --- retention ---


def test_ended_runs_go_after_their_retention_and_unfinished_ones_never(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            await whole_run(ledger, "run-old", at_s=2_000.0)
            await whole_run(ledger, "run-young", at_s=5_000.0)
            await begun(ledger, "run-unfinished")
            for run_id in ("run-old", "run-unfinished", "not-durable-old"):
                ledger.note(StepRecorded(step_record(run_id, at_s=1_500.0)))
                ledger.note(CallRecorded(call_record(run_id, at_s=1_500.0)))
            ledger.note(StepRecorded(step_record("not-durable-young", at_s=5_000.0)))
            await ledger.commit()
        async with opened(tmp_path, clock=lambda: 2_000.0 + SETTINGS.retention_s + 1) as ledger:
            await idle_until(ledger, "run-old")
            assert await ledger.find("run-young") is not None
            assert await ledger.find("run-unfinished") is not None
            assert [each.id for each in await ledger.results("arm", 0, 9)] == ["run-young"]
            assert await ledger.trace("run-old") == ((), ())
            assert await ledger.trace("not-durable-old") == ((), ())
            assert len((await ledger.trace("run-unfinished"))[0]) == 1
            assert len((await ledger.trace("not-durable-young"))[0]) == 1

    asyncio.run(main())


def test_a_result_number_does_not_come_back_after_retention(tmp_path: Path):
    async def main():
        async with opened(tmp_path) as ledger:
            last = await whole_run(ledger, "run-old")
        async with opened(tmp_path, clock=lambda: 1e9) as ledger:
            await idle_until(ledger, "run-old")
            assert await whole_run(ledger, "run-new", at_s=1e9) > last

    asyncio.run(main())


def test_pages_that_are_free_are_given_back_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def main():
        async with opened(tmp_path) as ledger:
            for n in range(60):
                await whole_run(ledger, f"run-{n}")
        before = (tmp_path / FILE_NAME).stat().st_size
        async with opened(tmp_path, clock=lambda: 1e9) as ledger:
            await idle_until(ledger, "run-59")
            async with asyncio.timeout(20):
                while (tmp_path / FILE_NAME).stat().st_size > before / 2:
                    await asyncio.sleep(0.05)
                    await ledger.commit(new(f"run-{os.urandom(4).hex()}"))

    monkeypatch.setattr(upkeep, "_FREE_PAGES", 4)
    monkeypatch.setattr(upkeep, "CHECKPOINT_PAGES", 10)
    monkeypatch.setattr("edge_agent.ledger.writer._FIRST_IDLE_S", 0.02)
    asyncio.run(main())


# --- the file is full ---


def test_acknowledged_results_make_room_and_others_do_not(tmp_path: Path):
    async def main():
        async with opened(tmp_path, SMALL) as ledger:
            unfinished = await begun(ledger, "run-unfinished")
            for n in range(400):  # several times what fits
                ledger.accepts_new_runs()
                client = "base" if n == 3 else "arm"
                number = await whole_run(ledger, f"run-{n}", client=client, at_s=2_000.0 + n)
                if client == "arm":
                    await ledger.commit(ResultsAcked(client, number))
            assert await ledger.find("run-unfinished") is not None
            assert await ledger.find("run-0") is None
            assert [each.id for each in await ledger.results("base", 0, 9)] == ["run-3"]
            assert await ledger.find("run-399") is not None
            assert unfinished.id in [each.run.id for each in await ledger.unfinished()]
            assert (tmp_path / FILE_NAME).stat().st_size <= SMALL.max_bytes

    asyncio.run(main())


def test_records_of_runs_that_are_not_durable_make_room_first(tmp_path: Path):
    async def main():
        async with opened(tmp_path, SMALL) as ledger:
            number = await whole_run(ledger, "run-acked")
            await ledger.commit(ResultsAcked("arm", number))
            for n in range(3000):
                ledger.note(StepRecorded(step_record(f"not-durable-{n}")))
                if n % 100 == 0:
                    await ledger.commit()
            await ledger.commit()
            assert await ledger.find("run-acked") is not None
            assert await ledger.trace("not-durable-0") == ((), ())
            assert len((await ledger.trace("not-durable-2999"))[0]) == 1
            ledger.accepts_new_runs()

    asyncio.run(main())


def test_a_full_file_refuses_new_runs_before_it_refuses_those_that_are_there(tmp_path: Path):
    async def main():
        async with opened(tmp_path, SMALL) as ledger:
            ledger.accepts_new_runs()
            running = await begun(ledger, "run-0")
            refused = await begin_until_refused(ledger, "first", asks=True)
            assert refused.retry_after_s is not None
            for _ in range(5):
                step = went_on(running, LONG)
                await ledger.commit(step)
                running = step.run
            await begin_until_refused(ledger, "second", asks=False)
            assert ledger.degraded != ()
            found = await ledger.find("run-0")
            assert found is not None
            assert found.run == dataclasses.replace(running, transcript=())
        async with opened(tmp_path, dataclasses.replace(SMALL, max_bytes=2 << 20)) as ledger:
            await begun(ledger, "run-new")
            assert ledger.degraded == ()

    asyncio.run(main())


# --- the disk is full ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of eight megabytes."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def fill_up(disk: Path) -> Path:
    """Take all that is free."""
    path = disk / "somebody-else"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return path


BALLAST = LedgerSettings(max_bytes=6 << 20, retention_s=3600.0, ballast_bytes=2 << 20)


def test_on_a_full_disk_the_runs_that_are_there_go_on_with_the_ballast(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
):
    async def main():
        async with opened(small_disk, BALLAST) as ledger:
            assert (small_disk / ballast.FILE_NAME).stat().st_size == BALLAST.ballast_bytes
            running = await begun(ledger, "run-0")
            numbers = [await whole_run(ledger, f"run-{n}") for n in range(1, 20)]
            await ledger.commit(ResultsAcked("arm", numbers[-6]))
            other = fill_up(small_disk)
            for _ in range(20):
                step = went_on(running, LONG)
                await ledger.commit(step)
                running = step.run
            assert not (small_disk / ballast.FILE_NAME).exists()
            with pytest.raises(LedgerFull):
                ledger.accepts_new_runs()
            assert any("disk is full" in each for each in ledger.degraded)
            found = await ledger.find("run-0")
            assert found is not None
            assert found.run.sequence == running.sequence
            assert len(await ledger.results("arm", 0, 99)) == 5
            other.unlink()
            async with asyncio.timeout(20):
                while ledger.degraded:
                    await ledger.commit(new(f"run-{os.urandom(4).hex()}"))
                    await asyncio.sleep(0.01)
            ledger.accepts_new_runs()
            assert (small_disk / ballast.FILE_NAME).exists()

    monkeypatch.setattr(upkeep, "_LOOK_AT_DISK_S", 0.02)
    asyncio.run(main())


def test_a_ledger_opens_on_a_full_disk(small_disk: Path):
    async def main():
        async with opened(small_disk, BALLAST) as ledger:
            await begun(ledger, "run-0")
        fill_up(small_disk)
        async with opened(small_disk, BALLAST) as ledger:
            assert [each.run.id for each in await ledger.unfinished()] == ["run-0"]
            with contextlib.suppress(LedgerFull):
                await ledger.commit(new("run-1"))
            assert await ledger.find("run-0") is not None

    asyncio.run(main())


def test_without_ballast_a_full_disk_refuses_and_loses_nothing(small_disk: Path):
    async def main():
        settings = dataclasses.replace(BALLAST, ballast_bytes=0)
        async with opened(small_disk, settings) as ledger:
            await begun(ledger, "run-0")
            other = fill_up(small_disk)
            await begin_until_refused(ledger, "run-more", asks=False)
            assert await ledger.find("run-0") is not None
            unfinished = await ledger.unfinished()
        other.unlink()
        async with opened(small_disk, settings) as ledger:
            assert await ledger.unfinished() == unfinished
            assert ledger.problems == ()

    asyncio.run(main())
