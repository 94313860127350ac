"""The daemon while memory comes and goes and its workers are killed: does it still answer at once?

Three engines (the same model under three names) share a budget that holds two, and everything
happens at the same time:

    runs      NORMAL runs go round the engines, which makes them come and go
    turns     BATCH runs are put off by URGENT ones on the same engine, which has one place
    kills     workers are killed (SIGKILL) while they load, while they run and while they idle
    memory    another process takes memory until less is free than the soft and then the hard
              floor, and gives it back; the floors are set from what is free at the start

Meanwhile a client in a process of its own makes 50 unary calls a second (GetStatus, GetEngine,
Explain, CreateRun, CancelRun), at times that are fixed beforehand; times are as it sees them. A run
is lost when it ends neither as SUCCEEDED, with the text that was streamed, nor for a reason that a
kill explains. At the end every engine must load and answer once more.
"""

import asyncio
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._shared import (
    Child,
    Target,
    parse_arguments,
    percentile,
    report,
    spread,
)
from edge_agent.client import AsyncClient
from edge_agent.core import EngineInfo, EngineState, Priority, Run, RunState
from edge_agent.errors import EdgeAgentError
from edge_agent.events import RunFinished, TextDelta
from edge_agent.telemetry import procfs
from tests.support.daemon import DaemonProcess, running_daemon
from tests.support.engines import make_store

if TYPE_CHECKING:
    from benchmarks._pressure_children import Timing

