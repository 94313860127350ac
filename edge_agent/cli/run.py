"""`edge-agent run`: a goal, or a conversation, with a person or fixed results as the tools."""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edge_agent.cli.output import Subparsers, add_json, add_socket, connect, duration_s
from edge_agent.cli.run_printer import RunPrinter, note
from edge_agent.core import Message, Priority, Role, TextPart, ToolStrategy

if TYPE_CHECKING:
    from edge_agent.client import Client, RunOptions, Tools


def register(subparsers: Subparsers) -> None:
    """Add `run`."""
    parser = subparsers.add_parser(
        "run",
        help="run an agent with a goal in plain words",
        description="Starts a run and follows it; without a goal, a conversation in which each "
        "line is the next goal. Where the model calls a tool, the tools file's fixed result is "
        "returned, or you are asked for one.",
        epilog="example: edge-agent run 'Turn on the lamp in the hall' --tools tools.yaml",
    )
    parser.add_argument("goal", nargs="?", help="what is wanted, in plain words")
    parser.add_argument("--engine", default="", metavar="NAME", help="default: the daemon's")
    parser.add_argument(
        "--tools",
        type=Path,
        metavar="FILE",
        help="a YAML list of {name, description, input_schema, examples, result, side_effect, "
        "needs_approval, resources, verify}, or {name, executor: DAEMON} for one of the daemon's",
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions above the conversation")
    parser.add_argument("--max-steps", type=int, metavar="N", help="default: the daemon's")
    parser.add_argument(
        "--timeout", type=duration_s, metavar="TIME", help="such as 30s; default: the daemon's"
    )
    parser.add_argument(
        "--priority",
        choices=[priority.lower() for priority in Priority],
        help="how soon it goes among all runs; batch: whenever there is time (default: normal)",
    )
    parser.add_argument(
        "--tool-strategy",
        choices=[strategy.value for strategy in ToolStrategy],
        help="how the model chooses among tools (default: the engine's)",
    )
    parser.add_argument(
        "--durable",
        action=argparse.BooleanOptionalAction,
        help="whether it survives a restart of the daemon (default: the daemon's)",
    )
    parser.add_argument(
        "--no-stream", action="store_true", help="print only the answer, at its end"
    )
    add_socket(parser)
    add_json(parser)
    parser.set_defaults(handler=run_run)


def run_run(args: argparse.Namespace) -> int:
    """Carry the run, or every run of a conversation, to its end; 0 if all ended with an answer."""
    tools, options = _tools(args.tools), _options(args)
    with connect(args) as client:
        if args.goal is not None:
            printer = RunPrinter(as_json=args.json, stream=not args.no_stream)
            with printer.cut_off():
                return printer.end(client.run(args.goal, tools, printer.see, **options))
        return _converse(client, tools, options, args)


def _converse(
    client: "Client", tools: "Tools", options: "RunOptions", args: argparse.Namespace
) -> int:
    """One run a line, each with all that was said before; a failed one is not part of it."""
    said: list[Message] = []
    code = 0
    for line in _lines():
        goal = Message(Role.USER, (TextPart(line),))
        printer = RunPrinter(as_json=args.json, stream=not args.no_stream)
        try:
            with printer.cut_off():
                run = client.run([*said, goal], tools, printer.see, **options)
        except KeyboardInterrupt:  # leaves the run, not the conversation
            note("\ncancelled")
            continue
        failed = printer.end(run)
        code = code or failed
        if not failed:
            said += [goal, *run.transcript]
    return code


def _lines() -> Iterator[str]:
    """What the person types, with line editing, until the end of input; or what is piped in."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    import readline  # noqa: F401 - editing and history for input()

    note("Say what is wanted. Ctrl-C cancels a run, Ctrl-D ends.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            note("")
            return
        if line:
            yield line


def _options(args: argparse.Namespace) -> "RunOptions":
    from edge_agent.client import RunOptions

    options = RunOptions(engine=args.engine, agent="edge-agent run")
    if args.system is not None:
        options["system"] = args.system
    if args.max_steps is not None:
        options["max_steps"] = args.max_steps
    if args.timeout is not None:
        options["timeout_s"] = args.timeout
    if args.priority is not None:
        options["priority"] = Priority[args.priority.upper()]
    if args.tool_strategy is not None:
        options["tool_strategy"] = ToolStrategy(args.tool_strategy)
    if args.durable is not None:
        options["durable"] = args.durable
    return options


def _tools(path: Path | None) -> "Tools":
    from edge_agent.cli.tools_file import load_tools

    return {
        tool.name: (tool, functools.partial(_ask, tool.name) if result is None else _fixed(result))
        for tool, result in (load_tools(path) if path else ())
    }


def _fixed(result: str) -> Callable[..., str]:
    return lambda **_: result


def _ask(name: str, **arguments: object) -> str:
    """The person at the terminal is the tool."""
    if not sys.stdin.isatty():
        raise RuntimeError("nobody is at the terminal, and the tools file gives no result")
    print(
        f"   {name}({json.dumps(arguments, ensure_ascii=False)}) returns: ",
        end="",
        file=sys.stderr,
        flush=True,
    )
    return input()
