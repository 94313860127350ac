"""The stateful model of durable runs: what callers, engine, tools, people, disk and power do.

The real owners of runs and the real ledger on real files. What was acknowledged or shown is there
for ever, nothing that acts once starts twice, and nothing moves that a person has to let go first.
"""

import asyncio
import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from edge_agent.core import (
    Halt,
    HaltScope,
    Message,
    Role,
    Run,
    RunError,
    RunState,
    SideEffect,
    TextPart,
    ToolResult,
)
from edge_agent.errors import (
    AlreadyExists,
    DeadlineExceeded,
    EdgeAgentError,
    Halted,
    NotFound,
    Overloaded,
    WorkerError,
)
from edge_agent.events import DaemonToolStarted, Event, Snapshot, ToolCallsIssued
from edge_agent.ledger.changes import StoredRun
from edge_agent.runs.halts import covers_run, covers_tool
from tests.support.durable_life import (
    CONFIRM_S,
    RUN_TIMEOUT_S,
    SUSPENDED_S,
    TOOL_TIMEOUT_S,
    TOOLS,
    TOOLS_OF_AGENT,
    Life,
    Parts,
    World,
    arguments,
    wanted,
)
from tests.support.scripted_engine import Step, result
from tests.support.shown import assert_shown_of, bare, is_within

CLIENTS = ("arm", "base")
MAX_ACTIVE = 4
CANCEL = RunError("CANCELLED_BY_CALLER", "cancelled by a test")
NOW = Message(Role.USER, (TextPart("The door is open now."),))
HALTS = st.sampled_from(
    [
        (HaltScope.ALL, ""),
        (HaltScope.CLIENT, "arm"),
        (HaltScope.AGENT, "watcher"),
        (HaltScope.TOOL, "mail"),
        (HaltScope.TOOL, "look"),
    ]
)
T = TypeVar("T")
Task = asyncio.Task[Any]
Work = Coroutine[Any, Any, Any]
Key = tuple[str, str]


