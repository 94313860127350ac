"""What one load of an engine is seen to take: of its process, of a driver, or of MemAvailable."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from edge_agent.scheduling.footfall import Footfall
from edge_agent.scheduling.machine import ProcessBytes
from tests.support.machine import SetMachine
from tests.support.virtual_time import run_in_virtual_time

GIB, MIB = 1 << 30, 1 << 20
PID = 77


@dataclass
class Process:
    """All that is asked of a host."""

    pid: int = PID


class Seen:
    """A footfall on a machine that its test sets."""

    def __init__(self, driver_bytes: int | None) -> None:
        self.machine = SetMachine(16 * GIB, 10 * GIB)
        self.machine.driver = driver_bytes
        self.host: Any = Process()
        self.footfall = Footfall(self.machine, 2, 2048)

    def process(self, all_bytes: int, held_bytes: int) -> None:
        self.machine.processes[PID] = ProcessBytes(all_bytes, held_bytes)

    async def look(self) -> tuple[int, int, str]:
        await self.footfall.look(self.host)
        found = self.footfall.measurement()
        assert found is not None
        return found.load_peak_bytes, found.steady_bytes, found.source


def watch(
    scenario: Callable[[Seen], Coroutine[Any, Any, None]], driver_bytes: int | None = None
) -> None:
    async def begun() -> None:
        seen = Seen(driver_bytes)
        following = asyncio.create_task(seen.footfall.follow(seen.host))
        await asyncio.sleep(0.01)
        try:
            await scenario(seen)
        finally:
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following

    run_in_virtual_time(begun())


def test_the_peak_is_the_worst_moment_and_the_rest_is_the_last():
    async def scenario(seen: Seen) -> None:
        seen.process(3 * GIB, 1 * GIB)
        assert await seen.look() == (3 * GIB, 3 * GIB, "process")
        seen.process(2 * GIB, GIB // 2)
        assert await seen.look() == (3 * GIB, 2 * GIB, "process")
        assert seen.footfall.held_bytes == GIB // 2

    watch(scenario)


def test_the_worst_moment_is_seen_while_nobody_asks():
    async def scenario(seen: Seen) -> None:
        seen.process(5 * GIB, 5 * GIB)
        await asyncio.sleep(0.15)
        seen.process(2 * GIB, 2 * GIB)
        assert await seen.look() == (5 * GIB, 2 * GIB, "process")

    watch(scenario)


def test_what_the_driver_holds_more_than_before_is_the_engines():
    async def scenario(seen: Seen) -> None:
        seen.process(GIB, GIB)
        seen.machine.driver = 4 * GIB
        assert await seen.look() == (4 * GIB, 4 * GIB, "process")
        assert seen.footfall.held_bytes == 4 * GIB
        seen.machine.driver = 9 * GIB  # of an engine that was loaded later
        seen.process(GIB + MIB, GIB + MIB)
        assert await seen.footfall.look_again(seen.host)
        assert seen.footfall.held_bytes == 4 * GIB + MIB

    watch(scenario, driver_bytes=GIB)


def test_without_the_process_it_is_by_how_much_memory_fell():
    async def scenario(seen: Seen) -> None:
        seen.machine.set(available_bytes=6 * GIB)
        assert await seen.look() == (4 * GIB, 4 * GIB, "available")
        seen.machine.set(available_bytes=7 * GIB)
        assert await seen.look() == (4 * GIB, 3 * GIB, "available")
        assert seen.footfall.held_bytes == 3 * GIB
        assert not seen.footfall.of_process

    watch(scenario)


def test_memory_that_grew_meanwhile_says_nothing():
    async def scenario(seen: Seen) -> None:
        seen.machine.set(available_bytes=12 * GIB)
        await seen.footfall.look(seen.host)
        assert seen.footfall.measurement() is None
        assert seen.footfall.held_bytes == 0

    watch(scenario)


def test_a_large_step_counts_only_when_it_takes_more():
    async def scenario(seen: Seen) -> None:
        seen.process(2 * GIB, 2 * GIB)
        await seen.look()
        first = seen.footfall.measurement()
        assert not await seen.footfall.look_again(seen.host)
        seen.process(GIB, GIB)
        assert not await seen.footfall.look_again(seen.host)
        assert seen.footfall.measurement() == first
        seen.process(3 * GIB, 3 * GIB)
        assert await seen.footfall.look_again(seen.host)
        second = seen.footfall.measurement()
        assert first is not None
        assert second is not None
        assert (second.load_peak_bytes, second.steady_bytes) == (3 * GIB, 3 * GIB)
        assert second.measured_at_s == first.measured_at_s  # the same load

    watch(scenario)


def test_after_a_load_that_only_the_fall_told_of_a_step_tells_nothing():
    async def scenario(seen: Seen) -> None:
        seen.machine.set(available_bytes=6 * GIB)
        await seen.look()
        seen.process(9 * GIB, 9 * GIB)
        assert not await seen.footfall.look_again(seen.host)

    watch(scenario)


def test_a_process_that_is_gone_is_not_measured():
    async def scenario(seen: Seen) -> None:
        seen.process(2 * GIB, 2 * GIB)
        await seen.look()
        seen.machine.processes.clear()
        assert not await seen.footfall.look_again(seen.host)
        assert seen.footfall.held_bytes == 2 * GIB

    watch(scenario)
