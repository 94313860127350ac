"""`edge-agent halt`: stop what runs may do, see what is halted, lift it."""

import argparse
import time

from edge_agent.cli.output import Subparsers, add_json, add_socket, connect, print_json
from edge_agent.core import Halt, HaltScope


def register(subparsers: Subparsers) -> None:
    """Add `halt` and what is below it."""
    parser = subparsers.add_parser(
        "halt",
        help="stop what runs may do, until cleared",
        description="A Halt acts at once and stays, over restarts too, until it is cleared. It is "
        "no emergency stop: it cuts no power.",
        epilog="example: edge-agent halt tool move_to --reason 'person in the aisle'",
    )
    actions = parser.add_subparsers(dest="action", metavar="WHAT", required=True)
    for scope, meaning in (
        (HaltScope.ALL, "every run"),
        (HaltScope.CLIENT, "the runs of one client"),
        (HaltScope.AGENT, "the runs of one agent"),
        (HaltScope.TOOL, "the calls of one tool"),
    ):
        command = actions.add_parser(scope.lower(), help=f"halt {meaning}")
        if scope is HaltScope.ALL:
            command.set_defaults(target="")
        else:
            command.add_argument("target", metavar="NAME")
        command.add_argument("--reason", default="", metavar="TEXT", help="why, for people")
        _finish(command, run_halt, scope=scope)
    _finish(actions.add_parser("list", help="what is halted"), run_list)
    clear = actions.add_parser("clear", help="lift a Halt; one of scope all needs --socket admin")
    clear.add_argument("halt_id", metavar="HALT_ID", help="as `edge-agent halt list` shows it")
    _finish(clear, run_clear)


def run_halt(args: argparse.Namespace) -> int:
    """Halt."""
    with connect(args) as client:
        outcome = client.halt(args.scope, args.target, args.reason)
    if args.json:
        print_json(outcome)
        return 0
    print(f"halted: {_line(outcome.halt)}; {outcome.runs_stopped} runs stopped")
    if not outcome.recorded:
        print("warning: it acts, but could not be written to disk: a restart would forget it")
    return 0


def run_list(args: argparse.Namespace) -> int:
    """Show the latched Halts."""
    with connect(args) as client:
        halts = client.status().halts
    if args.json:
        print_json(halts)
        return 0
    for halt in halts:
        print(_line(halt))
    if not halts:
        print("nothing is halted")
    return 0


def run_clear(args: argparse.Namespace) -> int:
    """Lift one."""
    with connect(args) as client:
        client.clear_halt(args.halt_id)
    if args.json:
        print_json({"cleared": args.halt_id})
    else:
        print(f"cleared: {args.halt_id}")
    return 0


def _finish(command: argparse.ArgumentParser, handler: object, **defaults: object) -> None:
    add_socket(command)
    add_json(command)
    command.set_defaults(handler=handler, **defaults)


def _line(halt: Halt) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(halt.created_at_s))
    what = f"{halt.scope.lower()} {halt.target}".strip()
    why = f": {halt.reason}" if halt.reason else ""
    return f"{halt.id}  {what}  by {halt.client} at {at}{why}"
