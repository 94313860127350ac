"""One-to-many wake-up on an event loop. Owns no state that is waited for."""

import asyncio


class Wakeup:
    """Wakes everybody who waits, each time.

    Take `next()` before looking at the state, then await it: a change in between is not missed.
    """

    def __init__(self) -> None:
        """Nobody waits yet."""
        self._future: asyncio.Future[None] | None = None

    def next(self) -> "asyncio.Future[None]":
        """Done at the next `notify`. Shared: await it through `asyncio.shield` or `wait`."""
        if self._future is None or self._future.cancelled():
            self._future = asyncio.get_running_loop().create_future()
        return self._future

    def notify(self) -> None:
        """Wake all."""
        if self._future is not None and not self._future.done():
            self._future.set_result(None)
        self._future = None