ENGINES = ("alpha", "beta", "gamma")
MIB = 1 << 20
GIB = 1 << 30
SOFT_BYTES, HARD_BYTES = 2 * GIB, 7 * GIB // 2
"""How much must be taken to get to the floors; the engines themselves take less than 1 GiB."""
HELD_BYTES = (5 * GIB // 2, 17 * GIB // 4)
"""What the other process takes: to get below the soft floor, then the hard one."""
CONFIG = """
runs: {{default_engine: alpha, max_retained: 100000}}
worker: {{threads: 1}}
engines:
  alpha: {{slots: 1, context_tokens: 1024}}
  beta: {{slots: 1, context_tokens: 1024}}
  gamma: {{slots: 1, context_tokens: 1024}}
scheduling:
  memory_budget: 800MiB
  min_residency: 100ms
  robot_reserve: 64MiB
  soft_floor: {soft_mib}MiB
  hard_floor: {hard_mib}MiB
"""
EXPECTED = frozenset({"WORKER_LOST", "OUT_OF_MEMORY"})
"""Why a run may fail here: its worker was killed, or its engine was, twice, in its load."""
FAULTS = frozenset(
    {
        "run_crashed", "rpc_crashed", "engine_load_broke", "engine_unload_broke",
        "engine_unload_unproven", "telemetry_reader_failed", "worker_hung", "steps_stuck", "raw",
    }
)  # fmt: skip
"""Lines of the log that must not be there; `raw` is what is no line of the log."""
TARGETS = (
    Target("unary_ms_p99_under_pressure", 50, True, "any of five unary calls"),
    Target("unary_failed", 0, True, "calls that ended with an error"),
    Target("runs_lost", 0, True, "neither SUCCEEDED nor failed as a kill explains"),
    Target("faults_logged", 0, True, "crashes and unproven ends in the daemon's log"),
)
_STORY = "Tell me a long story about a robot that looks for its charger."
_RUN_S = 120.0
_FIND_S = 3.0
_LOOK_S = 0.005
_SLOWEST = 5


@dataclass(frozen=True, slots=True)
class Plan:
    """How long it all takes; how long memory is free, below the soft floor and below the hard."""

    seconds: float
    free_s: float
    soft_s: float
    hard_s: float
    kill_every_s: float


QUICK = Plan(10, free_s=3, soft_s=1, hard_s=1, kill_every_s=1)
FULL = Plan(60, free_s=6, soft_s=2, hard_s=2, kill_every_s=1.5)


@dataclass(slots=True)
class Seen:
    """What came of the runs and the kills."""

    runs: int = 0
    lost: list[str] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    survived: int = 0


class Pressure:
    """Everything that goes on beside the calls that are timed."""

    def __init__(self, daemon: DaemonProcess, client: AsyncClient, plan: Plan) -> None:
        self.seen = Seen()
        self._daemon = daemon
        self._client = client
        self._plan = plan
        self._random = random.Random(1)  # noqa: S311 - moments, no secrets
        self._over = asyncio.Event()

    async def go_on(self, memory: Child) -> None:
        """For as long as planned, then until the last run has ended."""
        async with asyncio.TaskGroup() as group:
            for work in (self._rotate(), self._rotate(), self._take_turns(), self._kill_often()):
                group.create_task(work)
            group.create_task(self._squeeze(memory))
            await asyncio.sleep(self._plan.seconds)
            self._over.set()

    async def _rotate(self) -> None:
        engines = itertools.cycle(ENGINES)
        while not self._over.is_set():
            tokens = self._random.randint(4, 40)
            run = await self.carry(next(engines), "What can you do?", tokens, Priority.NORMAL)
            if run is None or run.state is not RunState.SUCCEEDED:
                await self._pause(0.2)  # refused at once: not as often as the daemon can say so

    async def _take_turns(self) -> None:
        for engine in itertools.cycle(ENGINES):
            if self._over.is_set():
                return
            begun = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                batch = group.create_task(self.carry(engine, _STORY, 150, Priority.BATCH, begun))
                await begun.wait()
                await self.carry(engine, "Hello?", 2, Priority.URGENT)
            if batch.result() is None:
                await self._pause(0.2)

    async def carry(
        self,
        engine: str,
        goal: str,
        tokens: int,
        priority: Priority,
        begun: asyncio.Event | None = None,
    ) -> Run | None:
        """A run to its end, with a look at how it ended; `begun`: it has text, or has ended."""
        self.seen.runs += 1
        begun = begun or asyncio.Event()
        texts: list[str] = []
        ended: Run | None = None
        try:
            async with (
                asyncio.timeout(_RUN_S),
                aclosing(self._run(engine, goal, tokens, priority)) as events,
            ):
                async for event in events:
                    if isinstance(event.body, TextDelta):
                        texts.append(event.body.text)
                        begun.set()
                    elif isinstance(event.body, RunFinished):
                        ended = event.body.run
        except (TimeoutError, EdgeAgentError) as error:
            self.seen.lost.append(f"{priority} on {engine}: {error!r}")
        else:
            self._judge(f"{priority} on {engine}", ended, "".join(texts))
        finally:
            begun.set()
        return ended

    def _run(self, engine: str, goal: str, tokens: int, priority: Priority) -> Any:
        return self._client.execute(
            goal, engine=engine, max_output_tokens=tokens, priority=priority, temperature=0.0
        )

    def _judge(self, what: str, run: Run | None, text: str) -> None:
        if run is None:
            self.seen.lost.append(f"{what}: its stream ended before it did")
        elif run.state is RunState.SUCCEEDED:
            if run.answer != text:
                self.seen.lost.append(f"{what}: {run.answer!r} is not what was streamed: {text!r}")
        elif run.error is not None and run.error.reason in EXPECTED:
            self.seen.failed[run.error.reason] += 1
        else:
            self.seen.lost.append(f"{what}: {run.state} {run.error}")

    async def _kill_often(self) -> None:
        moments = itertools.cycle(("loading", "running", "idle"))
        while not self._over.is_set():
            await self._pause(self._plan.kill_every_s * self._random.uniform(0.5, 1.5))
            await self._kill(next(moments))

    async def _kill(self, moment: str) -> None:
        """One worker at this moment of its life, a random time into it; none if none comes."""
        until_s = time.monotonic() + _FIND_S
        while not self._over.is_set() and time.monotonic() < until_s:
            found = [each for each in await self._client.engines() if _moment(each) == moment]
            if not found:
                await asyncio.sleep(_LOOK_S)
                continue
            await asyncio.sleep(self._random.uniform(0, 0.2) if moment == "loading" else 0)
            worker = self._random.choice(found).worker
            if worker is not None and _end(worker.pid, self._daemon.process.pid):
                self.seen.kills[moment] += 1
                await self._client.status()
                self.seen.survived += self._daemon.process.poll() is None
            return

    async def _squeeze(self, memory: Child) -> None:
        plan, (soft, hard) = self._plan, HELD_BYTES
        for size_bytes, seconds in itertools.cycle(
            ((0, plan.free_s), (soft, plan.soft_s), (hard, plan.hard_s))
        ):
            if self._over.is_set():
                break
            await asyncio.to_thread(memory.ask, size_bytes=size_bytes)
            await self._pause(seconds)
        await asyncio.to_thread(memory.ask, size_bytes=0)

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._over.wait(), seconds)
        except TimeoutError:
            return


def _moment(engine: EngineInfo) -> str:
    worker = engine.worker
    if worker is None or not worker.pid:
        return "none"
    if engine.state is EngineState.READY:
        return "running" if worker.active_steps else "idle"
    return "loading" if engine.state is EngineState.LOADING else "none"


