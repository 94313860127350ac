"""How an engine comes into memory and leaves it: its process, what that takes, and the proof.

Decides nothing. A load has a marker on disk before
it, a time limit around it and a footprint after it; an unload is done when the process is gone and
its memory is back.
"""

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from edge_agent.core import MeasuredLoad
from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.host import EngineHost, WorkerSettings
from edge_agent.engines.manifest import Manifest
from edge_agent.engines.protocol import Options
from edge_agent.errors import LoadFailed, WorkerError
from edge_agent.scheduling.failures import Failure, classify
from edge_agent.scheduling.footprints import Footprints
from edge_agent.scheduling.machine import Machine
from edge_agent.scheduling.quarantine import Quarantine
from edge_agent.wakeup import Wakeup

_MEASURE_S = 0.1
_PROOF_SHARE = 0.5
"""Memory counts as back when this share of it is: others take some meanwhile."""
_PROOF_LEAST_BYTES = 64 << 20
"""Less than this can't be told from what others do."""

NewHost = Callable[[Manifest, WorkerSettings], EngineHost]
OnProgress = Callable[[float], None]

log = structlog.get_logger()


class LoadTrouble(Exception):
    """A load that ended badly: the error for whoever waits, and what kind of failure it was."""

    def __init__(self, error: LoadFailed, failure: Failure) -> None:
        super().__init__(error.message)
        self.error = error
        self.failure = failure


@dataclass(frozen=True, slots=True)
class LoadingSettings:
    """From the configuration."""

    load_timeout_s: float
    unload_timeout_s: float
    memory_back_s: float
    worker: Callable[[Manifest], WorkerSettings]
    options: Callable[[Manifest], Options]


