"""Which calls of a step may be made: those that somebody has approved, and those that need nobody.

Executes nothing. All methods on the daemon's loop.
"""

import asyncio
from collections.abc import Callable

from edge_agent.core import TextPart, ToolCall, ToolResult
from edge_agent.errors import FailedPrecondition, NotFound
from edge_agent.events import ApprovalDecided, ApprovalRequested
from edge_agent.runs import history
from edge_agent.runs.live import LiveRun


class Approvals:
    """Those of one run."""

    def __init__(self, live: LiveRun, deny: Callable[[int, ToolCall, ToolResult], None]) -> None:
        """Nobody is asked yet. `deny` closes a call of a step with the result that it gets."""
        self._live = live
        self._deny = deny
        self._asked: dict[str, asyncio.Future[ApprovalDecided]] = {}

    def decide(self, call_id: str, *, approved: bool, client: str, reason: str) -> None:
        """Approve or deny a call that waits for it.

        Raises:
            NotFound: reason TOOL_CALL_NOT_FOUND.
            FailedPrecondition: reason TOOL_CALL_NOT_WAITING, it does not wait for approval.
        """
        metadata = {"run_id": self._live.id, "tool_call_id": call_id}
        waiting = self._asked.pop(call_id, None)
        if waiting is None:
            if history.call_of(self._live.run, call_id) is None:
                message = f"tool_call_id: run {self._live.id} made no call {call_id!r}"
                raise NotFound(message, reason="TOOL_CALL_NOT_FOUND", metadata=metadata)
            message = f"tool_call_id: {call_id!r} does not wait for approval"
            raise FailedPrecondition(message, reason="TOOL_CALL_NOT_WAITING", metadata=metadata)
        decided = ApprovalDecided(call_id, approved, client, reason)
        self._live.emit(decided)
        waiting.set_result(decided)

    async def ask(self, step: int, calls: tuple[ToolCall, ...]) -> frozenset[str]:
        """Have these calls approved or denied; the ids of those that may be made."""
        futures = {call.id: asyncio.get_running_loop().create_future() for call in calls}
        self._asked.update(futures)
        self._live.emit(ApprovalRequested(step, calls))
        try:
            decided = [await futures[call.id] for call in calls]
        finally:
            for call in calls:
                self._asked.pop(call.id, None)
        for call, each in zip(calls, decided, strict=True):
            if not each.approved:
                why = f": {each.reason}" if each.reason else ""
                result = ToolResult(call.id, (TextPart(f"denied{why}"),), is_error=True)
                self._deny(step, call, result)
        return frozenset(each.tool_call_id for each in decided if each.approved)
