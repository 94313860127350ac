"""The Halt latch: what is stopped until somebody clears it. Survives restarts.

Acting comes first and is the caller's; this module decides what a Halt covers and keeps the
record. A record that can't be read means that everything is halted.
"""

import contextlib
import os
from pathlib import Path

import msgspec

from edge_agent.core import Halt, HaltScope
from edge_agent.errors import NotFound

UNREADABLE_ID = "unreadable"


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

    def latch(self, halt: Halt) -> None:
        """Latch in memory, at once. `record` comes after."""
        self._halts[halt.id] = halt

    def lift(self, halt_id: str) -> None:
        """Lift in memory. The caller has recorded the rest before."""
        self._halts.pop(halt_id, None)

    def record(self, halts: tuple[Halt, ...]) -> None:
        """Write these to disk, durably. Blocks.

        Raises:
            OSError: the file could not be written; the old one is intact.
        """
        partial = self._path.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(msgspec.json.encode(halts))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


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
