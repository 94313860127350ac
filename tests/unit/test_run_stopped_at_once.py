"""Runs that are stopped in the very moment in which they are made."""

import asyncio

from edge_agent.core import HaltScope, Limits, Message, Role, RunError, RunSpec, RunState, TextPart
from edge_agent.events import RunFinished
from edge_agent.runs.halts import HaltLatch
from edge_agent.runs.runs import Runs
from edge_agent.runs.settings import RunSettings

SETTINGS = RunSettings(
    tool_timeout_s=1.0,
    tool_call_valid_for_s=1.0,
    cancel_confirm_s=1.0,
    max_active=8,
    retention_s=60.0,
    max_retained=8,
)
SPEC = RunSpec(
    messages=(Message(Role.USER, (TextPart("Hello?"),)),),
    engine="any",
    limits=Limits(max_steps=1, max_tool_calls=0),
    timeout_s=10.0,
)


class NeverDecided:
    """Knows every engine and decides nothing."""

    def engine(self, _name):
        return None

    async def decide(self, *_positional, **_named):
        await asyncio.Event().wait()


def test_a_run_cancelled_before_its_task_began_still_ends_with_its_event(tmp_path):
    async def scenario():
        runs = Runs(NeverDecided(), HaltLatch(tmp_path / "halts.json"), SETTINGS)
        run = runs.create(SPEC, client="test", request_id="")
        runs.cancel(run.id, RunError("CANCELLED_BY_CALLER", "at once"))
        async with asyncio.timeout(5):
            seen = [event async for event in runs.watch(run.id, 0)]
        assert isinstance(seen[-1].body, RunFinished)
        return seen[-1].body.run

    ended = asyncio.run(scenario())
    assert ended.state is RunState.CANCELLED
    assert ended.error.reason == "CANCELLED_BY_CALLER"
    assert ended.ended_at_s is not None


def test_a_halt_in_the_same_turn_ends_every_run(tmp_path):
    async def scenario():
        runs = Runs(NeverDecided(), HaltLatch(tmp_path / "halts.json"), SETTINGS)
        made = [runs.create(SPEC, client="test", request_id="") for _ in range(3)]
        outcome = await runs.halt(HaltScope.ALL, "", "stop", "test")
        assert outcome.runs_stopped == 3
        async with asyncio.timeout(5):
            for run in made:
                async for _ in runs.watch(run.id, 0):
                    pass
        return [runs.get(run.id) for run in made]

    assert [(run.state, run.error.reason) for run in asyncio.run(scenario())] == [
        (RunState.CANCELLED, "HALTED")
    ] * 3