class DurableRuns(RuleBasedStateMachine):
    """What callers, engine, tools, people, the disk and the power supply do."""

    parts = Parts()

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.known: dict[str, Run] = {}
        self.seen: dict[str, list[Event]] = {}
        self.requests: dict[Key, tuple[str, str]] = {}
        self.others: dict[Key, set[str]] = {}
        self.acked: set[str] = set()
        self.numbers: dict[str, int] = {}
        self.latched: list[Halt] = []
        self.asleep: set[str] = set()
        self.decided = 0
        directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.live(directory)

    def teardown(self) -> None:
        """Whatever has happened, every run ends once nobody cares for it."""
        if not hasattr(self, "life"):
            return
        try:
            self.life.let_go()
            for seconds in (RUN_TIMEOUT_S, CONFIRM_S, SUSPENDED_S, CONFIRM_S):
                self.settle(seconds + 1)
            assert [run.id for run in self.known.values() if not run.state.ended] == []
            self.restart()
        finally:
            shutil.rmtree(self.life.die(written=True))

    def live(self, directory: Path) -> None:
        """Another life begins: who watches goes on, and nothing moves by itself that acts."""
        self.life = Life(directory, self.world, self.parts)
        self.asked: list[tuple[Task, Callable[[Task], None]]] = []
        self.watching: dict[str, Task] = {}
        self.steps_seen = 0
        self.others = {}
        left = self.life.loop.do(self.life.ledger.unfinished())
        self.looked_at = {stored.run.id: stored.run.sequence for stored in left}
        self.asleep |= {stored.run.id for stored in left if not may_go_on(stored)}
        latched = {halt.id for halt in self.life.runs.halts()}
        assert latched == {halt.id for halt in self.latched}
        self.life.recover()
        page, _ = self.life.loop.do(
            self.life.owner.list(states=frozenset(), page_size=1000, page_token="")
        )
        for run in reversed(page):  # one may have been kept of which its caller was not told
            self.showed(self.life.loop.do(self.life.owner.get(run.id)))
        self.settle()

    # --- calls, and what comes of them ---

    def ask(self, work: Work, told: Callable[[Task], None]) -> None:
        """Call the daemon; it answers now, or once the disk does."""
        self.asked.append((self.life.loop.create_task(work), told))
        self.settle()

    def settle(self, seconds: float = 0.0) -> None:
        self.life.settle(seconds)
        for task, told in [each for each in self.asked if each[0].done()]:
            self.asked.remove((task, told))
            told(task)
        assert self.life.held or not self.asked, "a call that is never answered"
        self.watch()
        self.check()

    def showed(self, run: Run) -> None:
        """Somebody was told that a durable run stands so."""
        before = self.known.get(run.id)
        self.known[run.id] = run
        if before is None:
            self.seen.setdefault(run.id, [])
            if run.request_id:
                self.requests.setdefault((run.client, run.request_id), (run.id, ""))
            return
        assert (run.client, run.request_id, run.agent, run.created_at_s) == (
            before.client,
            before.request_id,
            before.agent,
            before.created_at_s,
        )
        assert run.sequence >= before.sequence
        assert run.steps >= before.steps
        assert is_within(before.transcript, run.transcript)
        if before.state.ended:
            assert bare(run) == bare(before)

    def watch(self) -> None:
        """Somebody follows every run, and goes on after a restart where it was."""
        for run_id in self.known:
            if run_id not in self.watching:
                self.watching[run_id] = self.life.loop.create_task(self.follow(run_id))
        self.life.loop.settle()
        for task in self.watching.values():
            if task.done():
                task.result()

    async def follow(self, run_id: str) -> None:
        seen = self.seen[run_id]
        last = seen[-1].sequence if seen else 0
        try:
            async for event in self.life.owner.watch(run_id, last):
                if isinstance(event.body, Snapshot):
                    self.showed(event.body.run)
                    continue
                assert event.sequence > last
                last = event.sequence
                seen.append(event)
        except EdgeAgentError as error:
            raise AssertionError(f"what was shown of {run_id} is not there: {error}") from error

    # --- what callers do ---

    @rule(
        client=st.sampled_from(CLIENTS),
        agent=st.sampled_from(sorted(TOOLS_OF_AGENT)),
        durable=st.sampled_from([True, True, True, False]),
        request_id=st.sampled_from(["", "r1", "r2"]),
        text=st.sampled_from(["fetch", "carry"]),
    )
    def create(self, client: str, agent: str, durable: bool, request_id: str, text: str) -> None:  # noqa: FBT001
        if len(list(self.life.driven())) + len(self.asked) >= MAX_ACTIVE:
            return
        covered = self.covering(client, agent) is not None
        key, body = (client, request_id), f"{text} {agent} {durable}"
        if request_id:
            self.others.setdefault(key, set()).add(body)

        def told(task: Task) -> None:
            try:
                run = task.result()
            except Halted:
                assert covered
            except AlreadyExists:
                self.was_another_request(key, body)
            else:
                assert run.durable == durable
                if durable:
                    self.was_made(run, key, body)

        spec = wanted(text, agent, durable=durable)
        self.ask(self.life.owner.create(spec, client=client, request_id=request_id), told)

    def was_made(self, run: Run, key: Key, body: str) -> None:
        self.showed(run)
        if key[1]:
            run_id, its_body = self.requests.get(key, (run.id, ""))
            assert run.id == run_id
            assert its_body in ("", body)
            self.requests[key] = (run_id, body)

    def was_another_request(self, key: Key, body: str) -> None:
        its_body = self.requests.get(key, ("", ""))[1]
        others = self.others[key] - {body}
        assert its_body != body or others, "the same request, refused as another"

    @precondition(lambda self: self.waiting("open_tool_calls"))
    @rule(
        data=st.data(),
        which=st.sampled_from(["open", "open", "any"]),
        kind=st.sampled_from([{}, {"is_error": True}, {"cancelled": True}]),
    )
    def submit(self, data: st.DataObject, which: str, kind: dict[str, Any]) -> None:
        run = one_of(data, self.waiting("open_tool_calls"))
        is_open = [call.id for call in run.open_tool_calls]
        calls = is_open if which == "open" and is_open else ["call-1", "call-2", "call-99"]
        call_id = data.draw(st.sampled_from(calls))

        def told(task: Task) -> None:
            try:
                after = task.result()
            except EdgeAgentError:
                assert call_id not in is_open
            else:
                assert call_id in is_open
                self.showed(after)
                assert call_id in {turn.tool_call_id for turn in after.transcript}

        self.ask(self.life.owner.submit(run.id, [result(call_id, **kind)]), told)

    @precondition(lambda self: self.waiting("unapproved_tool_calls"))
    @rule(data=st.data(), approved=st.booleans())
    def decide_on_a_call(self, data: st.DataObject, approved: bool) -> None:  # noqa: FBT001
        run = one_of(data, self.waiting("unapproved_tool_calls"))
        waiting = [call.id for call in run.unapproved_tool_calls]
        call_id = data.draw(st.sampled_from([*waiting, "call-99"]))
        work = self.life.owner.decide(
            run.id, call_id, approved=approved, client="boss", reason="so be it"
        )
        self.ask(work, lambda task: self.accepted_if(task, expected=call_id in waiting))

    def accepted_if(self, task: Task, *, expected: bool) -> None:
        try:
            self.showed(task.result())
        except EdgeAgentError:
            assert not expected
        else:
            assert expected

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        run_id = one_of(data, list(self.known))

        def told(task: Task) -> None:
            self.showed(task.result())

        self.ask(self.life.owner.cancel(run_id, CANCEL), told)

    @precondition(lambda self: self.suspended())
    @rule(data=st.data(), says=st.booleans())
    def resume(self, data: st.DataObject, says: bool) -> None:  # noqa: FBT001
        run = one_of(data, self.suspended())
        covered = self.covering(run.client, run.agent) is not None
        acting = [c for c in run.open_tool_calls if TOOLS[c.name].side_effect != SideEffect.NONE]
        expected = run.state is RunState.SUSPENDED and not covered and not acting
        if expected:
            self.asleep.discard(run.id)
        messages = (NOW,) if says else ()
        work = self.life.owner.resume(run.id, messages, run.client)
        self.ask(work, lambda task: self.accepted_if(task, expected=expected))

    @precondition(lambda self: self.known)
    @rule(client=st.sampled_from(CLIENTS), upto=st.integers(1, 3))
    def fetch_results(self, client: str, upto: int) -> None:
        """Take some of what is delivered, and acknowledge it where the disk lets one."""
        work = self.life.owner.wait_results(client, 0, upto, 0.0)
        delivered = self.life.loop.do(work)
        self.delivered(delivered)
        if delivered and not self.life.held:
            last = delivered[-1].result_number
            assert last is not None
            self.life.loop.do(self.life.owner.ack_results(client, last))
            self.acked |= {run.id for run in delivered}
            self.settle()

    def delivered(self, runs: Iterable[Run]) -> None:
        last = 0
        for run in runs:
            assert run.durable
            assert run.state.ended
            assert run.id not in self.acked
            assert run.result_number is not None
            assert run.result_number > last
            last = run.result_number
            assert self.numbers.setdefault(run.id, last) == last
            self.showed(run)

    # --- what engine and tools do ---

    @precondition(lambda self: self.life.steps())
    @rule(data=st.data(), pieces=st.integers(1, 3))
    def say(self, data: st.DataObject, pieces: int) -> None:
        self.step(data).say(*["word "] * pieces)
        self.settle()

    @precondition(lambda self: self.life.steps())
    @rule(data=st.data(), count=st.integers(1, 3))
    def decide_on_calls(self, data: st.DataObject, count: int) -> None:
        step = self.step(data)
        if step.request.answer_only:
            step.answer("Done")
        else:
            tools = [tool.name for tool in step.request.tools]
            names = st.sampled_from([*tools, *["mail"] * 4 * ("mail" in tools)])
            calls = []
            for _ in range(count):
                self.decided += 1
                calls.append((data.draw(names), arguments(step.origin.run_id, self.decided)))
            step.call(*calls)
        self.settle()

    @precondition(lambda self: self.life.steps())
    @rule(data=st.data(), fails=st.sampled_from([False, False, True]))
    def answer(self, data: st.DataObject, fails: bool) -> None:  # noqa: FBT001
        step = self.step(data)
        if fails:
            step.fail(WorkerError("it ended"))
        else:
            step.answer("Done")
        self.settle()

    def step(self, data: st.DataObject) -> Step:
        step = one_of(data, self.life.steps())
        self.life.begin(step)
        return step

    @precondition(lambda self: self.life.tools.open())
    @rule(data=st.data(), came=st.sampled_from(["ok", "ok", "error", "late", "refused"]))
    def end_a_call_of_the_daemons_own(self, data: st.DataObject, came: str) -> None:
        call, outcome = one_of(data, self.life.tools.open())
        if came == "late":
            outcome.set_exception(DeadlineExceeded("too late", reason="TOOL_TIMEOUT"))
        elif came == "refused":
            outcome.set_exception(Overloaded("60 a minute", reason="TOOL_RATE_LIMITED"))
        else:
            outcome.set_result(ToolResult(call.id, (TextPart(came),), is_error=came == "error"))
        self.settle()

    # --- what people do ---

    @precondition(lambda self: self.known)
    @rule(halt=HALTS)
    def halt(self, halt: tuple[HaltScope, str]) -> None:
        work = self.life.owner.halt(*halt, "a person", "operator")
        outcome = self.life.loop.do(work)
        assert outcome.recorded
        self.latched.append(outcome.halt)
        for live in self.life.driven():
            if live.run.durable and covers_run(outcome.halt, live.run.client, live.run.agent):
                self.asleep.add(live.id)
        self.settle()

    @precondition(lambda self: self.latched)
    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        halt = one_of(data, self.latched)

        def told(task: Task) -> None:
            with contextlib.suppress(NotFound):  # where somebody else was faster
                task.result()
            self.latched = [each for each in self.latched if each is not halt]

        self.ask(self.life.owner.clear_halt(halt.id), told)

    # --- what happens to the daemon ---

    @precondition(lambda self: self.known and not self.life.held)
    @rule()
    def the_disk_is_slow(self) -> None:
        self.life.hold()

    @precondition(lambda self: self.life.held)
    @rule()
    def the_disk_is_fast_again(self) -> None:
        self.life.let_go()
        self.settle()

    @rule(seconds=st.sampled_from([1.0, CONFIRM_S + 1, TOOL_TIMEOUT_S + 1, RUN_TIMEOUT_S + 1]))
    def wait(self, seconds: float) -> None:
        self.settle(seconds)
        self.settle()

    @precondition(lambda self: self.known)
    @rule()
    def restart(self) -> None:
        self.life.drain()
        self.settle()
        self.life.let_go()
        for seconds in (0.0, CONFIRM_S + 2):
            self.settle(seconds)
        self.live(self.life.close())

    @precondition(lambda self: self.known)
    @rule(written=st.booleans())
    def crash(self, written: bool) -> None:  # noqa: FBT001
        self.live(self.life.die(written=written))

    # --- what always holds ---

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "life"):
            return
        self.nothing_moves_that_may_not()
        self.nothing_starts_twice()
        self.everything_shown_is_on_disk()
        if not self.life.held:
            self.memory_and_disk_agree()
            self.every_run_goes_on_or_waits_for_somebody()
            for client in CLIENTS:
                self.results_wait_until_they_are_acknowledged(client)

    def nothing_moves_that_may_not(self) -> None:
        for step in self.life.engines.steps[self.steps_seen :]:
            assert step.origin.run_id not in self.asleep
        self.steps_seen = len(self.life.engines.steps)
        for live in tuple(self.life.in_memory()):
            after = self.looked_at.get(live.id, 0)
            for event in self.life.emitted(live.id, after):
                self.looked_at[live.id] = event.sequence
                for name in called(event):
                    assert live.id not in self.asleep
                    assert self.covering(live.run.client, live.run.agent) is None
                    assert not any(covers_tool(halt, name) for halt in self.latched)

    def nothing_starts_twice(self) -> None:
        for (name, _), times in self.world.started.items():
            assert times == 1 or TOOLS[name].side_effect is not SideEffect.NON_IDEMPOTENT

    def everything_shown_is_on_disk(self) -> None:
        for run_id, seen in self.seen.items():
            stored = self.life.loop.do(self.life.ledger.find(run_id))
            assert stored is not None, f"acknowledged and lost: {run_id}"
            assert_shown_of(stored, seen)

    def memory_and_disk_agree(self) -> None:
        for run_id in self.known:
            run = self.life.loop.do(self.life.owner.get(run_id))
            self.showed(run)
            kept = self.life.loop.do(self.life.reader.get(run_id))
            assert kept.sequence <= run.sequence
            # What is being written is not on disk, and neither are numbers that nothing has yet.
            kept = dataclasses.replace(kept, partial_text=run.partial_text, sequence=run.sequence)
            assert bare(kept) == bare(run)

    def every_run_goes_on_or_waits_for_somebody(self) -> None:
        at_work = {step.origin.run_id for step in self.life.steps()}
        acting = {call.arguments_json for call, _ in self.life.tools.open()}
        for run in self.known.values():
            if run.state.ended:
                assert (run.error is None) == (run.state is RunState.SUCCEEDED)
                assert run.open_tool_calls == run.daemon_tool_calls == ()
            elif run.state is RunState.SUSPENDED:
                assert run.error is not None
                assert run.error.reason
            else:
                own = [c for c in run.daemon_tool_calls if c.arguments_json in acting]
                waits = run.open_tool_calls or run.unapproved_tool_calls or own
                assert waits or run.id in at_work

    def results_wait_until_they_are_acknowledged(self, client: str) -> None:
        found = self.life.loop.do(self.life.owner.wait_results(client, 0, 1000, 0.0))
        self.delivered(found)
        ended = {r.id for r in self.known.values() if r.state.ended and r.client == client}
        assert {run.id for run in found} == ended - self.acked

    # --- inside ---

    def standing(self) -> list[Run]:
        """The known runs that have not ended in memory, as they stand there."""
        runs = [live.run for live in self.life.in_memory() if live.id in self.known]
        return [run for run in runs if not run.state.ended]

    def waiting(self, what: str) -> list[Run]:
        return [run for run in self.standing() if getattr(run, what)]

    def suspended(self) -> list[Run]:
        return [run for run in self.standing() if run.state is RunState.SUSPENDED]

    def covering(self, client: str, agent: str) -> Halt | None:
        return next((halt for halt in self.latched if covers_run(halt, client, agent)), None)


def one_of(data: st.DataObject, among: Sequence[T]) -> T:
    """One of these, drawn by its place: ids differ from time to time."""
    return among[data.draw(st.integers(0, len(among) - 1))]


def may_go_on(stored: StoredRun) -> bool:
    """Whether a run may go on after a restart without anybody's leave."""
    harmless = {tool.side_effect for tool in stored.spec.tools} == {SideEffect.NONE}
    error = stored.run.error
    stopped = error is not None and error.reason == "DAEMON_STOPPING"
    return harmless and (stopped or stored.run.state is not RunState.SUSPENDED)


def called(event: Event) -> list[str]:
    """The tools that begin to act by this event."""
    match event.body:
        case ToolCallsIssued(tool_calls=calls):
            return [call.name for call in calls]
        case DaemonToolStarted(tool_call=call):
            return [call.name]
    return []
