"""Lets tool calls wait for the resources that they use. All methods on the daemon's loop.

`holds` decides; this hands its decisions to whoever waits, and says on the log who is refused.
"""

import asyncio
from collections.abc import Iterable

import structlog

from edge_agent.core import Fence
from edge_agent.errors import ResourceHeld
from edge_agent.runs.holds import Granted, Holder, Holding, Holds, Refused

log = structlog.get_logger()


class Resources:
    """The resources of one robot."""

    def __init__(self, epoch: int = 0) -> None:
        """Nobody has anything. `epoch` is higher than that of any daemon before."""
        self._holds = Holds(epoch)
        self._waiting: dict[tuple[str, str], asyncio.Future[Granted | Refused]] = {}

    async def acquire(self, holder: Holder, resources: Iterable[str]) -> Fence:
        """Wait until the call may have them; it has them from then on, until `release`.

        To cancel this withdraws the call.

        Raises:
            ResourceHeld: somebody has one for as long as it likes.
        """
        decision = self._holds.ask(holder, resources)
        if not isinstance(decision, Granted | Refused):
            decision = await self._wait(holder)
        if isinstance(decision, Refused):
            raise _held(holder, decision)
        return decision.fence

    def retake(self, holder: Holder, resources: Iterable[str]) -> None:
        """What a call had before a restart."""
        self._holds.retake(holder, resources)

    def change(self, run_id: str, call_id: str, holding: Holding) -> None:
        """The call goes on in the background, or nobody knows whether it does."""
        self._tell(self._holds.change(run_id, call_id, holding))

    def release(self, run_id: str, call_id: str) -> None:
        """The call needs nothing any more; nothing where it had nothing."""
        self._tell(self._holds.release(run_id, call_id))

    def holders(self) -> dict[str, Holder]:
        """Who has what, by resource."""
        return self._holds.holders()

    async def _wait(self, holder: Holder) -> Granted | Refused:
        future: asyncio.Future[Granted | Refused] = asyncio.get_running_loop().create_future()
        self._waiting[holder.key] = future
        try:
            return await future
        except asyncio.CancelledError:
            # Its turn may have come while it was cancelled: then it is given back.
            self._tell(self._holds.withdraw(*holder.key))
            if future.done() and not future.cancelled() and isinstance(future.result(), Granted):
                self.release(*holder.key)
            raise
        finally:
            self._waiting.pop(holder.key, None)

    def _tell(self, decisions: Iterable[tuple[Holder, Granted | Refused]]) -> None:
        for holder, decision in decisions:
            future = self._waiting.get(holder.key)
            if future is not None and not future.done():
                future.set_result(decision)


def _held(asking: Holder, refused: Refused) -> ResourceHeld:
    holder = refused.holder
    log.info(
        "hold_refused",
        run=asking.run_id,
        tool=asking.tool,
        resource=refused.resource,
        holder_run=holder.run_id,
        holder_tool=holder.tool,
        holding=holder.holding.value,
    )
    what = {
        Holding.BACKGROUND: "goes on in the background",
        Holding.UNKNOWN: "may still act: ResolveOutcome says what came of it",
    }[holder.holding]
    return ResourceHeld(
        f"{refused.resource} is held by {holder.tool} ({holder.call_id} of run {holder.run_id}, "
        f"client {holder.client}), which {what}",
        metadata={
            "resource": refused.resource,
            "holder_run_id": holder.run_id,
            "holder_tool_call_id": holder.call_id,
            "holder_tool": holder.tool,
            "holder_client": holder.client,
            "holder_agent": holder.agent,
            "holding": holder.holding,
        },
    )
