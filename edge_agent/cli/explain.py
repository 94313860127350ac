"""`edge-agent explain`: which steps wait, for what, and when they are expected to start."""

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from typing import Final

from edge_agent.cli.output import (
    Subparsers,
    add_json,
    add_socket,
    aligned,
    connect,
    cut,
    print_json,
    span,
)
from edge_agent.status import StepWait

_HEAD: Final = ("WHO", "ENGINE", "PRIORITY", "WAITED", "STARTS IN", "DUE IN")
_FIGURES_CELLS: Final = 44
"""What the columns after ENGINE take, with what is between all of them."""
_LEAST_CELLS: Final = 12
_TENTHS_BELOW_S: Final = 10.0


def register(subparsers: Subparsers) -> None:
    """Add `explain`."""
    parser = subparsers.add_parser(
        "explain",
        help="why steps wait",
        description="Shows each step that waits, in the order in which they are expected to go: "
        "whose it is, when it is expected to start, when it gives up, and what is in its way.",
        epilog="example: edge-agent explain",
    )
    parser.add_argument("run", nargs="?", default="", metavar="RUN", help="only this run's")
    add_socket(parser)
    add_json(parser)
    parser.set_defaults(handler=run_explain)


def run_explain(args: argparse.Namespace) -> int:
    """Explain."""
    with connect(args) as client:
        waits = client.explain(args.run)
        run = client.get(args.run) if args.run and not waits else None
    if args.json:
        print_json({"waits": waits})
        return 0
    for line in describe(waits, shutil.get_terminal_size().columns):
        print(line)
    if not waits:
        print(f"nothing of it waits: the run is {run.state}" if run else "nothing waits")
    return 0


def describe(waits: Sequence[StepWait], columns: int) -> list[str]:
    """A row for each step, and below it the run and the reason; lines of at most `columns`."""
    if not waits:
        return []
    names = _cut_names(waits, columns - _FIGURES_CELLS)
    rows = [_row(wait, *name) for wait, name in zip(waits, names, strict=True)]
    head, *lines = aligned([_HEAD, *rows])
    told = [head]
    for wait, line in zip(waits, lines, strict=True):
        told += [line, *_reason(wait, columns)]
    return told


def _cut_names(waits: Sequence[StepWait], cells: int) -> list[tuple[str, str]]:
    """Client and engine of each; where both do not fit, clients are cut first."""
    engine = max(len(wait.engine) for wait in waits)
    who = max(_LEAST_CELLS, cells - engine)
    engine = max(_LEAST_CELLS, cells - who)
    return [(cut(wait.client, who), cut(wait.engine, engine)) for wait in waits]


def _row(wait: StepWait, who: str, engine: str) -> tuple[str, ...]:
    starts = "unknown" if wait.starts_in_s is None else _seconds(wait.starts_in_s)
    deadline = "none" if wait.deadline_in_s is None else _seconds(wait.deadline_in_s)
    return who, engine, str(wait.priority), _seconds(wait.waited_s), starts, deadline


def _reason(wait: StepWait, columns: int) -> list[str]:
    run = f"run {wait.run_id}" if wait.run_id else "a load"
    return textwrap.wrap(
        f"{run}, {wait.reason}: {wait.text}",
        max(columns, 2 * _LEAST_CELLS),
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=True,
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < _TENTHS_BELOW_S else span(seconds)
