"""How an engine comes into memory and leaves it: its process, what that takes, and the proof.

Decides nothing. A load has a marker on disk before it, a time limit around it and a footprint after
it; an unload is done when the process is gone and its memory is back.
"""

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog

from edge_agent.engines import manifest as manifests
from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.host import EngineHost, WorkerSettings
from edge_agent.engines.manifest import Manifest
from edge_agent.engines.protocol import Options
from edge_agent.errors import EdgeAgentError, LoadFailed, WorkerError
from edge_agent.scheduling.failures import Failure, classify
from edge_agent.scheduling.footfall import Footfall
from edge_agent.scheduling.footprints import Footprints
from edge_agent.scheduling.machine import Machine
from edge_agent.scheduling.quarantine import Quarantine
from edge_agent.scheduling.values import Footprint, MachineView
from edge_agent.wakeup import Wakeup

T = TypeVar("T")

_RECENT_S = 2.0
"""A process that has ended by itself may have given its memory back for so long unnoticed."""
_PROOF_SHARE = 0.5
"""Memory counts as back when this share of it is: others take some meanwhile."""
_READING_S = 1.0
_PROOF_LEAST_BYTES = 64 << 20
"""Less than this can't be told from what others do."""

NewHost = Callable[[Manifest, WorkerSettings], EngineHost]
OnProgress = Callable[[float], None]

log = structlog.get_logger()


