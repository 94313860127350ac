"""The measurement of engines: one after the other, through a running daemon, as its caller.

Owns their order and what is in memory meanwhile. Whatever ends it, its runs are cancelled and the
engines in memory are put back.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from edge_agent.client import AsyncClient
from edge_agent.core import EngineInfo, RunState
from edge_agent.errors import EdgeAgentError, NotFound, Unavailable
from edge_agent.measuring.engine import EngineMeasurement, parts
from edge_agent.measuring.residency import Residency, admin_address
from edge_agent.measuring.results import BenchSettings, EngineResult

_BUSY_SHARE: Final = 0.5


class Listener(Protocol):
    """Who is told while it goes on."""

    def progress(self, fraction: float, doing: str) -> None:
        """How far everything is, 0 to 1."""
        ...

    def note(self, text: str) -> None:
        """What a reader of the results should know."""
        ...

    def result(self, result: EngineResult) -> None:
        """An engine is measured."""
        ...

    def failure(self, engine: str, error: EdgeAgentError) -> None:
        """An engine could not be measured; the next one is."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """The daemon, the engines to measure in it (none named: all), how, and whose /proc and /sys."""

    address: str
    client_name: str
    engines: tuple[str, ...]
    settings: BenchSettings
    sysroot: Path


async def measure(target: Target, listener: Listener) -> None:
    """Measure each engine in turn.

    Raises:
        NotFound: an engine is not installed, or none is; nothing was measured.
        Unavailable: no daemon answers.
    """
    async with contextlib.AsyncExitStack() as stack:

        async def connect(address: str) -> AsyncClient:
            return await stack.enter_async_context(AsyncClient(address, name=target.client_name))

        api = await connect(target.address)
        engines = _chosen(await api.engines(), target.engines)
        await _note_others(api, listener)
        admin = admin_address(target.address)
        residency = Residency(api, await connect(admin) if admin else None)
        await residency.open()
        try:
            for index, engine in enumerate(engines):
                progress = _Progress(listener, engine.name, index, len(engines), target.settings)
                try:
                    await _measure_one(api, residency, engine, target, progress)
                except EdgeAgentError as error:
                    if error.reason == "DAEMON_UNREACHABLE":
                        raise
                    listener.failure(engine.name, error)
            if not residency.may_load:
                listener.note("admin.sock is not ours to use: what was loaded stays in memory")
        finally:
            for name in await residency.close():
                listener.note(f"{name} had to leave memory; its next run loads it again")


def _chosen(installed: Sequence[EngineInfo], names: Sequence[str]) -> list[EngineInfo]:
    by_name = {engine.name: engine for engine in installed}
    for name in names:
        if name not in by_name:
            raise NotFound(
                f"no engine {name!r} is installed",
                reason="ENGINE_NOT_FOUND",
                metadata={"engine": name},
            )
    if not by_name:
        raise NotFound("no engine is installed", reason="ENGINE_NOT_FOUND")
    return [by_name[name] for name in dict.fromkeys(names or by_name)]


async def _note_others(api: AsyncClient, listener: Listener) -> None:
    status = await api.status()
    active = sum(count for state, count in status.runs.items() if not RunState(state).ended)
    if active:
        listener.note(f"{active} runs of others went on: the results are those of a busy daemon")
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores * _BUSY_SHARE:
        listener.note(f"the machine was busy before: load average {load:.1f} on {cores} cores")


async def _measure_one(
    api: AsyncClient,
    residency: Residency,
    engine: EngineInfo,
    target: Target,
    progress: "_Progress",
) -> None:
    try:
        measurement = EngineMeasurement(
            api, residency, engine, target.settings, target.sysroot, progress.begin
        )
        result = await measurement.run()
        progress.end()
        progress.listener.result(result)
    finally:
        with contextlib.suppress(Unavailable):  # the daemon has gone: what went before says more
            await residency.leave(engine.name)
    slots, streams = result.worker_slots, target.settings.streams
    if slots is not None and slots < streams:
        text = f"{engine.name} decides {slots} at once: of {streams} streams the others wait"
        progress.listener.note(text)


class _Progress:
    """How far one engine is, as a part of the whole."""

    def __init__(
        self, listener: Listener, engine: str, index: int, engines: int, settings: BenchSettings
    ) -> None:
        self.listener = listener
        self._engine = engine
        self._parts = parts(settings)
        self._done = index * self._parts
        self._all = engines * self._parts

    def begin(self, doing: str) -> None:
        """The next part begins."""
        self.listener.progress(self._done / self._all, f"{doing}, {self._engine}")
        self._done += 1

    def end(self) -> None:
        """The last part is done."""
        self.listener.progress(self._done / self._all, self._engine)
