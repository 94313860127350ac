"""`edge-agent status`: how the daemon is, what is in memory, what runs and what is halted.

With --watch again and again, together with the machine's telemetry: see `watch` and `live_view`.
"""

import argparse
from collections.abc import Sequence

from edge_agent.cli.output import (
    Subparsers,
    add_json,
    add_socket,
    aligned,
    connect,
    duration_s,
    print_json,
)
from edge_agent.core import EngineInfo
from edge_agent.status import DaemonStatus
from edge_agent.units import MIB


def register(subparsers: Subparsers) -> None:
    """Add `status`."""
    parser = subparsers.add_parser(
        "status",
        help="how the daemon is",
        description="Shows the daemon's state, its engines, its runs and what is halted. With "
        "--watch it goes on, and shows the machine as well: memory, GPU, temperatures, power.",
        epilog="example: edge-agent status --watch",
    )
    parser.add_argument("--watch", action="store_true", help="show it again and again until Ctrl-C")
    parser.add_argument(
        "--interval",
        metavar="DURATION",
        type=duration_s,
        default=1.0,
        help="how often with --watch, 100ms to 1h (default: 1s)",
    )
    add_socket(parser)
    add_json(parser)
    parser.set_defaults(handler=run_status)


def run_status(args: argparse.Namespace) -> int:
    """Show it."""
    if args.watch:
        from edge_agent.cli.watch import watch

        return watch(args)
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
    lines = daemon_lines(status)
    lines.append(f"config   {status.config_path or 'built-in defaults'}")
    return lines + run_lines(status) + engine_lines(status, engines)


def daemon_lines(status: DaemonStatus) -> list[str]:
    """The daemon, and what is wrong with it."""
    uptime = _span(status.uptime_s)
    lines = [f"daemon   {status.state}  pid {status.pid}, up {uptime}, version {status.version}"]
    return lines + [f"degraded {reason}" for reason in status.degraded_reasons]


def run_lines(status: DaemonStatus) -> list[str]:
    """What runs, and what is halted."""
    counts = ", ".join(f"{count} {state}" for state, count in status.runs.items() if count)
    return [f"runs     {counts or 'none'}"] + [
        f"halt     {halt.id} {halt.scope} {halt.target} {halt.reason}".rstrip()
        for halt in status.halts
    ]


def engine_lines(status: DaemonStatus, engines: Sequence[EngineInfo]) -> list[str]:
    """The engines, one a line, with what went wrong with them."""
    loaded = f"{status.engines_loaded} of at most {status.max_resident_engines} in memory"
    lines = [f"engines  {status.engines_installed} installed, {loaded}"]
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