class LoadTrouble(Exception):
    """A load that ended badly: the error for whoever waits, and what kind of failure it was."""

    def __init__(self, error: EdgeAgentError, failure: Failure) -> None:
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
    """Loads and unloads engines.

    `footprints` and `quarantine` are what it has learned of them.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        machine: Machine,
        footprints: Footprints,
        quarantine: Quarantine,
        new_host: NewHost = EngineHost,
    ) -> None:
        """Nothing is loaded."""
        self._catalogue = catalogue
        self._machine = machine
        self.footprints = footprints
        self.quarantine = quarantine
        self._new_host = new_host
        self._observed = Wakeup()
        self._seen: deque[tuple[float, int]] = deque()

    def observe(self, view: MachineView) -> None:
        """Telemetry has a new view of the machine."""
        now_s, available = asyncio.get_running_loop().time(), view.memory.available_bytes
        if available is not None:
            self._seen.append((now_s, available))
        while self._seen and self._seen[0][0] < now_s - _RECENT_S:
            self._seen.popleft()
        self._observed.notify()

    def observed(self) -> "asyncio.Future[None]":
        """Done at telemetry's next view."""
        return self._observed.next()

    def new_host(self, manifest: Manifest, settings: LoadingSettings) -> EngineHost:
        """A process to be, for `load`."""
        return self._new_host(manifest, settings.worker(manifest))

    def files(self, manifest: Manifest) -> Hashable:
        """Tells an engine's files from others, also from the same ones put there anew."""
        found: list[tuple[int, ...]] = []
        for spec in manifest.files:
            try:
                stat = (self._catalogue.root / manifest.name / spec.path).stat()
                found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
            except OSError as error:
                found.append((error.errno or 0,))
        return manifests.digest(manifest), tuple(found)

    async def load(
        self, host: EngineHost, settings: LoadingSettings, on_progress: OnProgress, *, again: bool
    ) -> Footfall:
        """Start the engine's process and load it; its process is gone when this raises.

        `again`: it found too little memory the first time.

        Raises:
            LoadTrouble: it could not be loaded.
        """
        name = host.manifest.name
        try:
            return await self._load(host, settings, on_progress, again=again)
        except LoadTrouble:
            raise
        except asyncio.CancelledError:
            await to_its_end(self._end(host, settings))
            raise
        except EdgeAgentError as error:
            raise LoadTrouble(error, Failure.OTHER) from error
        except Exception as error:  # whatever it is: an engine must not stay on its way for ever
            log.exception("engine_load_broke", engine=name)
            await self._end(host, settings)
            failed = LoadFailed(f"engine {name}: {error}", metadata={"engine": name})
            raise LoadTrouble(failed, Failure.OTHER) from error

    async def _load(
        self, host: EngineHost, settings: LoadingSettings, on_progress: OnProgress, *, again: bool
    ) -> Footfall:
        manifest = host.manifest
        options = settings.options(manifest)
        self.check_files(manifest)
        if again:
            await to_its_end(asyncio.to_thread(self._drop_page_cache, manifest))
        async with self._marked(manifest):
            footfall = Footfall(self._machine, options.slots, options.context_tokens)
            measuring = asyncio.create_task(footfall.follow(host))
            try:
                with self._machine.watch_closely():
                    await self._start(host, options, settings, on_progress)
                    await footfall.look(host)
            except BaseException:
                await to_its_end(self._end(host, settings))
                raise
            finally:
                measuring.cancel()
        return footfall

    def learn(self, manifest: Manifest, footfall: Footfall) -> Footprint:
        """Take in what a load was seen to take; returns what the engine takes by all that is known.

        Later figures of a load take the place of its earlier ones.
        """
        shape, measured = (footfall.slots, footfall.context_tokens), footfall.measurement()
        if measured is not None:
            self.footprints.add(manifest, *shape, measured)
        return self.footprints.of(manifest, *shape)

    async def unload(self, host: EngineHost, held_bytes: int, settings: LoadingSettings) -> int:
        """End an engine's process; returns how many bytes did not come back.

        All of `held_bytes` when the process itself can't be ended.
        """
        needs_proof = not self._machine.frees_with_process and held_bytes >= _PROOF_LEAST_BYTES
        if needs_proof:
            await self._fresh_reading()
        before = self._machine.view().memory.available_bytes
        if before is not None and host.lost.done():  # its memory may have come back by now
            before = min([before, *(available for _, available in self._seen)])
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
        if before is None or not needs_proof:
            return 0
        return await self._missing(before, held_bytes, settings.memory_back_s)

    async def _fresh_reading(self) -> None:
        """Wait for a reading of memory that began after now: what was just loaded is in it."""
        with self._machine.watch_closely(), contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_READING_S):
                for _ in range(2):  # the first may have begun before
                    await self._observed.next()

    def _drop_page_cache(self, manifest: Manifest) -> None:
        """Let the kernel forget the engine's files: they may keep large blocks apart. Blocks."""
        for spec in manifest.files:
            with contextlib.suppress(OSError):
                _forget(self._catalogue.root / manifest.name / spec.path)

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
            await to_its_end(self._end(host, settings))  # its last words tell why
            failure = classify(error, host.output, host.own_exit_code)
            raise LoadTrouble(error, failure) from error

    async def _end(self, host: EngineHost, settings: LoadingSettings) -> None:
        try:
            await host.stop(settings.unload_timeout_s)
        except WorkerError as error:
            log.error("engine_unload_unproven", engine=host.manifest.name, error=str(error))

    @contextlib.asynccontextmanager
    async def _marked(self, manifest: Manifest) -> AsyncIterator[None]:
        """The marker is on disk before this begins and gone after it, however it ends."""
        try:
            await self._mark(manifest)
            yield
        finally:
            await self._unmark()

    async def _mark(self, manifest: Manifest) -> None:
        try:
            await to_its_end(asyncio.to_thread(self.quarantine.begin, manifest))
        except OSError as error:
            raise LoadFailed(
                f"engine {manifest.name}: no load without its marker on disk: {error}",
                reason="STATE_NOT_WRITABLE",
                metadata={"engine": manifest.name},
            ) from error

    async def _unmark(self) -> None:
        try:
            await to_its_end(asyncio.to_thread(self.quarantine.end))
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


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Await this whole, also when cancelled meanwhile; the cancellation comes after it."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()
        raise cancelled
    return task.result()


def _forget(path: Path) -> None:
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(number)
