"""How commands speak: JSON of core values, errors with what to do next, the daemon's address.

Owns the words of hints. Everything heavy is imported by those who need it.
"""

import argparse
import sys
from typing import TYPE_CHECKING

import msgspec

from edge_agent.errors import EdgeAgentError

if TYPE_CHECKING:
    from edge_agent.client import Client

CLIENT_NAME = "edge-agent-cli"
_HINTS = {
    "ADMIN_SOCKET_REQUIRED": "call admin.sock: --socket admin",
    "CONFIG_INVALID": "correct the file; config.example.yaml shows every key",
    "DAEMON_UNREACHABLE": "start it with `edge-agent serve`, or name its socket with --socket",
    "ENGINE_NOT_FOUND": "`edge-agent engines list` shows what is installed",
    "SOCKET_FORBIDDEN": "call it as root, or become a member of the socket's group",
    "HALTED": "`edge-agent halt list` shows why, `edge-agent halt clear ID` lifts it",
}


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option that every command has."""
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def add_socket(parser: argparse.ArgumentParser) -> None:
    """Where the daemon is."""
    parser.add_argument(
        "--socket",
        metavar="PATH",
        help="the daemon's socket; `api` and `admin` stand for api.sock and admin.sock where the "
        "daemon usually is (default: $EDGE_AGENT_SOCKET, else api)",
    )


def connect(args: argparse.Namespace) -> "Client":
    """A client for the daemon that the command line names."""
    from pathlib import Path

    from edge_agent.client import Client, default_address

    address = args.socket
    if address in ("api", "admin"):
        address = str(Path(default_address()).with_name(f"{address}.sock"))
    return Client(address, name=CLIENT_NAME)


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
