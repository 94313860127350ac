"""`edge-agent sessions`: what runs remember of one another, shown and deleted."""

import argparse
import time
from collections.abc import Sequence
from typing import Final

from edge_agent.cli.output import (
    Subparsers,
    add_json,
    add_socket,
    aligned,
    connect_admin,
    print_json,
    span,
)
from edge_agent.core import Message, Session

_HEAD: Final = ("CLIENT", "SESSION", "RUNS", "USED", "TOO LONG", "RUN")


def register(subparsers: Subparsers) -> None:
    """Add `sessions` and what is below it."""
    parser = subparsers.add_parser(
        "sessions",
        help="list sessions; show or delete one",
        description="Shows what runs of a session remember of one another, and deletes it.",
        epilog="example: edge-agent sessions show my-robot patrol",
    )
    actions = parser.add_subparsers(dest="action", metavar="WHAT", required=True)
    listing = actions.add_parser("list", help="all clients' sessions, the one used last first")
    _finish(listing, session_list)
    for name, handler, what in (
        ("show", session_show, "show a session's history"),
        ("delete", session_delete, "delete a session with its history"),
    ):
        action = actions.add_parser(name, help=what)
        action.add_argument("client", metavar="CLIENT", help="whose it is")
        action.add_argument("session", metavar="SESSION", help="its client's name for it")
        _finish(action, handler)


def session_list(args: argparse.Namespace) -> int:
    """Show all."""
    with connect_admin(args) as client:
        sessions = client.sessions()
    if args.json:
        print_json(sessions)
        return 0
    for line in describe(sessions, time.time()):
        print(line)
    return 0


def describe(sessions: Sequence[Session], now_s: float) -> list[str]:
    """A row for each session; `now_s` is Unix time."""
    if not sessions:
        return ["no sessions"]
    rows = [
        (
            each.client,
            each.id,
            str(each.runs),
            span(max(0.0, now_s - each.used_at_s)),
            each.overflow.value,
            each.run_id or "-",
        )
        for each in sessions
    ]
    return list(aligned([_HEAD, *rows]))


def session_show(args: argparse.Namespace) -> int:
    """Show the history of one."""
    with connect_admin(args) as client:
        session = client.session(args.session, client=args.client)
    if args.json:
        print_json(session)
        return 0
    for message in session.messages:
        print(_told(message))
    return 0


def session_delete(args: argparse.Namespace) -> int:
    """Delete one."""
    with connect_admin(args) as client:
        client.delete_session(args.session, client=args.client)
    if args.json:
        print_json({"client": args.client, "session": args.session, "deleted": True})
    else:
        print(f"session {args.session} of {args.client}: deleted")
    return 0


def _told(message: Message) -> str:
    who = "summary" if message.is_summary else message.role.value
    said = [message.text] if message.text else []
    said += [f"{call.name} {call.arguments_json}" for call in message.tool_calls]
    return f"{who:10} {', '.join(said)}"


def _finish(parser: argparse.ArgumentParser, handler: object) -> None:
    add_socket(parser, "admin")
    add_json(parser)
    parser.set_defaults(handler=handler)
