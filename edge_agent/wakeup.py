"""One-to-many wake-up on an event loop. Owns no state that is waited for."""

import asyncio


class Wakeup:
    """Wakes everybody who waits, each time.

    Take `next()` before looking at the state, then await it: a change in between is not missed.
    """

    def __init__(self) -> None:
        """Nobody waits yet."""
        self._waiting: list[asyncio.Future[None]] = []

    def next(self) -> "asyncio.Future[None]":
        """Done at the next `notify`. The caller's own: to cancel it disturbs nobody."""
        future = asyncio.get_running_loop().create_future()
        # Whoever gave up waiting must not add up until something changes.
        self._waiting = [waiting for waiting in self._waiting if not waiting.done()]
        self._waiting.append(future)
        return future

    def notify(self) -> None:
        """Wake all."""
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)
