"""What it costs to write things down: acknowledged writes, records of steps, bytes on disk.

    durable_ack_ratio  acknowledged writes a second of 32 callers through `Ledger.commit`, each a
                       small event and the head of its run, against 32 callers of the barest loop
                       that is as durable: one thread, the same SQLite with the same settings, what
                       waits in one transaction, as many bytes in one row, nothing encoded
    durable_create_ratio
                       durable runs that a daemon accepts a second from 32 callers over gRPC,
                       against runs that are not durable
    step_overhead_us   of the event loop's time, the record of a step that is not durable and that
                       of its tool call
    bytes_per_step     by how much the file grows for a durable step that calls a tool: its events,
                       its text as it was streamed, its records

The two sides of the ratio alternate, each in its own file on the same disk; ratios are of
neighbouring rounds.
"""

import asyncio
import dataclasses
import queue
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import apsw

from benchmarks._ledger_create import measure_creates
from benchmarks._ledger_steps import durable_step, last_of, new_run, records, state_changed
from benchmarks._shared import (
    ENGINE,
    Arguments,
    Target,
    median,
    parse_arguments,
    percentile,
    report,
    spread,
)
from edge_agent.ledger import rows
from edge_agent.ledger.changes import CallRecorded, EventsAdded, StepRecorded
from edge_agent.ledger.ledger import Ledger
from edge_agent.ledger.opening import FILE_NAME
from edge_agent.ledger.settings import LedgerSettings

