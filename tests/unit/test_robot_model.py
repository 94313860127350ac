"""What drivers and followers see of many runs, whatever happens: one call a resource, and Halts.

Seeded scenarios on a clock of their own: runs, tools, results, updates, cancels, Halts, heartbeats
and a disk that is slow. Judged by what is shown, and by what the robot's drivers do after it.
"""

import asyncio
import contextlib
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core import (
    Executor,
    Fence,
    Halt,
    HaltScope,
    Lifecycle,
    Message,
    Role,
    Run,
    RunError,
    RunState,
    SideEffect,
    TextPart,
    Tool,
    ToolCall,
    ToolResult,
)
from edge_agent.errors import EdgeAgentError
from edge_agent.events import (
    ApprovalRequested,
    CancelTool,
    DaemonToolStarted,
    ToolCallsIssued,
    ToolResultAccepted,
    ToolUpdated,
)
from edge_agent.heartbeat import Heartbeat
from edge_agent.runs.calls import ToolCalls
from edge_agent.runs.halts import HaltLatch, covers_run
from edge_agent.runs.holding import Resources
from edge_agent.runs.holds import Granted, Holds
from edge_agent.runs.live import LiveRun
from edge_agent.runs.runs import Runs
from tests.support.chaos import examples
from tests.support.scripted_engine import SETTINGS, ScriptedEngines, spec
from tests.support.virtual_time import run_in_virtual_time

SCHEMA = '{"type":"object"}'
TOOLS = (
    Tool("drive", "Drive.", SCHEMA, side_effect=SideEffect.IDEMPOTENT, resources=("base",)),
    Tool("carry", "Carry.", SCHEMA, resources=("base", "arm"), valid_for_s=3.0, timeout_s=4.0),
    Tool("patrol", "Go on.", SCHEMA, lifecycle=Lifecycle.BACKGROUND, resources=("base",)),
    Tool("wave", "Wave.", SCHEMA, resources=("arm",), needs_approval=True),
    Tool("look", "Look.", SCHEMA, side_effect=SideEffect.NONE),
    Tool(
        "home",
        "Home.",
        SCHEMA,
        side_effect=SideEffect.IDEMPOTENT,
        executor=Executor.DAEMON,
        resources=("arm",),
    ),
)
RESOURCES = {tool.name: tool.resources for tool in TOOLS}
CLIENTS, AGENTS = ("left", "right"), ("picker", "packer")
ACTIONS = 150
WRITE_S = 0.04
"""The disk's slowest: a Halt waits for longer."""

Key = tuple[str, str]


