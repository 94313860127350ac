"""Halting: what a latched Halt stops, and its record on disk.

Acts first and records right after. What it covers, and how a run is stopped, is the owner's.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from edge_agent.core import Halt, HaltOutcome, HaltScope, RunError
from edge_agent.errors import FailedPrecondition
from edge_agent.runs.halts import HaltLatch

_RECORD_TIMEOUT_S = 1.0

log = structlog.get_logger()


def halted_by(halt: Halt) -> RunError:
    """Why a run that a Halt covers was stopped."""
    metadata = {"halt_id": halt.id, "scope": halt.scope.value}
    return RunError("HALTED", f"halted: {halt.reason or halt.scope}", metadata=metadata)


class Halting:
    """Latches, records and lifts Halts."""

    def __init__(self, latch: HaltLatch, stop_covered: Callable[[Halt, RunError], int]) -> None:
        """`stop_covered` stops the runs that a Halt covers, at once, and returns how many."""
        self._latch = latch
        self._stop_covered = stop_covered
        self._recording = asyncio.Lock()
        self._going_on: set[asyncio.Task[None]] = set()

    async def halt(self, scope: HaltScope, target: str, reason: str, client: str) -> HaltOutcome:
        """Latch a Halt: first stop what it covers, then write it to disk.

        It is never refused; what is latched may cover more than was asked (`HaltLatch.latch`).
        """
        asked = Halt(uuid.uuid4().hex, scope, target, reason, client, time.time())
        halt = self._latch.latch(asked)
        stopped = self._stop_covered(halt, halted_by(halt))
        log.warning(
            "halt_latched",
            halt=halt.id,
            scope=halt.scope.value,
            target=halt.target,
            asked=f"{scope} {target}".rstrip(),
            stopped=stopped,
        )
        try:
            await asyncio.wait_for(self._whatever_happens(self._record(halt)), _RECORD_TIMEOUT_S)
        except TimeoutError:
            log.error("halt_record_late", halt=halt.id, waited_s=_RECORD_TIMEOUT_S)
            return HaltOutcome(halt, stopped, recorded=False)
        except OSError:
            return HaltOutcome(halt, stopped, recorded=False)
        return HaltOutcome(halt, stopped, recorded=True)

    async def clear(self, halt_id: str) -> None:
        """Lift a Halt once that is on disk.

        Raises:
            NotFound: none has this id.
            FailedPrecondition: reason HALT_NOT_RECORDED, the disk refused; it stays latched.
        """
        halt = self._latch.get(halt_id)
        try:
            await self._whatever_happens(self._record(halt, lift=True))
        except OSError as error:
            message = f"halt {halt_id} stays latched: {error.strerror}"
            raise FailedPrecondition(
                message, reason="HALT_NOT_RECORDED", metadata={"halt_id": halt_id}
            ) from error
        log.warning("halt_cleared", halt=halt_id)

    async def _record(self, halt: Halt, *, lift: bool = False) -> None:
        """Write the latch to disk, without this Halt if it is lifted; then it is."""
        async with self._recording:
            halts = tuple(each for each in self._latch.halts() if not lift or each is not halt)
            try:
                await asyncio.to_thread(self._latch.record, halts)
            except OSError as error:
                log.error("halt_not_recorded", halt=halt.id, error=str(error))
                raise
            if lift:
                self._latch.lift(halt)

    async def _whatever_happens(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for something that goes on when its caller is gone or waits no longer."""
        task = asyncio.create_task(work)
        self._going_on.add(task)
        task.add_done_callback(self._went_on)
        await asyncio.shield(task)

    def _went_on(self, task: "asyncio.Task[None]") -> None:
        self._going_on.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved here: nobody may wait for it any more
