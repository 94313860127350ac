"""What a robot's rules take: a decision on a hold, a client that falls silent, a Halt under load.

The daemon and its worker are processes of their own; the model's output is scripted below the
worker protocol, so that calls come fast. A call counts as issued when the daemon's record says so,
and as shown when a follower reads it with a number above that of the run as it stood right after
the Halt had returned.
"""

import asyncio
import contextlib
import dataclasses
import random
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks._shared import Target, parse_arguments, percentile, report, spread
from edge_agent.client import AsyncClient
from edge_agent.core import HaltScope, RunState, SideEffect, Tool, ToolResult
from edge_agent.errors import EdgeAgentError, Halted
from edge_agent.events import CancelTool, StateChanged, ToolCallsIssued
from edge_agent.heartbeat import Heartbeat
from edge_agent.runs.holds import Holder, Holding, Holds
from tests.support.daemon import DaemonProcess, running_daemon
from tests.support.scripted_worker import SCRIPTED, install, script

CLIENTS = 8
RESOURCES, WAITERS = 64, 32
STEPS = 30
GRACE_S = 0.02
"""From a lapse to what is done about it, as the clients of the benchmark ask for it."""
LAPSE_LIMIT_MS = 150.0
"""Half of the shortest window, and 100."""
_PAUSE_S = 0.03
_PARK_S = 30.0
_SCHEMA = '{"type":"object"}'
GO = Tool("go", "Go.", _SCHEMA, side_effect=SideEffect.IDEMPOTENT)
GRIP = Tool("grip", "Grip.", _SCHEMA)


@dataclass(frozen=True, slots=True)
class Plan:
    """How often each thing is done."""

    decisions: int
    windows_s: tuple[float, ...]
    lapses: int
    halts: int


QUICK = Plan(2_000, (0.1,), 2, 10)
FULL = Plan(100_000, (0.1, 0.25, 0.5, 1.0), 25, 1_000)
TARGETS = (
    Target("hold_conflict_us", 50, True, "p99: a call is refused, or waits"),
    Target(
        "heartbeat_lapse_ms",
        LAPSE_LIMIT_MS,
        True,
        "worst: from when a silent client's call was to be stopped to its CancelTool",
    ),
    Target(
        "halt_to_last_call_ms",
        0,
        True,
        "worst: from a Halt's return to the last call that it covers",
    ),
)


# --- holds ---


def hold_decisions_us(decisions: int) -> tuple[list[float], list[float]]:
    """Every resource is held, others wait: times to decide on a call, and to let it go."""
    holds = Holds(1)

    def holder(number: int, holding: Holding = Holding.INSTANT) -> Holder:
        return Holder(f"run-{number}", "call-1", "drive", "robot", "", holding)

    for number in range(RESOURCES):
        holding = Holding.INSTANT if number < RESOURCES // 2 else Holding.BACKGROUND
        holds.ask(holder(number, holding), [f"limb-{number}"])
    for number in range(WAITERS - 1):
        holds.ask(holder(RESOURCES + number), [f"limb-{number}", f"limb-{number + 1}"])
    chance = random.Random(7)  # noqa: S311 - reproducible, no secret
    asking, times_us = holder(1000), list[float]()
    left_us = list[float]()
    for _ in range(decisions):
        wanted = {f"limb-{chance.randrange(RESOURCES)}" for _ in range(chance.randrange(1, 4))}
        began_s = time.perf_counter()
        holds.ask(asking, wanted)
        asked_s = time.perf_counter()
        holds.withdraw(*asking.key)
        left_us.append((time.perf_counter() - asked_s) * 1e6)
        times_us.append((asked_s - began_s) * 1e6)
    return times_us, left_us


# --- heartbeats ---


async def lapse_ms(daemon: DaemonProcess, window_s: float, number: int) -> float:
    """From when a silent client's call was to be stopped to when its driver is told to."""
    name = f"silent-{window_s}-{number}"
    async with AsyncClient(str(daemon.api_socket), name=name) as client:
        run = await client.create(script([("go", {})]), [GO], durable=number % 2 == 0)
        due_s = told_ms = 0.0
        async for event in client.watch(run.id, 0):
            if isinstance(event.body, ToolCallsIssued):
                due_s = time.monotonic() + window_s + GRACE_S
                await client.beat(0, Heartbeat(window_s, suspend_after_s=GRACE_S))
            elif isinstance(event.body, CancelTool):
                told_ms = (time.monotonic() - due_s) * 1000
                cancelled = ToolResult(event.body.tool_call_id, (), cancelled=True)
                await client.submit_tool_results(run.id, [cancelled])
                break
        await client.beat(stop=True)
        return told_ms


async def lapses_ms(daemon: DaemonProcess, plan: Plan) -> dict[float, list[float]]:
    """By window; one client of each at a time."""

    async def of(window_s: float) -> list[float]:
        return [await lapse_ms(daemon, window_s, number) for number in range(plan.lapses)]

    return dict(zip(plan.windows_s, await asyncio.gather(*map(of, plan.windows_s)), strict=True))


# --- Halts ---


