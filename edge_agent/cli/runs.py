"""`edge-agent runs`: which runs there are, and what is decided about those that wait."""

import argparse
import itertools
import time

from edge_agent.cli.output import (
    Subparsers,
    add_json,
    add_socket,
    aligned,
    connect,
    connect_admin,
    print_json,
)
from edge_agent.core import Message, Role, Run, RunState, TextPart

_HEAD = ("RUN", "STATE", "CLIENT", "ENGINE", "STEPS", "CREATED", "WHY")
_SHOWN = 50


def register(subparsers: Subparsers) -> None:
    """Add `runs` and what is below it."""
    parser = subparsers.add_parser(
        "runs",
        help="list runs; resume, cancel, approve, deny",
        description="Shows the newest runs, and decides about those that wait for somebody.",
        epilog="example: edge-agent runs resume 1f3870be --say 'the door is open now'",
    )
    actions = parser.add_subparsers(dest="action", metavar="WHAT", required=True)
    listing = actions.add_parser("list", help="the newest runs")
    listing.add_argument("--state", action="append", default=[], type=_state, metavar="STATE")
    _finish(listing, run_list)
    resume = actions.add_parser("resume", help="let a suspended run go on")
    resume.add_argument("run", metavar="RUN")
    resume.add_argument("--say", default="", metavar="TEXT", help="what has changed meanwhile")
    _finish(resume, run_resume)
    cancel = actions.add_parser("cancel", help="end a run")
    cancel.add_argument("run", metavar="RUN")
    _finish(cancel, run_cancel)
    for name, approved in (("approve", True), ("deny", False)):
        decide = actions.add_parser(name, help=f"{name} a tool call that waits for it")
        decide.add_argument("run", metavar="RUN")
        decide.add_argument("tool_call", metavar="TOOL_CALL", help="such as call-1")
        decide.add_argument("--reason", default="", metavar="TEXT", help="why")
        _finish(decide, run_decide, approved=approved)


def run_list(args: argparse.Namespace) -> int:
    """Show the newest."""
    with connect(args) as client:
        runs = tuple(itertools.islice(client.list(args.state), _SHOWN))
    if args.json:
        print_json(runs)
        return 0
    for line in aligned([_HEAD, *map(_row, runs)]) if runs else ["no runs"]:
        print(line)
    return 0


def run_resume(args: argparse.Namespace) -> int:
    """Resume one."""
    said = (Message(Role.USER, (TextPart(args.say),)),) if args.say else ()
    with connect(args) as client:
        return _told(args, client.resume(args.run, said))


def run_cancel(args: argparse.Namespace) -> int:
    """Cancel one."""
    with connect(args) as client:
        return _told(args, client.cancel(args.run))


def run_decide(args: argparse.Namespace) -> int:
    """Approve or deny a call."""
    with connect_admin(args) as client:
        run = client.decide_tool_call(
            args.run, args.tool_call, approved=args.approved, reason=args.reason
        )
    return _told(args, run)


def _told(args: argparse.Namespace, run: Run) -> int:
    if args.json:
        print_json(run)
    else:
        print(f"run {run.id}: {run.state}")
    return 0


def _row(run: Run) -> tuple[str, ...]:
    created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.created_at_s))
    why = run.error.reason if run.error else ""
    if run.unapproved_tool_calls:
        why = ", ".join(f"{call.name} {call.id}" for call in run.unapproved_tool_calls)
    return run.id, run.state.value, run.client, run.engine, str(run.steps), created, why


def _state(text: str) -> RunState:
    try:
        return RunState[text.upper()]
    except KeyError:
        known = ", ".join(state for state in RunState if state is not RunState.UNSPECIFIED)
        raise argparse.ArgumentTypeError(f"{text!r} is no state: {known}") from None


def _finish(command: argparse.ArgumentParser, handler: object, **defaults: object) -> None:
    add_socket(command)
    add_json(command)
    command.set_defaults(handler=handler, **defaults)
