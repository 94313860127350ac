"""Places in a loaded engine: never more than there are, first come first served."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_agent.core import EngineState
from edge_agent.engines.host import EngineHost, WorkerSettings
from edge_agent.engines.manifest import decode_manifest
from edge_agent.scheduling.loaded import LoadedEngine
from tests.support.engine_files import FILES, recipe_data


def loaded_engine(slots: int) -> LoadedEngine:
    """An engine that is ready, as its scheduler sees it; no process is behind it."""
    data = recipe_data(FILES)
    del data["obtain"]
    data["source"] = {"kind": "path", "location": "files"}
    settings = WorkerSettings(None, 5.0, 30.0, 900)
    host = EngineHost(decode_manifest(msgspec.json.encode(data)), settings)
    host.slots = slots
    loaded = LoadedEngine(host, lambda: None)
    loaded.become(EngineState.READY)
    return loaded


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(10):
            return await work

    return asyncio.run(bounded())


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Steps:
    """Steps that come, hold a place, and leave, in the order in which they were let in."""

    def __init__(self, loaded: LoadedEngine) -> None:
        self.loaded = loaded
        self.came: list[int] = []
        self.let_in: list[int] = []
        self.holding: list[int] = []
        self.tasks: dict[int, asyncio.Task[None]] = {}

    def come(self) -> None:
        number = len(self.came)
        self.came.append(number)
        self.tasks[number] = asyncio.create_task(self._step(number))

    async def _step(self, number: int) -> None:
        if await self.loaded.take_place():
            self.let_in.append(number)
            self.holding.append(number)

    def leave(self) -> None:
        if self.holding:
            self.holding.pop(0)
            self.loaded.give_place()

    def give_up(self, number: int) -> None:
        """A step that waits is cancelled."""
        waiting = [n for n in self.came if n not in self.let_in and not self.tasks[n].done()]
        if waiting:
            self.tasks[waiting[number % len(waiting)]].cancel()


def nobody_waits_beside_a_free_place(steps: Steps) -> None:
    """Once everything that can run has run."""
    assert not steps.loaded.waiting or len(steps.holding) == steps.loaded.host.slots


ACTIONS = st.lists(
    st.sampled_from(["come", "come", "leave", "turn", "turn", "many turns"])
    | st.integers(0, 3),  # which of those that wait gives up
    max_size=60,
)


@settings(max_examples=300)
@given(actions=ACTIONS, slots=st.integers(1, 3))
@example(
    actions=["come", "come", "come", "many turns", "come", "leave", "leave", "many turns"],
    slots=2,
)  # one that comes in the moment in which two are free: behind one that waits
@example(
    actions=["come", "turn", "come", "many turns", "come", "leave", "many turns"], slots=1
)  # one that comes in the moment in which a place is free
def test_steps_are_let_in_as_they_came_and_never_more_than_there_are_places(actions, slots: int):
    async def scenario() -> Steps:
        steps = Steps(loaded_engine(slots))
        for action in actions:
            if isinstance(action, int):
                steps.give_up(action)
            elif action == "come":
                steps.come()
            elif action == "leave":
                steps.leave()
            elif action == "turn":
                await turns(1)
            else:
                await turns(20)
                nobody_waits_beside_a_free_place(steps)
            assert len(steps.holding) <= slots
            assert steps.loaded.active == len(steps.holding)
        await turns(20)
        nobody_waits_beside_a_free_place(steps)
        while steps.holding:  # everybody who still wants a place gets one in the end
            steps.leave()
            await turns(20)
        return steps

    steps = run(scenario())
    assert steps.let_in == sorted(steps.let_in)
    gave_up = {number for number, task in steps.tasks.items() if task.cancelled()}
    assert set(steps.let_in) | gave_up == set(steps.came)
    assert (steps.loaded.active, steps.loaded.waiting) == (0, 0)


@pytest.mark.parametrize("state", [EngineState.DRAINING, EngineState.FAILED, EngineState.STOPPING])
def test_who_waits_is_told_when_the_engine_takes_no_more(state: EngineState):
    async def scenario() -> list[bool]:
        loaded = loaded_engine(1)
        assert await loaded.take_place()
        waiting = [asyncio.create_task(loaded.take_place()) for _ in range(3)]
        await turns(5)
        assert loaded.waiting == 3
        loaded.become(state)
        return [*(await asyncio.gather(*waiting)), await loaded.take_place()]

    assert run(scenario()) == [False] * 4


def test_draining_waits_for_the_last_step():
    async def scenario() -> None:
        loaded = loaded_engine(2)
        await loaded.take_place()
        await loaded.take_place()
        loaded.become(EngineState.DRAINING)
        draining = asyncio.create_task(loaded.drained())
        loaded.give_place()
        await turns(10)
        assert not draining.done()
        loaded.give_place()
        await draining

    run(scenario())
