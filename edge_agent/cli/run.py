"""`edge-agent run`: one run from the command line, with a person as the tools.

The answer goes to stdout, everything around it to stderr, so that the answer can be piped.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

from edge_agent.cli.output import add_json, add_socket, connect, print_error, print_json
from edge_agent.core import (
    CancelTool,
    Event,
    Run,
    RunState,
    StateChanged,
    TextDelta,
    TextPart,
    ToolCallsIssued,
    ToolResultAccepted,
)
from edge_agent.errors import EdgeAgentError
from edge_agent.units import parse_duration

Subparsers = argparse._SubParsersAction  # noqa: SLF001 - argparse has no public name for it


def register(subparsers: "Subparsers[argparse.ArgumentParser]") -> None:
    """Add `run`."""
    parser = subparsers.add_parser(
        "run",
        help="run an agent with a goal in plain words",
        description="Starts a run and follows it. Where the model calls a tool, the tools file's "
        "fixed result is returned, or you are asked for one.",
        epilog="example: edge-agent run 'Turn on the lamp in the hall' --tools tools.yaml",
    )
    parser.add_argument("goal", help="what is wanted, in plain words")
    parser.add_argument("--engine", default="", metavar="NAME", help="default: the daemon's")
    parser.add_argument(
        "--tools",
        type=Path,
        metavar="FILE",
        help="a YAML list of {name, description, input_schema, examples, result}",
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions above the conversation")
    parser.add_argument("--max-steps", type=int, metavar="N", help="default: the daemon's")
    parser.add_argument(
        "--timeout", type=_duration, metavar="TIME", help="such as 30s; default: the daemon's"
    )
    parser.add_argument(
        "--no-stream", action="store_true", help="print only the answer, at its end"
    )
    add_socket(parser)
    add_json(parser)
    parser.set_defaults(handler=run_run)


def run_run(args: argparse.Namespace) -> int:
    """Carry the run to its end; 0 if it ended with an answer."""
    from edge_agent.api.convert_client import RunOptions
    from edge_agent.cli.tools_file import load_tools

    options = RunOptions(engine=args.engine, agent="edge-agent run")
    if args.system is not None:
        options["system"] = args.system
    if args.max_steps is not None:
        options["max_steps"] = args.max_steps
    if args.timeout is not None:
        options["timeout_s"] = args.timeout
    tools = {}
    for tool, result in load_tools(args.tools) if args.tools else ():
        execute = functools.partial(_ask, tool.name) if result is None else _fixed(result)
        tools[tool.name] = (tool, execute)
    printer = _Printer(as_json=args.json, stream=not args.no_stream)
    with connect(args) as client:
        run = client.run(args.goal, tools, printer.see, **options)
    return printer.end(run)


class _Printer:
    """Says what happens in a run while it happens."""

    def __init__(self, *, as_json: bool, stream: bool) -> None:
        self._as_json = as_json
        self._stream = stream
        self._streamed = ""  # of the step that is being decided
        self._step = 0
        self._in_line = False
        self._loading = False

    def see(self, event: Event) -> None:
        """Print one event."""
        if self._as_json:
            if self._stream:
                print_json({"type": type(event.body).__name__, **_event(event)})
        elif self._stream:
            self._tell(event)

    def end(self, run: Run) -> int:
        """Print the answer, where it was not streamed, or the error; returns the exit code."""
        if self._as_json:
            if not self._stream:
                print_json(run)
            return 0 if run.error is None else 1
        self._end_line()
        if run.error is not None:
            print_error(_as_raised(run), as_json=False)
            return 1
        if run.answer is not None and run.answer != self._streamed:
            print(run.answer)
        if self._stream:
            _note(_numbers(run))
        return 0

    def _tell(self, event: Event) -> None:
        body = event.body
        if isinstance(body, TextDelta):
            print(body.text, end="", flush=True)
            self._streamed = body.text if body.step != self._step else self._streamed + body.text
            self._step = body.step
            self._in_line = not self._streamed.endswith("\n")
            return
        self._end_line()
        if isinstance(body, StateChanged):
            self._tell_loading(body)
        elif isinstance(body, ToolCallsIssued):
            for call in body.tool_calls:
                _note(f"-> {call.name} {call.arguments_json}")
        elif isinstance(body, ToolResultAccepted):
            text = "".join(p.text for p in body.result.parts if isinstance(p, TextPart))
            _note(f"<- {'error: ' if body.result.is_error else ''}{text}")
        elif isinstance(body, CancelTool):
            _note(f"!! stop {body.tool_call_id}: {body.reason.message}")

    def _tell_loading(self, change: StateChanged) -> None:
        """One line that counts up on a terminal, one remark elsewhere."""
        if change.state is RunState.LOADING:
            if sys.stderr.isatty():
                percent = change.load_progress or 0.0
                print(f"\rloading the engine {percent:4.0%}", end="", file=sys.stderr, flush=True)
            elif not self._loading:
                _note("loading the engine")
            self._loading = True
        elif self._loading:
            self._loading = False
            if sys.stderr.isatty():
                _note("")

    def _end_line(self) -> None:
        if self._in_line:
            print(flush=True)
            self._in_line = False


def _event(event: Event) -> dict[str, object]:
    return {"run_id": event.run_id, "sequence": event.sequence, "body": event.body}


def _as_raised(run: Run) -> EdgeAgentError:
    """A run's error in the form in which commands print errors."""
    error = run.error
    if error is None:
        return EdgeAgentError(f"the run ended {run.state}")
    hint_s = 1.0 if error.retryable else None
    return EdgeAgentError(
        f"the run ended {run.state}: {error.message}",
        reason=error.reason,
        metadata=error.metadata,
        retry_after_s=hint_s,
    )


def _numbers(run: Run) -> str:
    usage = run.usage
    said = [f"{usage.completion_tokens} tokens in {run.steps} steps"]
    if usage.tokens_per_second is not None:
        said.append(f"{usage.tokens_per_second:.1f} tokens/s")
    if usage.ttft_ms is not None:
        said.append(f"first token after {usage.ttft_ms:.0f} ms")
    if usage.load_s:
        said.append(f"engine loaded in {usage.load_s:.1f} s")
    return ", ".join(said)


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


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _duration(value: str) -> float:
    try:
        return parse_duration(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{value!r}, {error}") from None
