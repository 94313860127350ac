"""Writing streams towards callers that may be slow or gone.

Owns the bound on how long one write may block. Knows no message.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from google.protobuf.message import Message

from edge_agent.api.errors import Context
from edge_agent.errors import Overloaded

T = TypeVar("T")


async def write(context: Context, message: Message, slow_reader_s: float) -> None:
    """Send one message.

    Raises:
        Overloaded: the caller did not make room for it in `slow_reader_s`.
    """
    try:
        async with asyncio.timeout(slow_reader_s):
            await context.write(message)
    except TimeoutError as error:
        raise Overloaded(
            f"nothing was read from this stream for {slow_reader_s:g} s (runs.slow_reader)",
            reason="SLOW_READER",
            metadata={"slow_reader_s": slow_reader_s},
        ) from error


@asynccontextmanager
async def closing(items: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Ends a generator together with the block that reads it, however the block ends."""
    try:
        yield items
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()
