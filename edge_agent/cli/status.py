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
    span,
)
from edge_agent.core import EngineInfo, EngineState
from edge_agent.status import DaemonStatus, MemoryStatus
from edge_agent.units import MIB, size_text


def register(subparsers: Subparsers) -> None:
    """Add `status`."""
    parser = subparsers.add_parser(
        "status",
        help="how the daemon is",
        description="Shows the daemon's state, its engines, its runs, the memory that is left for "
        "engines and what is halted. With --watch it goes on, and shows the machine as well: "
        "memory, GPU, temperatures, power.",
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
    lines += run_lines(status)
    if status.memory is not None:
        lines.append(f"memory   {memory_text(status.memory)}")
    return lines + engine_lines(status, engines)


def daemon_lines(status: DaemonStatus) -> list[str]:
    """The daemon, and what is wrong with it."""
    uptime = span(status.uptime_s)
    lines = [f"daemon   {status.state}  pid {status.pid}, up {uptime}, version {status.version}"]
    return lines + [f"degraded {reason}" for reason in status.degraded_reasons]


def run_lines(status: DaemonStatus) -> list[str]:
    """What runs, what waits, what is halted, and who has what of the robot."""
    counts = ", ".join(f"{count} {state}" for state, count in status.runs.items() if count)
    why = ": `edge-agent explain` says why" if status.waiting_steps else ""
    return [
        f"runs     {counts or 'none'}",
        f"steps    {status.running_steps} running, {status.waiting_steps} waiting{why}",
        *(
            f"halt     {halt.id} {halt.scope} {halt.target} {halt.reason}".rstrip()
            for halt in status.halts
        ),
        *(
            f"hold     {hold.resource}: {hold.tool} {hold.holding} "
            f"({hold.tool_call_id} of run {hold.run_id}, {hold.client})"
            for hold in status.holds
        ),
    ]


def memory_text(memory: MemoryStatus) -> str:
    """What is left for engines, on one line."""
    parts = [
        f"robot {size_text(memory.kept_bytes)}",
        f"engines {size_text(memory.committed_bytes)}",
        f"room for {size_text(memory.room_bytes)}",
    ]
    if memory.leaked_bytes:
        parts.append(f"leaked {size_text(memory.leaked_bytes)}")
    return f"{memory.level}  {size_text(memory.total_bytes)}: {', '.join(parts)}"


def engine_lines(status: DaemonStatus, engines: Sequence[EngineInfo]) -> list[str]:
    """The engines, one a line, with what went wrong with them."""
    loaded = f"{status.engines_loaded} of at most {status.max_resident_engines} in memory"
    lines = [f"engines  {status.engines_installed} installed, {loaded}"]
    rows: list[tuple[str, ...]] = [("NAME", "STATE", "MEMORY", "SLOTS", "ACTIVE", "WAITING", "PID")]
    rows += [_row(engine) for engine in engines]
    if engines:
        lines += ["  " + row for row in aligned(rows)]
    return lines + [f"  {engine.name}: {note}" for engine in engines for note in _notes(engine)]


def engine_state(engine: EngineInfo) -> str:
    """Where an engine is, whether it is kept out, and whether it stays."""
    is_out = engine.state in (EngineState.INSTALLED, EngineState.FAILED)
    state = "QUARANTINED" if engine.quarantined and is_out else str(engine.state)
    if engine.load_progress is not None:
        state += f" {engine.load_progress:.0%}"
    return f"{state} pinned" if engine.pinned else state


def _row(engine: EngineInfo) -> tuple[str, ...]:
    state = engine_state(engine)
    memory = f"{engine.steady_bytes / MIB:.0f} MiB"
    worker = engine.worker
    if worker is None:
        return (engine.name, state, memory, "-", "-", "-", "-")
    numbers = (worker.slots, worker.active_steps, worker.waiting_steps, worker.pid)
    return (engine.name, state, memory, *map(str, numbers))


def _notes(engine: EngineInfo) -> list[str]:
    """What is wrong with an engine, and what to do about it."""
    release = f"`edge-agent engines release {engine.name}`"
    notes = []
    if engine.error is not None:
        notes.append(engine.error.message)
    if engine.quarantined:
        notes.append(f"two boots ended inside its load; {release} lets it load again")
    if engine.leaked_bytes:
        leaked = size_text(engine.leaked_bytes)
        notes.append(f"{leaked} did not come back when it left; {release} forgets that")
    return notes