def _end(pid: int, daemon_pid: int) -> bool:
    """Kill a worker, if it is still the daemon's child; the descriptor can't be of another one."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        if int(parent) != daemon_pid:
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except (OSError, ProcessLookupError):
        return False
    else:
        return True
    finally:
        os.close(descriptor)


async def measure(
    daemon: DaemonProcess, caller: Child, memory: Child, plan: Plan
) -> tuple[Seen, dict[str, Any]]:
    """All of it at once; then every engine once more, in peace."""
    async with (
        AsyncClient(str(daemon.api_socket), name="pressure") as client,
        AsyncClient(str(daemon.admin_socket), name="pressure") as admin,
    ):
        pressure = Pressure(daemon, client, plan)
        seen = pressure.seen
        called, _ = await asyncio.gather(
            asyncio.to_thread(caller.ask, seconds=plan.seconds), pressure.go_on(memory)
        )
        for name in ENGINES:
            try:
                await admin.load(name)
            except EdgeAgentError as error:
                seen.lost.append(f"load of {name} at the end: {error!r}")
                continue
            before = sum(seen.failed.values())
            await pressure.carry(name, "Hello?", 2, Priority.NORMAL)
            if sum(seen.failed.values()) > before:
                seen.lost.append(f"{name} was READY at the end and its run failed")
        async for run in client.list():
            if not run.state.ended:
                seen.lost.append(f"{run.id} has never ended: {run.state}")
    return seen, called


def floors() -> dict[str, int]:
    """What the configuration says of the floors, from what is free now."""
    free = procfs.read_memory(Path("/")).available_bytes.value
    if free is None or free < 2 * HELD_BYTES[-1]:
        sys.exit(f"{2 * HELD_BYTES[-1]} bytes of memory must be free, and are not: {free}")
    return {"soft_mib": (free - SOFT_BYTES) // MIB, "hard_mib": (free - HARD_BYTES) // MIB}


def crossings(levels: list[str]) -> int:
    """How often a floor was crossed on the way down."""
    order = ("NORMAL", "SOFT", "HARD")
    steps = itertools.pairwise(order.index(level) for level in ("NORMAL", *levels))
    return sum(max(0, after - before) for before, after in steps)


def figures_of(daemon: DaemonProcess, seen: Seen, called: dict[str, Any]) -> dict[str, float]:
    timings: list[Timing] = called["timings"]
    ms = [each for _, _, each in timings]
    faults = [line for event in sorted(FAULTS) for line in daemon.lines(event)]
    for problem in (*called["failed"], *seen.lost, *faults):
        print(problem)
    figures: dict[str, float] = {
        "unary_ms_p99_under_pressure": percentile(ms, 0.99),
        "unary_ms_p50_under_pressure": percentile(ms, 0.5),
        "unary_ms_most_under_pressure": max(ms),
        "unary_calls": len(ms),
        "unary_failed": len(called["failed"]),
        "runs": seen.runs,
        "runs_lost": len(seen.lost),
        "runs_failed_by_kills": seen.failed.total(),
        "faults_logged": len(faults),
        "loads": len(daemon.lines("engine_loaded")),
        "evictions": len(daemon.lines("engine_evicted")),
        "preemptions": len(daemon.lines("step_preempted")),
        "kills": seen.kills.total(),
        "kills_survived": seen.survived,
        "kills_by_daemon": len(daemon.lines("engine_killed")),
        "floor_crossings": crossings([line["floor"] for line in daemon.lines("memory_pressure")]),
        "leaks": len(daemon.lines("engine_memory_leaked")),
    }
    return {key: float(value) for key, value in figures.items()}


def print_calls(called: dict[str, Any], began_s: float) -> None:
    """The times of each call, and when the slowest ones were."""
    timings: list[Timing] = called["timings"]
    print(f"\n{'ms':14}{'calls':>7}{'p50':>8}{'p99':>8}{'most':>8}")
    for name in sorted({name for name, _, _ in timings}):
        ms = [each for call, _, each in timings if call == name]
        row = f"{percentile(ms, 0.5):>8.1f}{percentile(ms, 0.99):>8.1f}{max(ms):>8.1f}"
        print(f"{name:14}{len(ms):>7}{row}")
    slowest = sorted(timings, key=lambda each: -each[2])[:_SLOWEST]
    moments = ", ".join(f"{name} {ms:.0f} at {at - began_s:.1f} s" for name, at, ms in slowest)
    print(f"slowest: {moments}")


def main() -> None:
    arguments = parse_arguments(__doc__)
    arguments.manifest()
    plan = QUICK if arguments.quick else FULL
    with tempfile.TemporaryDirectory(prefix="ea-", dir=arguments.store.parent) as directory:
        store = make_store(arguments.store, Path(directory), *ENGINES).root
        with (
            running_daemon(store, CONFIG.format(**floors())) as daemon,
            Child("caller", socket=str(daemon.api_socket), engines=ENGINES) as caller,
            Child("memory") as memory,
        ):
            began_s = time.monotonic()
            seen, called = asyncio.run(measure(daemon, caller, memory, plan))
            assert daemon.stop() == 0, "the daemon did not end well"
            figures = figures_of(daemon, seen, called)
    print_calls(called, began_s)
    kills = ", ".join(f"{count} {moment}" for moment, count in sorted(seen.kills.items()))
    print(f"workers killed: {kills}; runs that failed for it: {dict(seen.failed)}")
    report(
        "pressure",
        TARGETS,
        {target.key: figures.pop(target.key) for target in TARGETS},
        more=figures,
        spreads={"unary_ms_p50_under_pressure": spread([ms for _, _, ms in called["timings"]])},
        engine=", ".join(ENGINES),
    )


if __name__ == "__main__":
    main()
