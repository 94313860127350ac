"""An event loop whose clock only its test turns: timeouts pass without waiting."""

import asyncio
from collections.abc import Coroutine
from typing import Any


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Timers follow `advance`; files and threads are real."""

    def __init__(self) -> None:
        super().__init__()
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
