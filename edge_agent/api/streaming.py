"""Writing streams towards callers that may be slow or gone.

Owns the bound on how long one write may block. Knows no message.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Self, TypeVar

from google.protobuf.message import Message

from edge_agent.api.errors import Context
from edge_agent.errors import Overloaded

T = TypeVar("T")


class StreamWriter:
    """Sends the messages of one stream, in a `with` block of the task that serves it.

    One timer watches all writes, since this runs for every token: when it is due it looks at the
    write that blocks then, and at nothing in between.
    """

    def __init__(self, context: Context, slow_reader_s: float) -> None:
        """A write that blocks longer than `slow_reader_s` is given up."""
        self._context = context
        self._slow_reader_s = slow_reader_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancels_before = 0
        self._blocked_since_s: float | None = None
        self._given_up = False

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        self._cancels_before = self._task.cancelling() if self._task else 0
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def write(self, message: Message) -> None:
        """Send one message.

        Raises:
            Overloaded: the caller did not make room for it in time.
        """
        self._blocked_since_s = self._loop.time()
        if self._timer is None:
            self._watch(self._blocked_since_s)
        try:
            await self._context.write(message)
        except asyncio.CancelledError:
            # As asyncio.timeout has it: somebody else's cancel goes on.
            if self._given_up and self._task and self._task.uncancel() <= self._cancels_before:
                raise self._slow_reader() from None
            raise
        finally:
            self._blocked_since_s = None

    def _watch(self, since_s: float) -> None:
        self._timer = self._loop.call_at(since_s + self._slow_reader_s, self._look)

    def _look(self) -> None:
        """Give up a write that has blocked for too long, or look again when it will have."""
        self._timer, since_s = None, self._blocked_since_s
        if since_s is None:  # the next write starts the timer again
            return
        if self._loop.time() < since_s + self._slow_reader_s:
            self._watch(since_s)
        elif self._task is not None:
            self._given_up = True
            self._task.cancel()

    def _slow_reader(self) -> Overloaded:
        seconds = self._slow_reader_s
        return Overloaded(
            f"nothing was read from this stream for {seconds:g} s (runs.slow_reader)",
            reason="SLOW_READER",
            metadata={"slow_reader_s": seconds},
        )


@asynccontextmanager
async def closing(items: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Ends a generator together with the block that reads it, however the block ends."""
    try:
        yield items
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()