CALLERS: Final = 32
SETTINGS: Final = LedgerSettings(max_bytes=1 << 30, retention_s=86_400.0, ballast_bytes=0)
TARGETS: Final = (
    Target("durable_ack_ratio", 0.8, at_most=False, meaning="of what the disk and SQLite allow"),
    Target("durable_create_ratio", 0.6, at_most=False, meaning="of runs that are not durable"),
    Target("step_overhead_us", 150, at_most=True, meaning="of the loop, a step not durable"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How long and how often."""

    rounds: int
    round_s: float
    steps: int
    durable_runs: int
    create_rounds: int
    create_round_s: float


QUICK = Plan(1, 0.3, steps=50, durable_runs=5, create_rounds=1, create_round_s=0.3)
FULL = Plan(40, 0.5, steps=3000, durable_runs=500, create_rounds=10, create_round_s=1.5)


# --- acknowledged writes ---


class BareLoop:
    """Group commit and nothing else: what any durable queue on this SQLite pays."""

    def __init__(self, path: Path) -> None:
        self._connection = apsw.Connection(str(path))
        self._connection.pragma("journal_mode", "wal")
        self._connection.pragma("synchronous", "full")
        self._connection.execute("CREATE TABLE entries (id INTEGER PRIMARY KEY, body BLOB)")
        self._waiting: queue.SimpleQueue[tuple[bytes, asyncio.Future[None]] | None]
        self._waiting = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    async def commit(self, body: bytes) -> None:
        """On disk when it returns."""
        written = self._loop.create_future()
        self._waiting.put((body, written))
        await written

    def close(self) -> None:
        """After the last commit."""
        self._waiting.put(None)
        self._thread.join()
        self._connection.close()

    def _write(self) -> None:
        while (first := self._waiting.get()) is not None:
            group = [first]
            while not self._waiting.empty():
                more = self._waiting.get_nowait()
                assert more is not None, "closed while somebody waits"
                group.append(more)
            with self._connection:
                for body, _ in group:
                    self._connection.execute("INSERT INTO entries (body) VALUES (?)", (body,))
            self._loop.call_soon_threadsafe(_resolve, [written for _, written in group])


def _resolve(written: list[asyncio.Future[None]]) -> None:
    for each in written:
        each.set_result(None)


async def acks_per_s(seconds: float, commit: Callable[[int], Awaitable[object]]) -> float:
    """Of 32 callers that each commit one thing after the other."""
    end_s = time.monotonic() + seconds
    done = 0

    async def caller(number: int) -> None:
        nonlocal done
        while time.monotonic() < end_s:
            await commit(number)
            done += 1

    began_s = time.monotonic()
    await asyncio.gather(*(caller(number) for number in range(CALLERS)))
    return done / (time.monotonic() - began_s)


class Callers:
    """Runs that go on by one small event at a time."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._runs = [new_run(number) for number in range(CALLERS)]
        self._sequences = [0] * CALLERS

    async def begin(self) -> None:
        """One run for each caller."""
        await self._ledger.commit(*self._runs)

    async def commit(self, number: int) -> None:
        """The caller's run, one event further."""
        self._sequences[number] += 1
        change = state_changed(self._runs[number].run, self._sequences[number])
        await self._ledger.commit(change)

    def body(self) -> bytes:
        """As many bytes as one such commit hands to SQLite."""
        change = state_changed(self._runs[0].run, 1)
        (event,) = change.events
        _, _, body = rows.event(event, None)
        return bytes(len(rows.head(change.run)) + len(body))


async def measure_acks(directory: Path, plan: Plan) -> tuple[list[float], list[float]]:
    """Acknowledged writes a second, round by round: ours, and the bare loop's."""
    ours, bare = list[float](), list[float]()
    ledger = Ledger.open(directory, SETTINGS)
    loop = BareLoop(directory / "bare.db")
    callers = Callers(ledger)
    await callers.begin()
    body = callers.body()
    for number in range(plan.rounds):
        for is_ours in (True, False) if number % 2 else (False, True):
            if is_ours:
                ours.append(await acks_per_s(plan.round_s, callers.commit))
            else:
                bare.append(await acks_per_s(plan.round_s, lambda _number: loop.commit(body)))
    loop.close()
    await ledger.close()
    return ours, bare


# --- steps ---


async def measure_notes(directory: Path, plan: Plan) -> tuple[list[float], float]:
    """Of the loop, in microseconds, each step's; and of all threads, the mean."""
    took_us = []
    ledger = Ledger.open(directory, SETTINGS)
    step, call = records("run-of-no-ledger", 1)
    cpu_s = time.process_time()
    for number in range(plan.steps):
        began_s = time.perf_counter()
        ledger.note(StepRecorded(dataclasses.replace(step, step=number + 1)))
        ledger.note(CallRecorded(dataclasses.replace(call, call_id=f"call-{number}")))
        took_us.append((time.perf_counter() - began_s) * 1e6)
        await asyncio.sleep(0.001)
    await ledger.close()
    return took_us, (time.process_time() - cpu_s) * 1e6 / plan.steps


async def measure_bytes(directory: Path, plan: Plan) -> float:
    """Bytes of the file for each durable step: four to a run."""
    steps = 4
    ledger = Ledger.open(directory, SETTINGS)
    await ledger.close()
    before = (directory / FILE_NAME).stat().st_size
    ledger = Ledger.open(directory, SETTINGS)
    for number in range(plan.durable_runs):
        new = new_run(number)
        changes: list[EventsAdded] = []
        run = new.run
        for step in range(1, steps + 1):
            changes.append(durable_step(run, step))
            run = changes[-1].run
        for step in range(1, steps + 1):
            step_record, call_record = records(run.id, step)
            ledger.note(StepRecorded(step_record), CallRecorded(call_record))
        await ledger.commit(new, *changes, last_of(run))
    await ledger.close()
    growth = (directory / FILE_NAME).stat().st_size - before
    return growth / (plan.durable_runs * steps)


async def measure(plan: Plan, arguments: Arguments) -> None:
    """Everything, each in a directory of its own, and the report."""
    creates = (str(arguments.store), ENGINE, plan.create_rounds, plan.create_round_s)
    durable, ephemeral = await asyncio.to_thread(measure_creates, *creates)
    with tempfile.TemporaryDirectory() as name:
        directories = [Path(name) / part for part in ("acks", "notes", "bytes")]
        for directory in directories:
            directory.mkdir()
        acks, notes, grown = directories
        ours, bare = await measure_acks(acks, plan)
        took_us, cpu_us = await measure_notes(notes, plan)
        bytes_per_step = await measure_bytes(grown, plan)
    ratios = [one / other for one, other in zip(ours, bare, strict=True)]
    creates_ratios = [one / other for one, other in zip(durable, ephemeral, strict=True)]
    report(
        "ledger",
        TARGETS,
        {
            "durable_ack_ratio": median(ratios),
            "durable_create_ratio": median(creates_ratios),
            "step_overhead_us": median(took_us),
        },
        more={
            "acks_per_s": median(ours),
            "bare_acks_per_s": median(bare),
            "step_overhead_us_p99": percentile(took_us, 0.99),
            "step_cpu_us": cpu_us,
            "bytes_per_step": bytes_per_step,
            "durable_creates_per_s": median(durable),
            "creates_per_s": median(ephemeral),
        },
        spreads={
            "durable_ack_ratio": spread(ratios),
            "acks_per_s": spread(ours),
            "bare_acks_per_s": spread(bare),
            "step_overhead_us": spread(took_us),
            "durable_create_ratio": spread(creates_ratios),
        },
    )


def main() -> None:
    """Parse and measure."""
    arguments = parse_arguments(__doc__)
    asyncio.run(measure(QUICK if arguments.quick else FULL, arguments))


if __name__ == "__main__":
    main()
