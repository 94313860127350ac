"""What the daemon and a worker take before they do anything, and when they do nothing.

Memory is resident memory from /proc, in units of 1,000,000 bytes. `ready_s` counts from the exec of
`edge-agent serve` to READY=1 on the notify socket. `worker_overhead_mb` is what a worker holds
beyond the peak of a process with nothing but the engine's library in it, loaded with the same
parameters, after the same completions, one of them constrained by a schema.
"""

import asyncio
import enum
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._shared import (
    ENGINE,
    Arguments,
    Child,
    Target,
    median,
    memory_mb,
    parse_arguments,
    process_cpu_s,
    report,
    spread,
)
from edge_agent.backends import llama_cpp
from edge_agent.backends.base import LoadOptions
from edge_agent.client import AsyncClient
from tests.support.daemon import BASE_CONFIG, running_daemon

TARGETS = (
    Target("daemon_rss_mb", 65, True, "daemon, no engine loaded, after some calls"),
    Target("ready_s", 0.8, True, "from exec to READY=1"),
    Target("idle_cpu_percent", 0.5, True, "of one core, daemon without an engine"),
    Target("worker_overhead_mb", 25, True, "worker beyond the engine's own peak"),
)
_CALLS = 5
_READY_TIMEOUT_S = 30.0
_GOALS = (
    "Write a long story about a robot that works in a warehouse.",
    "What can you do?",
    "Name three fruits.",
)
_SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 24}, "count": {"type": "integer"}},
        "required": ["name", "count"],
        "additionalProperties": False,
    }
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How often the daemon is started, how long completions are, how long idleness is watched."""

    starts: int
    tokens: int
    idle_s: float


QUICK = Plan(starts=2, tokens=16, idle_s=1)
FULL = Plan(starts=9, tokens=64, idle_s=15)


@contextmanager
def notify_socket() -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """A socket as a service manager has it, and the environment that names it."""
    with (
        tempfile.TemporaryDirectory(prefix="ea-") as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        path = f"{directory}/notify.sock"
        manager.bind(path)
        manager.settimeout(_READY_TIMEOUT_S)
        yield manager, {"NOTIFY_SOCKET": path}


def ready_s(store: Path) -> float:
    """Seconds from the exec of a daemon to its READY=1."""
    with notify_socket() as (manager, environ):
        began_s = time.monotonic()
        with running_daemon(store, BASE_CONFIG, environ, ready=False) as daemon:
            while b"READY=1" not in manager.recv(4096).splitlines():
                pass
            seconds = time.monotonic() - began_s
            daemon.stop()
        return seconds


def idle_cpu_percent(pid: int, seconds: float) -> float:
    """Share of one core that a process takes while nobody asks it for anything."""
    before_s, began_s = process_cpu_s(pid), time.monotonic()
    time.sleep(seconds)
    return (process_cpu_s(pid) - before_s) / (time.monotonic() - began_s) * 100


async def look_around(address: Path) -> None:
    async with AsyncClient(str(address), name="benchmark") as client:
        for _ in range(_CALLS):
            await client.status()
            await client.engines()


async def complete_through_daemon(address: Path, tokens: int) -> int:
    """The same completions as `complete_with_library`; returns the worker's process id."""
    async with AsyncClient(str(address), name="benchmark") as client:
        for goal in _GOALS:
            run = await client.run(goal, max_output_tokens=tokens, temperature=0.0, max_steps=1)
            assert run.usage.completion_tokens, run
        run = await client.run(_GOALS[0], output_schema_json=_SCHEMA, temperature=0.0, max_steps=1)
        assert "count" in json.loads(run.answer or ""), run
        (engine,) = (info for info in await client.engines() if info.name == ENGINE)
        assert engine.worker is not None
        return engine.worker.pid


def complete_with_library(arguments: Arguments, child: Child, tokens: int) -> None:
    """The same completions as `complete_through_daemon`, in the process of `child`."""
    manifest = arguments.manifest()
    form = manifest.prompt
    for goal, grammar in (*((goal, "") for goal in _GOALS), (_GOALS[0], _grammar())):
        child.ask(
            prompt=f"{form.system.open}{form.default_system}{form.system.close}"
            f"{form.user.open}{goal}{form.user.close}{form.assistant.open}",
            max_tokens=manifest.max_output_tokens if grammar else tokens,
            temperature=0,
            stop=list(manifest.stop),
            stream=True,
            cache_prompt=True,
            **({"grammar": grammar} if grammar else {}),
        )