class SlowJournal:
    """A `Journal` that shows what is written a little later, in order."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._due_s = 0.0

    def write(self, _run: Run, _events: object, done: Callable[[Exception | None], None]) -> None:
        loop = asyncio.get_running_loop()
        self._due_s = max(self._due_s, loop.time() + self._chance.uniform(0.0, WRITE_S))
        loop.call_at(self._due_s, done, None)


class Robot:
    """The limbs: which call moves each, as their drivers know."""

    def __init__(self) -> None:
        self.moving: dict[str, Key] = {}
        self.most = Counter[str]()

    def begins(self, key: Key, tool: str) -> None:
        """A driver has begun with a call."""
        for resource in RESOURCES[tool]:
            other = self.moving.get(resource)
            assert other in (None, key), f"{resource}: {tool} of {key} while {other} moves it"
            self.moving[resource] = key
            self.most[resource] += 1

    def ends(self, key: Key) -> None:
        """It does nothing more."""
        self.moving = {name: moving for name, moving in self.moving.items() if moving != key}


class OwnTools:
    """`DaemonTools` that take a while."""

    def __init__(self, robot: Robot, chance: random.Random) -> None:
        self._robot = robot
        self._chance = chance

    async def call(self, call: ToolCall, *, timeout_s: float) -> ToolResult:  # noqa: ARG002
        key = ("daemon", str(id(call)))
        self._robot.begins(key, call.name)
        try:
            await asyncio.sleep(self._chance.uniform(0.0, 2.0))
        finally:
            self._robot.ends(key)
        return ToolResult(call.id, (TextPart("ok"),))


class Scene:
    """Runs of two clients on one robot, and what everybody has seen of them."""

    def __init__(self, seed: int, directory: Path, runs_type: type[Runs]) -> None:
        self.chance = random.Random(seed)  # noqa: S311 - reproducible, no secret
        self.robot = Robot()
        self.engines = ScriptedEngines()
        self.latch = HaltLatch(directory / "halts.json")
        changed = {"cancel_confirm_s": 2.0, "tool_timeout_s": 20.0, "tool_call_valid_for_s": 15.0}
        kept = {name: getattr(SETTINGS, name) for name in SETTINGS.__slots__}
        self.runs = runs_type(
            self.engines,
            self.latch,
            type(SETTINGS)(**{**kept, **changed}),
            daemon_tools=OwnTools(self.robot, self.chance),
            journal=SlowJournal(self.chance),
        )
        self.followers: list[asyncio.Task[None]] = []
        self.open: dict[Key, str] = {}
        self.going: dict[Key, str] = {}
        self.told: set[Key] = set()
        self.asked: set[Key] = set()
        self.latched: dict[str, Halt] = {}
        self.visible: dict[tuple[str, str], int] = {}
        self.seen = Counter[str]()

    # --- what is seen ---

    async def follow(self, run: Run) -> None:
        async for event in self.runs.watch(run.id, 0):
            body = event.body
            self.seen[type(body).__name__] += 1
            if isinstance(body, ToolCallsIssued):
                for call in body.tool_calls:
                    self.is_allowed(run, event.sequence, call)
                    self.robot.begins((run.id, call.id), call.name)
                    self.open[run.id, call.id] = call.name
            elif isinstance(body, DaemonToolStarted):
                self.is_allowed(run, event.sequence, body.tool_call)
            elif isinstance(body, ApprovalRequested):
                self.asked |= {(run.id, call.id) for call in body.tool_calls}
            elif isinstance(body, CancelTool):
                self.told.add((run.id, body.tool_call_id))

    def is_allowed(self, run: Run, sequence: int, call: ToolCall) -> None:
        for halt in self.latched.values():
            named = halt.scope is HaltScope.TOOL and halt.target == call.name
            if named or covers_run(halt, run.client, run.agent):
                shown = self.visible.get((halt.id, run.id), 0)
                assert sequence <= shown, f"{call.name} is shown after {halt.scope} has returned"

    # --- what happens ---

    def create(self) -> None:
        run = self.runs.create(
            spec(
                tools=TOOLS,
                agent=self.chance.choice(AGENTS),
                durable=self.chance.random() < 0.6,
                timeout_s=self.chance.choice([20.0, 200.0]),
                max_tool_calls=20,
            ),
            client=self.chance.choice(CLIENTS),
            request_id="",
        )
        self.followers.append(asyncio.ensure_future(self.follow(run)))

    def decide(self) -> None:
        if steps := self.engines.open():
            step = self.chance.choice(steps)
            if step.request.answer_only or self.chance.random() < 0.1:
                step.answer("Done")
            else:
                names = self.chance.choices(list(RESOURCES), k=self.chance.choice([1, 1, 2]))
                step.call(*((name, f'{{"n":{self.chance.random()}}}') for name in names))

    def drive(self) -> None:
        """A driver is done with a call, has stopped it, or goes on with it."""
        if not self.open:
            return
        key = self.chance.choice(list(self.open))
        tool, (run_id, call_id) = self.open.pop(key), key
        begins = tool == "patrol" and key not in self.told
        result = ToolResult(call_id, (TextPart("ok"),), cancelled=key in self.told)
        if not begins:
            self.robot.ends(key)
        self.runs.submit(run_id, [result])
        if begins:
            self.going[key] = tool

    def update(self) -> None:
        if not self.going:
            return
        key = self.chance.choice(list(self.going))
        done = self.chance.random() < 0.7
        if done:
            del self.going[key]
            self.robot.ends(key)
        self.runs.update_tool(key[0], ToolUpdated(key[1], (TextPart("news"),), False, done))

    def approve(self) -> None:
        if self.asked:
            run_id, call_id = self.asked.pop()
            self.runs.decide(
                run_id, call_id, approved=self.chance.random() < 0.8, client="people", reason=""
            )

    def some_run(self, *states: RunState) -> str | None:
        ids = [run.id for run in self.runs.page(frozenset(states), None, 100)]
        return self.chance.choice(ids) if ids else None

    def cancel(self) -> None:
        if run_id := self.some_run(RunState.WAITING_TOOL, RunState.QUEUED, RunState.SUSPENDED):
            self.runs.cancel(run_id, RunError("CANCELLED_BY_CALLER", "by a test"))

    def append(self) -> None:
        if run_id := self.some_run(RunState.WAITING_TOOL, RunState.QUEUED):
            self.runs.append(run_id, (Message(Role.USER, (TextPart("Hurry."),)),))

    def resume(self) -> None:
        if run_id := self.some_run(RunState.SUSPENDED):
            self.runs.resume(run_id, (), "people")

    async def halt(self) -> None:
        scope = self.chance.choice(list(HaltScope))
        target = {
            HaltScope.ALL: "",
            HaltScope.CLIENT: self.chance.choice(CLIENTS),
            HaltScope.AGENT: self.chance.choice(AGENTS),
            HaltScope.TOOL: self.chance.choice(list(RESOURCES)),
        }[scope]
        halt = (await self.runs.halt(scope, target, "", "people")).halt
        for run in self.runs.page(frozenset(), None, 100):
            self.visible[halt.id, run.id] = self.runs.live(run.id).snapshot().sequence
        self.latched[halt.id] = halt

    async def clear(self) -> None:
        if self.latched:
            halt_id = self.chance.choice(list(self.latched))
            del self.latched[halt_id]
            await self.runs.clear_halt(halt_id)

    def beat(self) -> None:
        asked = Heartbeat(3.0, suspend_after_s=1.0, cancel_after_s=None)
        self.runs.beat(self.chance.choice(CLIENTS), "", 0, asked, stop=False)

    async def play(self) -> None:
        """Many things in some order, then an end to all."""
        often: list[Callable[[], Any]] = [self.decide, self.drive, self.approve, self.clear]
        rare = [self.create, self.resume, self.update]
        rarer = [self.cancel, self.halt, self.append, self.beat]
        for _ in range(ACTIONS):
            act = self.chance.choice([*often * 6, *rare * 3, *rarer])
            with contextlib.suppress(EdgeAgentError):
                if (work := act()) is not None:
                    await work
            await asyncio.sleep(self.chance.choice([0.0, 0.0, 0.0, 0.01, 0.5]))
            for follower in self.followers:
                if follower.done() and not follower.cancelled():
                    follower.result()
        await self.runs.drain(0.0)
        for follower in self.followers:
            follower.cancel()
        for found in await asyncio.gather(*self.followers, return_exceptions=True):
            if isinstance(found, AssertionError):
                raise found


def play(seed: int, runs_type: type[Runs] = Runs) -> Scene:
    async def scenario() -> Scene:
        with tempfile.TemporaryDirectory() as directory:
            scene = Scene(seed, Path(directory), runs_type)
            await scene.play()
            return scene

    found: Scene = run_in_virtual_time(scenario())
    return found


@given(seed=st.integers(0, 2**32))
@examples(40)
def test_two_calls_never_move_one_limb_and_nothing_is_called_while_a_halt_is_latched(seed):
    play(seed)


def test_the_scenarios_reach_what_they_are_about():
    seen = Counter[str]()
    moved = Counter[str]()
    for seed in range(30):
        scene = play(seed)
        seen += scene.seen
        moved += scene.robot.most
    wanted = (ToolCallsIssued, DaemonToolStarted, CancelTool, ToolResultAccepted, ToolUpdated)
    assert all(seen[kind.__name__] > 20 for kind in wanted)
    assert moved["base"] > 50
    assert moved["arm"] > 50


class TestPlanted:
    """Bugs that were made on purpose: each is found."""

    def found(self) -> str:
        for seed in range(200):
            try:
                play(seed)
            except AssertionError as error:
                return str(error)
        return ""

    def test_a_hold_that_is_given_to_everybody(self, monkeypatch):
        decide = Holds._decide

        def generous(self, asked, before):
            decision = decide(self, asked, before)
            return decision if isinstance(decision, Granted) else Granted(Fence(1, 1))

        monkeypatch.setattr(Holds, "_decide", generous)
        assert "moves it" in self.found()

    def test_a_background_call_that_holds_nothing(self, monkeypatch):
        monkeypatch.setattr(
            Resources, "change", lambda self, run, call, _holding: self.release(run, call)
        )
        assert "moves it" in self.found()

    def test_a_halt_that_is_looked_at_once_only(self, monkeypatch):
        monkeypatch.setattr(ToolCalls, "_check_halts", lambda _self, _calls: None)
        assert "has returned" in self.found()

    def test_a_halt_that_stops_no_run(self, monkeypatch):
        monkeypatch.setattr(Runs, "_stop_covered", lambda _self, _halt, _error: 0)
        assert "has returned" in self.found()

    def test_a_halt_that_does_not_wait_for_the_disk(self, monkeypatch):
        monkeypatch.setattr(LiveRun, "is_settled", property(lambda _self: True))
        assert "has returned" in self.found()
