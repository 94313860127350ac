"""The one owner of what is in memory: loads engines for the steps that need them.

Engines change one at a time, in the order in which steps asked. A step holds its place until the
worker has let go of it, so that a cancelled step never frees it too early. Runs on the daemon's
loop; nothing here blocks it.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import structlog

from edge_agent.core import EngineInfo, EngineState, RunError, RunState, StepRequest, StepResult
from edge_agent.engines import manifest as manifests
from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.host import EngineHost, OnText, Sequence, WorkerSettings
from edge_agent.engines.manifest import Manifest
from edge_agent.engines.protocol import Options
from edge_agent.errors import (
    EdgeAgentError,
    FailedPrecondition,
    LoadFailed,
    Overloaded,
    WorkerError,
)
from edge_agent.scheduling.loaded import LoadedEngine
from edge_agent.scheduling.residency import Resident, choose_victim
from edge_agent.wakeup import Wakeup

OnState = Callable[[RunState, float | None], None]

_RETRY_AFTER_S = 1.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """From the configuration; replaced as a whole on reload."""

    max_resident_engines: int
    max_waiting_steps: int
    load_timeout_s: float
    unload_timeout_s: float
    worker: Callable[[Manifest], WorkerSettings]
    options: Callable[[Manifest], Options]


class Scheduler:
    """Loads, unloads, and decides steps. All methods on the daemon's loop."""

    def __init__(self, catalogue: Catalogue, settings: SchedulerSettings) -> None:
        """Nothing is loaded yet."""
        self.settings = settings
        self._catalogue = catalogue
        self._loaded: dict[str, LoadedEngine] = {}
        self._failures: dict[str, RunError] = {}
        self._loads: dict[str, asyncio.Task[LoadedEngine]] = {}
        self._load_observers: dict[str, set[OnState]] = {}
        self._transition = asyncio.Lock()
        self._waiting_steps = 0
        self._changed = Wakeup()
        self._background: set[asyncio.Task[None]] = set()

    # --- steps ---

    async def decide(
        self, engine: str, request: StepRequest, *, on_text: OnText, on_state: OnState
    ) -> StepResult:
        """Decide one step: wait for the engine and a place in it, then for the worker.

        Cancelling this returns at once; the place is free when the worker has let go.

        Args:
            engine: an installed engine's name.
            request: what is to be decided.
            on_text: told each piece of the answer and its number of tokens.
            on_state: told LOADING (with progress), QUEUED and RUNNING as they come.

        Raises:
            NotFound, LoadFailed, WorkerError, StepFailed, Overloaded: as they say.
        """
        asked_s = time.monotonic()
        loaded, load_s = await self._acquire(engine, on_state)
        waited_s = time.monotonic() - asked_s
        on_state(RunState.RUNNING, None)
        sequence = self._begin(loaded, request, on_text)
        try:
            result = await asyncio.shield(sequence.ended)
        except asyncio.CancelledError:
            loaded.host.cancel(sequence)
            raise
        usage = dataclasses.replace(result.usage, queue_s=waited_s - load_s, load_s=load_s)
        return dataclasses.replace(result, usage=usage)

    def _begin(self, loaded: LoadedEngine, request: StepRequest, on_text: OnText) -> Sequence:
        try:
            sequence = loaded.host.decide(request, on_text)
        except BaseException:
            loaded.give_place()
            raise

        def let_go(ended: "asyncio.Future[StepResult]") -> None:
            ended.exception()  # retrieved here too: nobody may wait for it any more
            loaded.give_place()

        sequence.ended.add_done_callback(let_go)
        return sequence

    async def _acquire(self, name: str, on_state: OnState) -> tuple[LoadedEngine, float]:
        """A place in the loaded engine, and how long loading took of the wait."""
        limit = self.settings.max_waiting_steps
        if self._waiting_steps >= limit:
            raise Overloaded(
                f"{self._waiting_steps} steps wait already, at most {limit}",
                metadata={"waiting_steps": self._waiting_steps, "limit": limit},
                retry_after_s=_RETRY_AFTER_S,
            )
        load_s = 0.0
        self._waiting_steps += 1
        try:
            while True:
                loaded = self._loaded.get(name)
                if loaded is None or loaded.state is not EngineState.READY:
                    began_s = time.monotonic()
                    loaded = await self._ensure_loaded(name, on_state)
                    load_s += time.monotonic() - began_s
                if loaded.active >= loaded.host.slots:
                    on_state(RunState.QUEUED, None)
                if await loaded.take_place():
                    return loaded, load_s
        finally:
            self._waiting_steps -= 1

    # --- engines ---

    def engines(self) -> tuple[EngineInfo, ...]:
        """All installed engines, by name."""
        return tuple(self._info(manifest) for manifest in self._catalogue.list())

    def engine(self, name: str) -> EngineInfo:
        """One installed engine.

        Raises:
            NotFound: not installed.
        """
        return self._info(self._catalogue.get(name))

    async def load(self, name: str) -> EngineInfo:
        """Load an engine, or wait for whoever does.

        Raises:
            NotFound, LoadFailed: as they say.
        """
        await self._ensure_loaded(name, lambda _state, _progress: None)
        return self.engine(name)

    async def unload(self, name: str) -> EngineInfo:
        """Unload an idle engine; returns once its process is gone.

        Raises:
            NotFound: not installed.
            FailedPrecondition: reason ENGINE_BUSY, steps use it.
            WorkerError: reason UNLOAD_UNPROVEN.
        """
        self._catalogue.get(name)
        async with self._transition:
            loaded = self._loaded.get(name)
            if loaded is not None:
                if loaded.active or loaded.waiting:
                    raise FailedPrecondition(
                        f"engine {name}: {loaded.active} steps use it",
                        reason="ENGINE_BUSY",
                        metadata={"engine": name, "active_steps": loaded.active},
                    )
                await self._unload(name, loaded)
        return self.engine(name)

    async def watch(self) -> AsyncIterator[EngineInfo]:
        """All engines, then each one that changes."""
        known: dict[str, EngineInfo] = {}
        while True:
            changed = self._changed.next()
            for info in self.engines():
                if known.get(info.name) != info:
                    known[info.name] = info
                    yield info
            await asyncio.shield(changed)

    def loaded_count(self) -> int:
        """Engines that have a process, on its way in or out included."""
        return len(self._loaded)

    def preload(self, names: tuple[str, ...]) -> None:
        """Load these in the background; failures are logged and on the engine."""

        async def load(name: str) -> None:
            try:
                await self.load(name)
            except EdgeAgentError as error:
                log.error(
                    "engine_preload_failed", engine=name, reason=error.reason, error=str(error)
                )

        for name in names:
            self._spawn(load(name))

    async def stop(self) -> None:
        """Unload everything, busy or not."""
        for task in (*self._loads.values(), *self._background):
            task.cancel()
        await asyncio.gather(*self._loads.values(), *self._background, return_exceptions=True)
        for loaded in self._loaded.values():
            loaded.become(EngineState.STOPPING)  # so that its end is not taken for a loss
        stops = [each.host.stop(self.settings.unload_timeout_s) for each in self._loaded.values()]
        for outcome in await asyncio.gather(*stops, return_exceptions=True):
            if isinstance(outcome, WorkerError):
                log.error("engine_unload_unproven", reason=outcome.reason, error=str(outcome))
        self._loaded.clear()

    # --- loading ---

    async def _ensure_loaded(self, name: str, on_state: OnState) -> LoadedEngine:
        task = self._loads.get(name)
        if task is None:
            task = self._loads[name] = asyncio.create_task(self._load(name))
            task.add_done_callback(lambda done: self._load_ended(name, done))
        on_state(RunState.LOADING, None)
        observers = self._load_observers.setdefault(name, set())
        observers.add(on_state)
        try:
            return await asyncio.shield(task)
        finally:
            observers.discard(on_state)
            if not observers:
                self._load_observers.pop(name, None)
            if name in self._loaded:
                self._loaded[name].arrived(on_state)

    def _load_ended(self, name: str, task: "asyncio.Task[LoadedEngine]") -> None:
        del self._loads[name]
        if not task.cancelled():
            task.exception()  # retrieved here too: whoever asked may be gone

    async def _load(self, name: str) -> LoadedEngine:
        async with self._transition:
            loaded = self._loaded.get(name)
            if loaded is not None and loaded.state is EngineState.READY:
                loaded.arriving.update(self._load_observers.get(name, ()))
                return loaded
            manifest = self._catalogue.get(name)
            self._check_files(name)
            if loaded is not None:  # lost, or not proven to be gone
                await self._unload(name, loaded)
            await self._make_room()
            return await self._start(manifest)

    def _check_files(self, name: str) -> None:
        """Sizes only: reading the files is `engines verify`'s."""
        violations = self._catalogue.quick_check(name)
        if violations:
            wrong = "; ".join(f"{each.field}: {each.description}" for each in violations)
            error = LoadFailed(
                f"engine {name}: {wrong}; install it again",
                reason="ENGINE_FILES_WRONG",
                metadata={"engine": name, "files": wrong},
            )
            self._failures[name] = error.as_run_error()
            self._changed.notify()
            raise error

    async def _make_room(self) -> None:
        while True:
            residents = [
                Resident(name, each.active + each.waiting, each.last_used_s)
                for name, each in self._loaded.items()
            ]
            victim = choose_victim(residents, self.settings.max_resident_engines)
            if victim is None:
                return
            await self._unload(victim, self._loaded[victim])

    async def _start(self, manifest: Manifest) -> LoadedEngine:
        name, settings = manifest.name, self.settings
        self._failures.pop(name, None)
        host = EngineHost(manifest, settings.worker(manifest))
        loaded = self._loaded[name] = LoadedEngine(host, self._changed.notify)
        self._changed.notify()

        def progressed(fraction: float) -> None:
            # The backend and the file counter report independently; it never goes back.
            if fraction <= (loaded.progress or 0.0):
                return
            loaded.progress = fraction
            for observer in tuple(self._load_observers.get(name, ())):
                observer(RunState.LOADING, fraction)
            self._changed.notify()

        directory = self._catalogue.directory(name)
        try:
            async with asyncio.timeout(settings.load_timeout_s):
                await host.start(directory, settings.options(manifest), progressed)
        except TimeoutError:
            message = f"engine {name} was not loaded within {settings.load_timeout_s:g} s"
            await self._load_failed(name, loaded, LoadFailed(message, reason="LOAD_TIMEOUT"))
        except LoadFailed as error:
            await self._load_failed(name, loaded, error)
        except asyncio.CancelledError:
            await asyncio.shield(host.stop(settings.unload_timeout_s))
            raise
        loaded.arriving.update(self._load_observers.get(name, ()))
        loaded.become(EngineState.READY)
        host.lost.add_done_callback(lambda lost: self._lost(name, loaded, lost.result()))
        log.info(
            "engine_loaded",
            engine=name,
            pid=host.pid,
            load_s=host.load_s,
            slots=host.slots,
            backend_version=host.backend_version,
        )
        return loaded

    async def _load_failed(self, name: str, loaded: LoadedEngine, error: LoadFailed) -> None:
        log.error("engine_load_failed", engine=name, reason=error.reason, error=str(error))
        await self._bury(name, loaded, error)
        raise error

    async def _unload(self, name: str, loaded: LoadedEngine) -> None:
        """Drain, end the process, and prove that it is gone. Holds the transition lock."""
        await loaded.all_arrived()
        if loaded.state is EngineState.READY:
            loaded.become(EngineState.DRAINING)
            await loaded.drained()
        if loaded.state is EngineState.DRAINING:
            loaded.become(EngineState.STOPPING)
        try:
            await loaded.host.stop(self.settings.unload_timeout_s)
        except WorkerError as error:
            loaded.become(EngineState.FAILED, error.as_run_error())
            log.error("engine_unload_unproven", engine=name, reason=error.reason, error=str(error))
            raise
        if self._loaded.get(name) is loaded:
            del self._loaded[name]
        self._changed.notify()
        log.info("engine_unloaded", engine=name)

    def _lost(self, name: str, loaded: LoadedEngine, error: WorkerError) -> None:
        """A worker ended by itself; its steps have failed already."""
        if loaded.state not in {EngineState.READY, EngineState.DRAINING}:
            return
        log.error("worker_lost", engine=name, pid=loaded.host.pid, reason=error.reason)
        self._spawn(self._bury(name, loaded, error))

    async def _bury(self, name: str, loaded: LoadedEngine, error: WorkerError) -> None:
        """Remember why the engine failed, and take it out once its process is proven gone."""
        self._failures[name] = error.as_run_error()
        loaded.become(EngineState.FAILED, error.as_run_error())
        with contextlib.suppress(WorkerError):  # tried again, and reported, at the next load
            await loaded.host.stop(self.settings.unload_timeout_s)
            if self._loaded.get(name) is loaded:
                del self._loaded[name]
            self._changed.notify()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _info(self, manifest: Manifest) -> EngineInfo:
        loaded = self._loaded.get(manifest.name)
        failure = loaded.error if loaded else self._failures.get(manifest.name)
        absent = EngineState.FAILED if failure else EngineState.INSTALLED
        state = loaded.state if loaded else absent
        return EngineInfo(
            name=manifest.name,
            digest=manifests.digest(manifest),
            backend=manifest.backend.name,
            state=state,
            context_tokens=(loaded.host if loaded else manifest).context_tokens,
            max_output_tokens=manifest.max_output_tokens,
            load_peak_bytes=manifest.memory.load_peak_bytes,
            steady_bytes=manifest.memory.steady_bytes,
            capabilities=manifest.capabilities,
            licence=manifest.licence,
            worker=loaded.worker_info() if loaded else None,
            error=failure,
            load_progress=loaded.progress if state is EngineState.LOADING and loaded else None,
        )
