"""`edge-agent runs`: which runs there are, and what is decided about those that wait."""

import argparse
import itertools
import shutil
import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import Final

from edge_agent.cli.output import (
    Subparsers,
    add_json,
    add_socket,
    aligned,
    connect,
    connect_admin,
    cut,
    print_json,
    span,
)
from edge_agent.core import Message, Role, Run, RunState, TextPart

_HEAD: Final = ("RUN", "STATE", "STEPS", "AGE", "CLIENT")
_LEAST_CELLS: Final = 12
_SHOWN: Final = 50
_WHICH: Final = "as `edge-agent runs list` shows it"


def register(subparsers: Subparsers) -> None:
    """Add `runs` and what is below it."""
    parser = subparsers.add_parser(
        "runs",
        help="list runs; resume, cancel, say, approve, deny, resolve",
        description="Shows the newest runs, and decides about those that wait for somebody.",
        epilog="example: edge-agent runs list --state SUSPENDED",
    )
    actions = parser.add_subparsers(dest="action", metavar="WHAT", required=True)
    listing = actions.add_parser("list", help=f"the newest runs, {_SHOWN} at most")
    listing.add_argument(
        "--state",
        action="append",
        default=[],
        type=_state,
        metavar="STATE",
        help="only those in this state; may be given again",
    )
    _finish(listing, run_list)
    resume = actions.add_parser("resume", help="let a suspended run go on")
    resume.add_argument("run", metavar="RUN", help=_WHICH)
    resume.add_argument("--say", default="", metavar="TEXT", help="what has changed meanwhile")
    _finish(resume, run_resume)
    cancel = actions.add_parser("cancel", help="end a run")
    cancel.add_argument("run", metavar="RUN", help=_WHICH)
    _finish(cancel, run_cancel)
    say = actions.add_parser("say", help="say something to a run that goes on")
    say.add_argument("run", metavar="RUN", help=_WHICH)
    say.add_argument("text", metavar="TEXT", help="what its next step is to read")
    _finish(say, run_say)
    resolve = actions.add_parser("resolve", help="say what came of a call that nobody knew of")
    resolve.add_argument("run", metavar="RUN", help=_WHICH)
    resolve.add_argument("tool_call", metavar="TOOL_CALL", help="such as call-1")
    acted = resolve.add_mutually_exclusive_group(required=True)
    acted.add_argument("--acted", action="store_true", dest="acted", help="it did what it should")
    acted.add_argument("--not-acted", action="store_false", dest="acted", help="it did nothing")
    resolve.add_argument("--evidence", required=True, metavar="TEXT", help="how that is known")
    _finish(resolve, run_resolve, "admin")
    for name, approved in (("approve", True), ("deny", False)):
        decide = actions.add_parser(name, help=f"{name} a tool call that waits for it")
        decide.add_argument("run", metavar="RUN", help=_WHICH)
        decide.add_argument("tool_call", metavar="TOOL_CALL", help="such as call-1")
        decide.add_argument("--reason", default="", metavar="TEXT", help="why")
        _finish(decide, run_decide, "admin", approved=approved)


def run_list(args: argparse.Namespace) -> int:
    """Show the newest."""
    with connect(args) as client:
        runs = tuple(itertools.islice(client.list(args.state), _SHOWN))
    if args.json:
        print_json(runs)
        return 0
    for line in describe(runs, time.time(), shutil.get_terminal_size().columns):
        print(line)
    return 0


def describe(runs: Sequence[Run], now_s: float, columns: int) -> list[str]:
    """A row for each run, and below it what it waits for, or why it has no answer.

    `now_s` is Unix time; lines of at most `columns`, where that is enough for the ids.
    """
    if not runs:
        return ["no runs"]
    rows = [(*_row(run, now_s), run.client) for run in runs]
    *figures, _client = zip(_HEAD, *rows, strict=True)
    left = columns - sum(2 + max(map(len, column)) for column in figures)
    rows = [(*row[:-1], cut(row[-1], max(left, _LEAST_CELLS))) for row in rows]
    head, *lines = aligned([_HEAD, *rows])
    told = [head]
    for run, line in zip(runs, lines, strict=True):
        told.append(line)
        for why in _reasons(run):
            told += textwrap.wrap(
                why,
                max(columns, 2 * _LEAST_CELLS),
                initial_indent="  ",
                subsequent_indent="    ",
            )
    return told


def run_resume(args: argparse.Namespace) -> int:
    """Resume one."""
    said = (Message(Role.USER, (TextPart(args.say),)),) if args.say else ()
    with connect(args) as client:
        return _told(args, client.resume(args.run, said))


def run_say(args: argparse.Namespace) -> int:
    """Say something to one."""
    with connect(args) as client:
        return _told(args, client.append(args.run, (Message(Role.USER, (TextPart(args.text),)),)))


def run_resolve(args: argparse.Namespace) -> int:
    """Say what came of a call."""
    with connect_admin(args) as client:
        call = client.resolve(args.run, args.tool_call, acted=args.acted, evidence=args.evidence)
    if args.json:
        print_json(call)
    else:
        print(f"{call.tool} {call.call_id} of run {call.run_id}: {call.effect}")
    return 0


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


def _row(run: Run, now_s: float) -> tuple[str, ...]:
    return run.id, run.state.value, str(run.steps), span(max(0.0, now_s - run.created_at_s))


def _reasons(run: Run) -> Iterator[str]:
    for call in run.unapproved_tool_calls:
        yield f"{call.id} waits for approval: {call.name} {call.arguments_json}"
    if not run.state.ended:
        for call in run.open_tool_calls:
            yield f"{call.id} waits for its result: {call.name} {call.arguments_json}"
        for call in run.background_tool_calls:
            yield f"{call.id} goes on in the background: {call.name} {call.arguments_json}"
    if run.error is not None:
        yield f"{run.error.reason}: {run.error.message}"


def _state(text: str) -> RunState:
    try:
        return RunState[text.upper()]
    except KeyError:
        known = ", ".join(state for state in RunState if state is not RunState.UNSPECIFIED)
        raise argparse.ArgumentTypeError(f"{text!r} is no state: {known}") from None


def _finish(
    command: argparse.ArgumentParser, handler: object, socket: str = "api", **defaults: object
) -> None:
    add_socket(command, socket)
    add_json(command)
    command.set_defaults(handler=handler, **defaults)
