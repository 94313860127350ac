"""The power goes at any write of a daemon's work: what was acknowledged is there, and whole.

The work goes through `Ledger` with several callers, notes, results, acknowledgements and
checkpoints in the middle of it. `make test` cuts at some hundred places; with EDGE_AGENT_CHAOS it
is every place, several times.
"""

import asyncio
import dataclasses
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.core import RunState
from edge_agent.ledger import opening, upkeep
from edge_agent.ledger.changes import CallRecorded, Change, NewRun, ResultsAcked, StepRecorded
from edge_agent.ledger.ledger import Ledger
from edge_agent.records import Effect
from tests.support import powercut
from tests.support.chaos import TIMES
from tests.support.ledger import (
    call_record,
    ended,
    new,
    opened,
    run,
    spec,
    step_record,
    went_on,
)
from tests.support.powercut import Acked, Disk, Fate

ROUNDS = 6
CALLERS = 4
CUTS = 300 if TIMES == 1 else None  # None: all
FATES = (Fate.LOST, Fate.ANY) if TIMES == 1 else (Fate.LOST, Fate.WRITTEN, *[Fate.ANY] * 4)


@dataclasses.dataclass(frozen=True)
class Head:
    """Somebody was told that the run is at least here."""

    run_id: str
    sequence: int
    state: RunState


@dataclasses.dataclass(frozen=True)
class Intended:
    """A call with this id has begun."""

    run_id: str
    call_id: str


@dataclasses.dataclass(frozen=True)
class Delivered:
    """The client has said that it has these."""

    client: str
    up_to_number: int


async def work(ledger: Ledger, disk: Disk, rounds: int = ROUNDS) -> None:
    async def caller(number: int) -> None:
        chance = random.Random(number)  # noqa: S311
        for turn in range(rounds):
            name = f"run-{number}-{turn}"
            created = new(name, request_id=name, client=f"client-{number}")
            await told(created, Head(name, 0, RunState.QUEUED))
            standing = created.run
            for step in range(chance.randrange(1, 4)):
                record = call_record(name, f"call-{step}", Effect.INTENDED)
                await told(CallRecorded(record), Intended(name, record.call_id))
                went = went_on(standing, "a word " * chance.randrange(1, 200))
                ledger.note(StepRecorded(step_record(name, step + 1)))
                await told(went, Head(name, went.run.sequence, RunState.RUNNING))
                standing = went.run
            last = ended(standing)
            (result,) = await told(last, Head(name, last.run.sequence, RunState.SUCCEEDED))
            assert isinstance(result, int)
            if turn % 2:
                await told(
                    ResultsAcked(created.run.client, result),
                    Delivered(created.run.client, result),
                )

    async def told(change: Change, what: object) -> tuple[object, ...]:
        values = await ledger.commit(change)
        disk.log.append(Acked(what))
        return values

    await asyncio.gather(*(caller(number) for number in range(CALLERS)))


def record(directory: Path, rounds: int = ROUNDS) -> Disk:
    """The work of a daemon, from an empty directory to its end."""

    async def main(disk: Disk) -> None:
        async with opened(directory, vfs=powercut.NAME) as ledger:
            await work(ledger, disk, rounds)

    with powercut.recorded() as disk:
        asyncio.run(main(disk))
    return disk


def cuts(disk: Disk, count: int | None) -> Iterator[int]:
    """Places before an entry of the disk's log, rising, evenly spread."""
    places = range(1, len(disk.log) + 1)
    step = 1 if count is None else max(1, len(places) // count)
    yield from places[::step]


def found_wrong(files: dict[str, bytes], acked: list[object]) -> list[str]:
    """What is missing of what somebody relies on, and what is broken."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        directory = Path(name)
        for file, content in files.items():
            (directory / file).write_bytes(content)
        return asyncio.run(_wrong_in(directory, acked))


async def _wrong_in(directory: Path, acked: list[object]) -> list[str]:
    heads = {what.run_id: what for what in acked if isinstance(what, Head)}
    async with opened(directory) as ledger:
        wrong = list(ledger.degraded)
        for head in heads.values():
            stored = await ledger.find(head.run_id)
            if stored is None:
                wrong.append(f"lost {head}")
            elif stored.run.sequence < head.sequence:
                wrong.append(f"forgot events of {head}")
        await ledger.unfinished()
        wrong += ledger.degraded
        for what in acked:
            match what:
                case Intended(run_id, call_id):
                    _, calls = await ledger.trace(run_id)
                    if call_id not in [call.call_id for call in calls]:
                        wrong.append(f"lost {what}")
                case Delivered(client, number):
                    again = await ledger.results(client, 0, 1)
                    if again and (again[0].result_number or 0) <= number:
                        wrong.append(f"delivers again {what}")
        return wrong


def all_found_wrong(disk: Disk, count: int | None) -> tuple[int, list[str]]:
    """How often the power went, and what was wrong after it."""
    chance = random.Random(len(disk.log))  # noqa: S311
    tried, wrong = 0, list[str]()
    for place in cuts(disk, count):
        disk.advance(place)
        for fate in FATES:
            tried += 1
            wrong += [
                f"{place} {fate}: {each}"
                for each in found_wrong(disk.cut(fate, chance), disk.acked)
            ]
    return tried, wrong


@pytest.fixture(autouse=True)
def _early_checkpoints(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(upkeep, "CHECKPOINT_PAGES", 40)


@pytest.mark.timeout(120 * TIMES)
def test_no_power_cut_loses_what_was_acknowledged_or_breaks_the_ledger(tmp_path: Path):
    disk = record(tmp_path)
    tried, wrong = all_found_wrong(disk, CUTS)
    assert tried >= (5_000 if TIMES > 1 else 500)
    assert len(disk.acked) > 100
    assert wrong == []


def test_without_a_sync_at_each_commit_the_same_cuts_lose_what_was_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def without_sync(*args: object, **kwargs: object) -> opening.Opened:
        result = whole(*args, **kwargs)  # type: ignore[arg-type]
        result.connection.pragma("synchronous", "normal")
        return result

    whole = opening.open_file
    with monkeypatch.context() as patched:
        patched.setattr(opening, "open_file", without_sync)
        disk = record(tmp_path, rounds=2)
    _, wrong = all_found_wrong(disk, 60)
    assert any("lost" in each or "forgot" in each for each in wrong)


def test_an_acknowledgement_before_the_commit_is_caught(tmp_path: Path):
    """The bug that this file is for, planted: callers are told before it is on disk."""

    async def main(disk: Disk) -> None:
        async with opened(tmp_path, vfs=powercut.NAME) as ledger:
            for n in range(20):
                disk.log.append(Acked(Head(f"run-{n}", 0, RunState.QUEUED)))
                await ledger.commit(NewRun(run(f"run-{n}"), spec()))

    with powercut.recorded() as disk:
        asyncio.run(main(disk))
    _, wrong = all_found_wrong(disk, 60)
    assert any("lost" in each for each in wrong)
