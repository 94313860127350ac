"""An event loop whose clock only its test turns: timeouts pass without waiting."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Timers follow `advance`; files and threads are real."""

    def __init__(self, selector: selectors.BaseSelector | None = None) -> None:
        super().__init__(selector)
        self._now_s = 1000.0

    def time(self) -> float:
        """The virtual time."""
        return self._now_s

    def settle(self, seconds: float = 0.0) -> None:
        """Let this much time pass, and everything run that then can."""
        self._now_s += seconds
        self.do(_yield_often())

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run something to its end."""
        return self.run_until_complete(work)


async def _yield_often() -> None:
    for _ in range(30):
        await asyncio.sleep(0)


class JumpingLoop(VirtualTimeLoop):
    """Virtual time that goes on by itself: to the next timer, as soon as nothing else can run.

    What is given to threads is done at once, so that the same program always runs alike. A program
    for which nothing can ever happen again ends with `Stuck`.
    """

    def __init__(self) -> None:
        super().__init__(_Jumps(self))
        self.set_default_executor(AtOnce())

    def jump(self, seconds: float) -> None:
        """Nothing can run before that."""
        self._now_s += seconds


class _Jumps(selectors.DefaultSelector):
    """Asks what is there without waiting, and lets time jump where waiting was meant."""

    def __init__(self, loop: JumpingLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if not events and timeout is None:
            raise Stuck("nobody waits for anything that will happen")
        if not events and timeout:
            self._loop.jump(timeout)
        return events


class Stuck(AssertionError):
    """Tasks wait for what never comes."""


class AtOnce(ThreadPoolExecutor):
    """Runs what it is given before it returns."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - it belongs to whoever waits for the future
            future.set_exception(error)
        return future


def run_in_virtual_time(work: Coroutine[Any, Any, Any]) -> Any:
    """As `asyncio.run`, without waiting for any time to pass."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(work)
