"""One-to-many wake-up: everybody, each time, and nothing in between is missed."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from edge_agent.wakeup import Wakeup


def run(work: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(10):
            return await work

    return asyncio.run(bounded())


async def wait(wakeup: Wakeup) -> None:
    await asyncio.shield(wakeup.next())


def test_everybody_who_waits_is_woken():
    async def scenario() -> None:
        wakeup = Wakeup()
        waiting = [asyncio.create_task(wait(wakeup)) for _ in range(3)]
        await asyncio.sleep(0)
        wakeup.notify()
        await asyncio.gather(*waiting)

    run(scenario())


def test_a_change_between_looking_and_waiting_is_not_missed():
    async def scenario() -> None:
        wakeup = Wakeup()
        changed = wakeup.next()
        wakeup.notify()  # while the state is looked at
        await changed

    run(scenario())


def test_an_earlier_change_wakes_nobody():
    async def scenario() -> bool:
        wakeup = Wakeup()
        wakeup.notify()
        await asyncio.sleep(0)
        return wakeup.next().done()

    assert run(scenario()) is False


def test_who_gives_up_disturbs_nobody():
    async def scenario() -> None:
        wakeup = Wakeup()
        gone, stays = (asyncio.create_task(wait(wakeup)) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        late = asyncio.create_task(wait(wakeup))
        await asyncio.sleep(0)
        assert not stays.done()
        wakeup.notify()
        await asyncio.gather(stays, late)

    run(scenario())