class Loader:
    """Loads and unloads engines. `observed` is notified at each new view of the machine.

    `footprints` and `quarantine` are what it has learned of them.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        machine: Machine,
        footprints: Footprints,
        quarantine: Quarantine,
        observed: Wakeup,
        new_host: NewHost = EngineHost,
    ) -> None:
        """Nothing is loaded."""
        self._catalogue = catalogue
        self._machine = machine
        self.footprints = footprints
        self.quarantine = quarantine
        self._observed = observed
        self._new_host = new_host

    def new_host(self, manifest: Manifest, settings: LoadingSettings) -> EngineHost:
        """A process to be, for `load`."""
        return self._new_host(manifest, settings.worker(manifest))

    async def load(
        self, host: EngineHost, settings: LoadingSettings, on_progress: OnProgress
    ) -> int:
        """Start the engine's process and load it; its process is gone when this raises.

        Returns by how many bytes MemAvailable fell.

        Raises:
            LoadTrouble: it could not be loaded.
        """
        manifest = host.manifest
        try:
            options = settings.options(manifest)
            self.check_files(manifest)
            await self._mark(manifest)
        except LoadFailed as error:
            raise LoadTrouble(error, Failure.OTHER) from error
        before = self._machine.view().memory.available_bytes
        watch = _Footfall(self._machine, before)
        measuring = asyncio.create_task(watch.follow(host))
        try:
            with self._machine.watch_closely():
                await self._start(host, options, settings, on_progress)
                await watch.look(host)
        except BaseException:
            await asyncio.shield(self._end(host, settings))
            raise
        finally:
            measuring.cancel()
            await self._unmark()
        measured = watch.measurement()
        if measured is not None:
            await self.footprints.record(manifest, options.slots, options.context_tokens, measured)
        return watch.fallen_bytes

    async def unload(self, host: EngineHost, held_bytes: int, settings: LoadingSettings) -> int:
        """End an engine's process; returns how many bytes did not come back.

        All of `held_bytes` when the process itself can't be ended.
        """
        before = self._machine.view().memory.available_bytes
        try:
            await host.stop(settings.unload_timeout_s)
        except WorkerError as error:
            log.error(
                "engine_unload_unproven",
                engine=host.manifest.name,
                reason=error.reason,
                error=str(error),
            )
            return max(held_bytes, 1)
        if before is None or held_bytes < _PROOF_LEAST_BYTES:
            return 0
        return await self._missing(before, held_bytes, settings.memory_back_s)

    def drop_page_cache(self, manifest: Manifest) -> None:
        """Let the kernel forget the engine's files: they may keep large blocks apart. Blocks."""
        directory = self._catalogue.directory(manifest.name)
        for spec in manifest.files:
            _forget(directory / spec.path)

    def check_files(self, manifest: Manifest) -> None:
        """Sizes only: reading the files is `engines verify`'s.

        Raises:
            LoadFailed: reason ENGINE_FILES_WRONG.
        """
        name = manifest.name
        violations = self._catalogue.quick_check(name)
        if violations:
            wrong = "; ".join(f"{each.field}: {each.description}" for each in violations)
            raise LoadFailed(
                f"engine {name}: {wrong}; install it again",
                reason="ENGINE_FILES_WRONG",
                metadata={"engine": name, "files": wrong},
            )

    async def _start(
        self,
        host: EngineHost,
        options: Options,
        settings: LoadingSettings,
        on_progress: OnProgress,
    ) -> None:
        name, limit_s = host.manifest.name, settings.load_timeout_s
        directory = self._catalogue.directory(name)
        try:
            async with asyncio.timeout(limit_s):
                await host.start(directory, options, on_progress)
        except TimeoutError:
            message = f"engine {name} was not loaded within {limit_s:g} s"
            error = LoadFailed(message, reason="LOAD_TIMEOUT", metadata={"engine": name})
            raise LoadTrouble(error, Failure.OTHER) from None
        except LoadFailed as error:
            await self._end(host, settings)  # its last words tell why
            failure = classify(error, host.output, host.own_exit_code)
            raise LoadTrouble(error, failure) from error

    async def _end(self, host: EngineHost, settings: LoadingSettings) -> None:
        try:
            await host.stop(settings.unload_timeout_s)
        except WorkerError as error:
            log.error("engine_unload_unproven", engine=host.manifest.name, error=str(error))

    async def _mark(self, manifest: Manifest) -> None:
        try:
            await asyncio.to_thread(self.quarantine.begin, manifest)
        except OSError as error:
            raise LoadFailed(
                f"engine {manifest.name}: no load without its marker on disk: {error}",
                reason="STATE_NOT_WRITABLE",
                metadata={"engine": manifest.name},
            ) from error

    async def _unmark(self) -> None:
        try:
            await asyncio.to_thread(self.quarantine.end)
        except OSError as error:
            log.error("load_marker_not_removed", error=str(error))

    async def _missing(self, before: int, held_bytes: int, timeout_s: float) -> int:
        """Wait for the memory, as telemetry sees it; what is missing when the time is over."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while True:
            observed = self._observed.next()
            available = self._machine.view().memory.available_bytes
            if available is None or available - before >= held_bytes * _PROOF_SHARE:
                return 0
            try:
                async with asyncio.timeout_at(deadline_s):
                    await observed
            except TimeoutError:
                return min(held_bytes, held_bytes - (available - before))


class _Footfall:
    """How much memory went while an engine loads: at the worst moment, and at the end.

    The process's own figure where there is one, else by how much MemAvailable fell.
    """

    def __init__(self, machine: Machine, before: int | None) -> None:
        self._machine = machine
        self._before = before
        self._peak = 0
        self._steady = 0
        self._peak_fallen = 0
        self.fallen_bytes = 0

    async def follow(self, host: EngineHost) -> None:
        while True:
            await asyncio.sleep(_MEASURE_S)
            await self.look(host)

    async def look(self, host: EngineHost) -> None:
        if host.pid:
            own = await asyncio.to_thread(self._machine.process_bytes, host.pid)
            if own is not None:
                self._steady = own
                self._peak = max(self._peak, own)
        available = self._machine.view().memory.available_bytes
        if available is not None and self._before is not None:
            self.fallen_bytes = max(0, self._before - available)
            self._peak_fallen = max(self._peak_fallen, self.fallen_bytes)

    def measurement(self) -> MeasuredLoad | None:
        if self._peak:
            return MeasuredLoad(self._peak, self._steady, "process", time.time())
        if self._peak_fallen:
            peak, steady = self._peak_fallen, self.fallen_bytes
            return MeasuredLoad(peak, steady, "available", time.time())
        return None


def _forget(path: Path) -> None:
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(number)