def _grammar() -> str:
    return llama_cpp._grammar(_SCHEMA, "")  # noqa: SLF001 - exactly what a worker sends


def library_parameters(arguments: Arguments, directory: str) -> dict[str, Any]:
    """How a worker loads the engine, as a child without our package can apply it."""
    import xllamacpp

    options = LoadOptions(**arguments.load_options())
    ours = llama_cpp.server_parameters(arguments.manifest(), arguments.engine_directory, options)
    changed = dict(_changed(ours, xllamacpp.CommonParams(), ""))
    return {**changed, "hostnames": [f"{directory}/library.sock"], "api_keys": ["benchmark"]}


def _changed(ours: Any, default: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted names and values of what differs between two parameter objects."""
    for name in dir(ours):
        value, before = getattr(ours, name), getattr(default, name)
        if name.startswith("_") or callable(value):
            continue
        if isinstance(value, enum.Enum):
            value, before = value.value, before.value
        if isinstance(value, (bool, int, float, str, list, set, dict)):
            if value != before:
                yield f"{prefix}{name}", value
        else:
            yield from _changed(value, before, f"{prefix}{name}.")


def measure_empty(arguments: Arguments, plan: Plan, values: dict[str, list[float]]) -> None:
    """A daemon that nobody has asked for a run."""
    with running_daemon(arguments.store, BASE_CONFIG) as daemon:
        pid = daemon.process.pid
        asyncio.run(look_around(daemon.api_socket))
        values["daemon_rss_mb"] = [memory_mb(pid)]
        time.sleep(1)
        values["idle_cpu_percent"] = [idle_cpu_percent(pid, plan.idle_s)]


def measure_worker(arguments: Arguments, plan: Plan, values: dict[str, list[float]]) -> None:
    """A worker and the library alone, after the same work."""
    with running_daemon(arguments.store, BASE_CONFIG) as daemon:
        worker = asyncio.run(complete_through_daemon(daemon.api_socket, plan.tokens))
        rss_mb, peak_mb = memory_mb(worker), memory_mb(worker, "VmHWM")
        time.sleep(1)
        values["idle_cpu_percent_loaded"] = [idle_cpu_percent(daemon.process.pid, plan.idle_s)]
        values["worker_idle_cpu_percent"] = [idle_cpu_percent(worker, plan.idle_s)]
        values["daemon_rss_mb_after_runs"] = [memory_mb(daemon.process.pid)]
    with (
        tempfile.TemporaryDirectory(prefix="ea-") as directory,
        Child("library", parameters=library_parameters(arguments, directory)) as child,
    ):
        complete_with_library(arguments, child, plan.tokens)
        library_rss_mb, library_peak_mb = memory_mb(child.pid), memory_mb(child.pid, "VmHWM")
    values["worker_overhead_mb"] = [rss_mb - library_peak_mb]
    values["worker_peak_overhead_mb"] = [peak_mb - library_peak_mb]
    values["worker_rss_mb"], values["worker_peak_mb"] = [rss_mb], [peak_mb]
    values["library_rss_mb"], values["library_peak_mb"] = [library_rss_mb], [library_peak_mb]


def main() -> None:
    arguments = parse_arguments(__doc__)
    arguments.manifest()
    plan = QUICK if arguments.quick else FULL
    values: dict[str, list[float]] = {}
    measure_empty(arguments, plan, values)
    measure_worker(arguments, plan, values)
    values["ready_s"] = [ready_s(arguments.store) for _ in range(plan.starts)]
    medians = {key: median(each) for key, each in values.items()}
    keys = [target.key for target in TARGETS]
    report(
        "footprint",
        TARGETS,
        {key: medians[key] for key in keys},
        more={key: value for key, value in medians.items() if key not in keys},
        spreads={key: spread(each) for key, each in values.items()},
    )


if __name__ == "__main__":
    os.environ.pop("NOTIFY_SOCKET", None)
    main()
