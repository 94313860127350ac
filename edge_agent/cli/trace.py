"""`edge-agent trace RUN`: what is on record of a run's steps and tool calls, as a timeline."""

import argparse
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from edge_agent.cli.output import Subparsers, add_json, add_socket, aligned, connect, print_json
from edge_agent.cli.run_printer import counted_steps
from edge_agent.core import Run
from edge_agent.errors import NotFound
from edge_agent.records import CallRecord, StepRecord

if TYPE_CHECKING:
    from edge_agent.client import Client

_HEAD: Final = ("AT", "TOOK", "QUEUE", "LOAD", "TTFT", "TOKENS", "CACHED", "WHAT")
_LEAST_CELLS: Final = 12


def register(subparsers: Subparsers) -> None:
    """Add `trace`."""
    parser = subparsers.add_parser(
        "trace",
        help="what a run did, step by step",
        description="Shows each step and tool call of a run, in the order in which they "
        "began: when, for how long, and how it ended. --json gives everything that is on record.",
        epilog="example: edge-agent trace 1f3870be274f6c49b3e31a0c6728957f",
    )
    parser.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        help="as `edge-agent runs list` shows it; default: the newest",
    )
    add_socket(parser)
    add_json(parser)
    parser.set_defaults(handler=run_trace)


def run_trace(args: argparse.Namespace) -> int:
    """Show the records."""
    with connect(args) as client:
        run_id = args.run or _newest(client)
        steps, calls = client.trace(run_id)
        run = _run(client, run_id)
    if args.json:
        print_json({"run": run, "steps": steps, "tool_calls": calls})
        return 0
    for line in describe(run, steps, calls, shutil.get_terminal_size().columns):
        print(line)
    return 0


def describe(
    run: Run | None, steps: Sequence[StepRecord], calls: Sequence[CallRecord], columns: int
) -> list[str]:
    """The run, and a row for each step and tool call in the order of their beginning.

    `run` None: only its records are left. Times count from its creation, or else from the first
    record. Lines of at most `columns`, where that is enough for the figures.
    """
    timed = [(step.started_at_s, _step(step)) for step in steps]
    timed += [(call.issued_at_s, _call(call)) for call in calls]
    timed.sort(key=lambda each: each[0])
    start_s = run.created_at_s if run else timed[0][0]
    rows = [(_at(at_s - start_s), *row) for at_s, row in timed]
    return [*_told(run, columns), *_table(rows, columns), *_bodies(steps, calls)]


def _newest(client: "Client") -> str:
    for run in client.list():
        return run.id
    raise NotFound("there are no runs", reason="RUN_NOT_FOUND")


def _run(client: "Client", run_id: str) -> Run | None:
    """The run; None once it is gone, which its records outlive."""
    try:
        return client.get(run_id)
    except NotFound:
        return None


def _told(run: Run | None, columns: int) -> list[str]:
    if run is None:
        return ["the run itself is not kept any more; these are its records"]
    lines = [
        f"run {run.id}: {run.state}",
        f"  of {run.client}, {counted_steps(run)} on {run.engine}",
    ]
    if run.error:
        why = f"{run.error.reason}: {run.error.message}"
        lines += textwrap.wrap(why, columns, initial_indent="  ", subsequent_indent="    ")
    return lines


def _table(rows: Sequence[Sequence[str]], columns: int) -> Iterator[str]:
    """The rows, their last cell in as many lines as it takes."""
    if not rows:
        yield "nothing is on record"
        return
    *figures, what = zip(_HEAD, *rows, strict=True)
    front = aligned(list(zip(*figures, strict=True)))
    width = max(map(len, front)) + 2
    for line, text in zip(front, what, strict=True):
        cells = textwrap.wrap(text, max(columns - width, _LEAST_CELLS), subsequent_indent="  ")
        yield f"{line:{width}}{cells[0]}"
        for cell in cells[1:]:
            yield f"{'':{width}}{cell}"


def _step(step: StepRecord) -> tuple[str, ...]:
    used = step.usage
    again = f" attempt {step.attempt}" if step.attempt > 1 else ""
    again += " repaired" if step.repaired else ""
    return (
        _ms(step.duration_s * 1000),
        _ms(used.queue_s * 1000),
        _ms(used.load_s * 1000),
        _ms(used.ttft_ms),
        f"{used.prompt_tokens}+{used.completion_tokens}",
        str(used.cached_tokens),
        f"step {step.step}{again}: {step.finish}",
    )


def _call(call: CallRecord) -> tuple[str, ...]:
    took_ms = None if call.ended_at_s is None else (call.ended_at_s - call.issued_at_s) * 1000
    ended = f"{call.effect} {call.result_class or ''}".strip()
    size = "" if call.result_bytes is None else f", {call.result_bytes} bytes"
    found = ""
    if call.resolution is not None:
        found = f", as {call.resolution.client or 'its verify tool'} found: "
        found += call.resolution.evidence
    return _ms(took_ms), "", "", "", "", "", f"{call.tool} {call.call_id}: {ended}{size}{found}"


def _bodies(steps: Sequence[StepRecord], calls: Sequence[CallRecord]) -> Iterator[str]:
    """What was said, where it is kept."""
    for step in steps:
        if step.body:
            yield f"step {step.step}: {step.body}"
    for call in calls:
        if call.body:
            yield f"{call.call_id}: {call.body}"


def _at(seconds: float) -> str:
    return f"+{max(0.0, seconds):.3f}s"


def _ms(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.0f}ms"
