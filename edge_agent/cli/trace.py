"""`edge-agent trace RUN`: what is on record of a run's steps and tool calls, as a timeline."""

import argparse
from collections.abc import Iterator, Sequence

from edge_agent.cli.output import Subparsers, add_json, add_socket, aligned, connect, print_json
from edge_agent.core import Run
from edge_agent.records import CallRecord, StepRecord

_HEAD = ("AT", "WHAT", "TOOK", "QUEUE", "LOAD", "TTFT", "TOKENS", "CACHED", "ENDED AS")


def register(subparsers: Subparsers) -> None:
    """Add `trace`."""
    parser = subparsers.add_parser(
        "trace",
        help="what a run did, step by step",
        description="Shows each step and tool call of a run, in the order in which they "
        "began: when, for how long, and how it ended. --json gives everything that is on record.",
        epilog="example: edge-agent trace 1f3870be274f6c49b3e31a0c6728957f",
    )
    parser.add_argument("run", metavar="RUN", help="the id of the run")
    add_socket(parser)
    add_json(parser)
    parser.set_defaults(handler=run_trace)


def run_trace(args: argparse.Namespace) -> int:
    """Show the records."""
    with connect(args) as client:
        run = client.get(args.run)
        steps, calls = client.trace(args.run)
    if args.json:
        print_json({"run": run, "steps": steps, "tool_calls": calls})
        return 0
    for line in describe(run, steps, calls):
        print(line)
    return 0


def describe(run: Run, steps: Sequence[StepRecord], calls: Sequence[CallRecord]) -> list[str]:
    """A line on the run, and a row for each step and tool call in the order of their beginning."""
    why = f" ({run.error.reason})" if run.error else ""
    lines = [f"run {run.id} of {run.client}: {run.state}{why}, {run.steps} steps on {run.engine}"]
    timed = [(step.started_at_s, _step(step, run.created_at_s)) for step in steps]
    timed += [(call.issued_at_s, _call(call, run.created_at_s)) for call in calls]
    if timed:
        rows = [row for _at_s, row in sorted(timed, key=lambda each: each[0])]
        lines += aligned([_HEAD, *rows])
    else:
        lines.append("nothing is on record")
    return [*lines, *_bodies(steps, calls)]


def _step(step: StepRecord, start_s: float) -> tuple[str, ...]:
    used = step.usage
    again = f" (attempt {step.attempt})" if step.attempt > 1 else ""
    return (
        _at(step.started_at_s - start_s),
        f"step {step.step}{again}",
        _ms(step.duration_s * 1000),
        _ms(used.queue_s * 1000),
        _ms(used.load_s * 1000),
        _ms(used.ttft_ms),
        f"{used.prompt_tokens}+{used.completion_tokens}",
        str(used.cached_tokens),
        step.finish,
    )


def _call(call: CallRecord, start_s: float) -> tuple[str, ...]:
    took_ms = None if call.ended_at_s is None else (call.ended_at_s - call.issued_at_s) * 1000
    ended = f"{call.effect} {call.result_class or ''}".strip()
    size = "" if call.result_bytes is None else f", {call.result_bytes} bytes"
    return (
        _at(call.issued_at_s - start_s),
        f"  {call.tool} {call.call_id}",
        _ms(took_ms),
        "",
        "",
        "",
        "",
        "",
        f"{ended}{size}",
    )


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
