"""The Halt latch: what is stopped until somebody clears it. Survives restarts.

Acting comes first and is the caller's; this module decides what a Halt covers and keeps the
record. A record that can't be read means that everything is halted, and so does one Halt more than
the latch holds: a Halt is never refused.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Final

import msgspec

from edge_agent import durable
from edge_agent.core import Halt, HaltScope
from edge_agent.errors import NotFound

UNREADABLE_ID = "unreadable"
MAX_HALTS: Final = 1000
"""Far more than people latch. All are looked at for each run and call, and written at each Halt."""


class HaltLatch:
    """The latched Halts and their file."""

    def __init__(self, path: Path) -> None:
        """Read `path`; a missing file means no Halt, an unreadable one means ALL."""
        self._path = path
        self._halts: dict[str, Halt] = {halt.id: halt for halt in _read(path)}

    def halts(self) -> tuple[Halt, ...]:
        """All latched, oldest first."""
        return tuple(self._halts.values())

    def get(self, halt_id: str) -> Halt:
        """One latched Halt.

        Raises:
            NotFound: none has this id.
        """
        try:
            return self._halts[halt_id]
        except KeyError:
            message = f"halt_id: {halt_id!r} is not latched"
            raise NotFound(message, metadata={"halt_id": halt_id}) from None

    def covering_run(self, client: str, agent: str) -> Halt | None:
        """A Halt that stops this client's or agent's runs, if any."""
        return next((h for h in self._halts.values() if covers_run(h, client, agent)), None)

    def covering_tool(self, tool: str) -> Halt | None:
        """A Halt that stops calls of this tool, if any."""
        return next((h for h in self._halts.values() if covers_tool(h, tool)), None)

    def latch(self, halt: Halt) -> Halt:
        """Latch in memory, at once. `record` comes after.

        Each is latched by itself, so that nobody lifts what somebody else wants halted too. Above
        MAX_HALTS it is one that covers at least as much: the latched one of the same scope and
        target, else the latched one of ALL, else this one as ALL.

        Returns:
            What is latched.
        """
        if len(self._halts) >= MAX_HALTS:
            halt = self._above_the_limit(halt)
        self._halts[halt.id] = halt
        return halt

    def lift(self, halt: Halt) -> None:
        """Lift in memory, unless it has been latched again. The rest has been recorded before."""
        if self._halts.get(halt.id) is halt:
            del self._halts[halt.id]

    def _above_the_limit(self, halt: Halt) -> Halt:
        latched = self._halts.values()
        for scope, target in ((halt.scope, halt.target), (HaltScope.ALL, "")):
            for each in latched:
                if (each.scope, each.target) == (scope, target):
                    return dataclasses.replace(each)  # not the same one to a lift on its way
        if halt.scope is HaltScope.ALL:
            return halt
        why = f": {halt.reason}" if halt.reason else ""
        reason = f"{len(latched)} Halts latched: {halt.scope} {halt.target!r} became ALL{why}"
        return dataclasses.replace(halt, scope=HaltScope.ALL, target="", reason=reason)

    def record(self, halts: tuple[Halt, ...]) -> None:
        """Write these to disk, durably. Blocks.

        Raises:
            OSError: the file could not be written; the old one is intact.
        """
        durable.replace(self._path, msgspec.json.encode(halts))


def covers_run(halt: Halt, client: str, agent: str) -> bool:
    """Whether this Halt stops runs of this client and agent."""
    match halt.scope:
        case HaltScope.ALL:
            return True
        case HaltScope.CLIENT:
            return halt.target == client
        case HaltScope.AGENT:
            return halt.target == agent
        case HaltScope.TOOL:
            return False


def covers_tool(halt: Halt, tool: str) -> bool:
    """Whether this Halt stops calls of this tool."""
    return halt.scope is HaltScope.ALL or (halt.scope is HaltScope.TOOL and halt.target == tool)


def _read(path: Path) -> tuple[Halt, ...]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=tuple[Halt, ...])
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.DecodeError) as error:
        changed_s = 0.0
        with contextlib.suppress(OSError):
            changed_s = path.stat().st_mtime
        reason = f"{path.name} can't be read: {error}"
        return (Halt(UNREADABLE_ID, HaltScope.ALL, "", reason, "edge-agent", changed_s),)
