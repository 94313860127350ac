"""What commands share: their options, JSON of core values, tables, errors with what to do next.

Owns the words of hints. Everything heavy is imported by those who need it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from edge_agent.errors import EdgeAgentError
from edge_agent.units import parse_duration

if TYPE_CHECKING:
    from edge_agent.client import Client

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001
"""What commands register with; argparse has no public name for it."""
CLIENT_NAME = "edge-agent-cli"
_DEFAULT_SOCKETS = {
    "api": "$EDGE_AGENT_SOCKET, else api",
    "admin": "admin.sock beside $EDGE_AGENT_SOCKET, else admin",
}
_HINTS = {
    "ADMIN_SOCKET_REQUIRED": "call admin.sock: --socket admin",
    "CONFIG_INVALID": "correct the file; config.example.yaml shows every key",
    "DAEMON_UNREACHABLE": "start it with `edge-agent serve`, or name its socket with --socket",
    "ENGINE_NOT_FOUND": "`edge-agent engines list` shows what is installed",
    "RUN_NOT_FOUND": "`edge-agent runs list` shows which there are",
    "RUN_NOT_SUSPENDED": "`edge-agent runs list --state SUSPENDED` shows which are",
    "TOOL_CALL_NOT_FOUND": "`edge-agent runs list --state WAITING_APPROVAL` shows what waits",
    "TOOL_CALL_NOT_WAITING": "`edge-agent runs list --state WAITING_APPROVAL` shows what waits",
    "TOOL_CALLS_OPEN": "whoever executes the tools submits their results; "
    "`edge-agent runs cancel RUN` gives the run up",
    "DEADLINE_PASSED": "`edge-agent explain` shows what waits, and why",
    "OVERLOADED": "`edge-agent explain` shows what waits, and why",
    "SOCKET_FORBIDDEN": "call it as root, or become a member of the socket's group",
    "HALTED": "`edge-agent halt list` shows why, `edge-agent halt clear ID` lifts it",
}


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option of every command that has something to tell programs."""
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def add_socket(parser: argparse.ArgumentParser, default: str = "api") -> None:
    """Where the daemon is; `default` is only told."""
    parser.add_argument(
        "--socket",
        metavar="PATH",
        help="the daemon's socket; `api` and `admin` stand for api.sock and admin.sock where the "
        f"daemon usually is (default: {_DEFAULT_SOCKETS[default]})",
    )


def connect(args: argparse.Namespace) -> "Client":
    """A client for the daemon that the command line names."""
    from edge_agent.client import Client, default_address

    address = args.socket
    if address in ("api", "admin"):
        address = str(Path(default_address()).with_name(f"{address}.sock"))
    return Client(address, name=CLIENT_NAME)


def connect_admin(args: argparse.Namespace) -> "Client":
    """A client for what only admin.sock serves: beside the usual socket, unless one is named."""
    from edge_agent.client import Client, default_address

    if args.socket is not None:
        return connect(args)
    return Client(str(Path(default_address()).with_name("admin.sock")), name=CLIENT_NAME)


def absolute(value: str) -> Path:
    """A path on the command line, whatever becomes of the working directory."""
    return Path(value).absolute()


def duration_s(value: str) -> float:
    """A duration on the command line, in seconds."""
    try:
        return parse_duration(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{value!r}, {error}") from None


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def span(seconds: float) -> str:
    """A span of time for people, in its two largest units."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m {rest}s" if minutes else f"{rest}s"


def cut(text: str, cells: int) -> str:
    """At most so many cells; what is cut ends in an ellipsis."""
    return text if len(text) <= cells else text[: max(cells, 1) - 1] + "…"


def print_json(value: object) -> None:
    """One line of JSON on stdout."""
    print(msgspec.json.encode(value).decode(), flush=True)


def print_error(error: EdgeAgentError, *, as_json: bool) -> None:
    """Say on stderr what went wrong and what to do next."""
    hint = _hint(error)
    if as_json:
        fields = {
            "reason": error.reason,
            "message": error.message,
            "metadata": error.metadata,
            "violations": error.violations,
            "hint": hint,
        }
        print(msgspec.json.encode({"error": fields}).decode(), file=sys.stderr)
        return
    print(f"error: {error.message}", file=sys.stderr)
    for violation in error.violations:
        line = f"{violation.field}: {violation.description}"
        if violation.description not in error.message:
            print(f"  {line}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def _hint(error: EdgeAgentError) -> str | None:
    if error.reason in _HINTS:
        return _HINTS[error.reason]
    if error.retry_after_s is not None:
        return f"try again in {error.retry_after_s:g} s"
    return "try again" if error.retryable else None