@dataclass(eq=False)
class Lane:
    """One run after the other of a client, whose calls are answered at once."""

    client: AsyncClient
    name: str
    durable: bool
    run_id: str = ""
    shown: list[tuple[str, int, float]] = field(default_factory=list)
    may_go: asyncio.Event = field(default_factory=asyncio.Event)
    parked: asyncio.Event = field(default_factory=asyncio.Event)
    calls: int = 0

    async def go(self) -> None:
        """Until it is cancelled."""
        while True:
            if not self.may_go.is_set():
                self.parked.set()
                await self.may_go.wait()
                self.parked.clear()
            with contextlib.suppress(Halted):
                await self._run()

    async def _run(self) -> None:
        grip = dataclasses.replace(GRIP, resources=(f"gripper-{self.name}",))
        names = (GO.name, GRIP.name)
        steps = [[(names[number % len(names)], {"n": number})] for number in range(STEPS)]
        run = await self.client.create(
            script(*steps),
            [GO, grip],
            durable=self.durable,
        )
        self.run_id = run.id
        async for event in self.client.watch(run.id, 0):
            match event.body:
                case ToolCallsIssued(tool_calls=calls):
                    self.shown.append((run.id, event.sequence, time.time()))
                    self.calls += len(calls)
                    await self._submit([ToolResult(call.id, ()) for call in calls])
                case CancelTool(tool_call_id=call_id):
                    await self._submit([ToolResult(call_id, (), cancelled=True)])
                case StateChanged(state=RunState.SUSPENDED):
                    await self.client.cancel(run.id)

    async def _submit(self, results: Sequence[ToolResult]) -> None:
        with contextlib.suppress(EdgeAgentError):  # it is stopped already
            await self.client.submit_tool_results(self.run_id, results)


@contextlib.asynccontextmanager
async def load(daemon: DaemonProcess) -> AsyncIterator[list[Lane]]:
    """Clients with two runs each, a durable one and one that is not."""
    async with contextlib.AsyncExitStack() as stack:
        lanes = []
        for number in range(CLIENTS):
            name = f"robot-{number}"
            client = AsyncClient(str(daemon.api_socket), name=name)
            await stack.enter_async_context(client)
            lanes += [Lane(client, name, durable) for durable in (True, False)]
        for lane in lanes:
            lane.may_go.set()
        tasks = [asyncio.create_task(lane.go()) for lane in lanes]
        try:
            yield lanes
        finally:
            for task in tasks:
                task.cancel()
            for found in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(found, Exception):
                    raise found


async def halt_once(people: AsyncClient, lanes: Sequence[Lane], *, everybody: bool) -> list[float]:
    """Halt one client, or all, and let them go on; milliseconds of calls after its return."""
    scope, target = HaltScope.CLIENT, lanes[0].name
    if everybody:
        scope, target = HaltScope.ALL, ""
    for lane in lanes:
        lane.may_go.clear()
        lane.shown.clear()
    halt = (await people.halt(scope, target)).halt
    returned_s = time.time()
    stood = [await people.get(lane.run_id) for lane in lanes if lane.run_id]
    for lane in lanes:
        await asyncio.wait_for(lane.parked.wait(), _PARK_S)
    numbers = {run.id: run.sequence for run in stood}
    late_s = [
        at_s - returned_s
        for lane in lanes
        for run_id, number, at_s in lane.shown
        if number > numbers.get(run_id, number)
    ]
    for lane in lanes:
        if lane.run_id:
            _steps, calls = await people.trace(lane.run_id)
            late_s += [call.issued_at_s - returned_s for call in calls]
    await people.clear_halt(halt.id)
    for lane in lanes:
        lane.may_go.set()
    return [max(0.0, each) * 1000 for each in late_s]


async def halts_ms(daemon: DaemonProcess, halts: int) -> tuple[list[float], float]:
    """For each Halt the last call after its return, 0 if none; and the calls a second meanwhile."""
    chance, worst = random.Random(11), list[float]()  # noqa: S311 - reproducible, no secret
    async with (
        load(daemon) as lanes,
        AsyncClient(str(daemon.admin_socket), name="people") as people,
    ):
        await asyncio.sleep(0.5)
        began_s, before = time.monotonic(), sum(lane.calls for lane in lanes)
        for number in range(halts):
            await asyncio.sleep(chance.uniform(0.0, _PAUSE_S))
            everybody = number % 10 == 0
            name = f"robot-{chance.randrange(CLIENTS)}"
            covered = [lane for lane in lanes if everybody or lane.name == name]
            worst.append(max(await halt_once(people, covered, everybody=everybody), default=0.0))
        made = sum(lane.calls for lane in lanes) - before
        return worst, made / (time.monotonic() - began_s)


async def measure(daemon: DaemonProcess, plan: Plan) -> None:
    conflicts, left = hold_decisions_us(plan.decisions)
    lapses = await lapses_ms(daemon, plan)
    halts, calls_per_s = await halts_ms(daemon, plan.halts)
    told = [each for found in lapses.values() for each in found]
    measured = {
        "hold_conflict_us": percentile(conflicts, 0.99),
        "heartbeat_lapse_ms": max(told),
        "halt_to_last_call_ms": max(halts),
    }
    more = {f"lapse_{window_s:g}s_worst_ms": max(each) for window_s, each in lapses.items()}
    more |= {
        "hold_conflict_us_p50": percentile(conflicts, 0.5),
        "hold_withdraw_us_p99": percentile(left, 0.99),
        "halts": float(len(halts)),
        "calls_per_s": calls_per_s,
    }
    spreads = {"hold_conflict_us": spread(conflicts), "heartbeat_lapse_ms": spread(told)}
    report("robot", TARGETS, measured, more=more, spreads=spreads, engine=SCRIPTED)


def main() -> None:
    plan = QUICK if parse_arguments(__doc__).quick else FULL
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "engines"
        config = install(
            store,
            f"max_active: 100, cancel_confirm: 5s, max_steps: {STEPS + 1}, max_tool_calls: {STEPS}",
        )
        with running_daemon(store, config) as daemon:
            daemon.wait_for("engine_loaded")
            asyncio.run(measure(daemon, plan))


if __name__ == "__main__":
    main()
