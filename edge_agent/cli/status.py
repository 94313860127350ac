"""`edge-agent status`: how the daemon is, what is in memory, what runs and what is halted."""

import argparse
from collections.abc import Sequence

from edge_agent.cli.output import (
    Subparsers,
    add_json,
    add_socket,
    aligned,
    connect,
    print_json,
)
from edge_agent.core import DaemonStatus, EngineInfo
from edge_agent.units import MIB


def register(subparsers: Subparsers) -> None:
    """Add `status`."""
    parser = subparsers.add_parser(
        "status",
        help="how the daemon is",
        description="Shows the daemon's state, its engines, its runs and what is halted.",
        epilog="example: edge-agent status --json",
    )
    add_socket(parser)
    add_json(parser)
    parser.set_defaults(handler=run_status)


def run_status(args: argparse.Namespace) -> int:
    """Show it."""
    with connect(args) as client:
        status, engines = client.status(), client.engines()
    if args.json:
        print_json({"status": status, "engines": engines})
        return 0
    for line in describe(status, engines):
        print(line)
    return 0


def describe(status: DaemonStatus, engines: Sequence[EngineInfo]) -> list[str]:
    """The status for people, line by line."""
    uptime = _span(status.uptime_s)
    lines = [f"daemon   {status.state}  pid {status.pid}, up {uptime}, version {status.version}"]
    lines += [f"degraded {reason}" for reason in status.degraded_reasons]
    lines.append(f"config   {status.config_path or 'built-in defaults'}")
    counts = ", ".join(f"{count} {state}" for state, count in status.runs.items() if count)
    lines.append(f"runs     {counts or 'none'}")
    lines += [
        f"halt     {halt.id} {halt.scope} {halt.target} {halt.reason}".rstrip()
        for halt in status.halts
    ]
    loaded = f"{status.engines_loaded} of at most {status.max_resident_engines} in memory"
    lines.append(f"engines  {status.engines_installed} installed, {loaded}")
    rows: list[tuple[str, ...]] = [("NAME", "STATE", "MEMORY", "SLOTS", "ACTIVE", "WAITING", "PID")]
    rows += [_row(engine) for engine in engines]
    if engines:
        lines += ["  " + row for row in aligned(rows)]
    lines += [
        f"  {engine.name}: {engine.error.message}" for engine in engines if engine.error is not None
    ]
    return lines


def _row(engine: EngineInfo) -> tuple[str, ...]:
    state = str(engine.state)
    if engine.load_progress is not None:
        state += f" {engine.load_progress:.0%}"
    memory = f"{engine.steady_bytes / MIB:.0f} MiB"
    worker = engine.worker
    if worker is None:
        return (engine.name, state, memory, "-", "-", "-", "-")
    numbers = (worker.slots, worker.active_steps, worker.waiting_steps, worker.pid)
    return (engine.name, state, memory, *map(str, numbers))


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m {rest}s" if minutes else f"{rest}s"
