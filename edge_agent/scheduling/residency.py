"""The processes of resident engines: begins loads and unloads, follows them, reports their ends.

Carries out what the planner has decided, and tells it what came of it; one engine moves at a time.
Remembers of each engine how long its last load took and why it failed.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import structlog

from edge_agent.core import EngineInfo, EngineState, RunError, WorkerInfo
from edge_agent.engines import manifest as manifests
from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.host import EngineHost
from edge_agent.engines.manifest import Manifest
from edge_agent.engines.protocol import Options
from edge_agent.errors import EdgeAgentError, LoadFailed, WorkerError
from edge_agent.scheduling.backoff import Backoff
from edge_agent.scheduling.failures import Failure, out_of_memory
from edge_agent.scheduling.footfall import Footfall
from edge_agent.scheduling.footprint import estimate
from edge_agent.scheduling.loading import Loader, LoadingSettings, LoadTrouble
from edge_agent.scheduling.planner import LOST, Planner
from edge_agent.scheduling.values import EngineFacts, Refuse

_START_S, _READ_BYTES_PER_S = 0.5, 500e6
"""Of an engine that was never loaded here: its process starts, and its files are read and copied.
Assumed; the first load is measured."""

log = structlog.get_logger()


@dataclass(slots=True)
class _Hosted:
    """A resident engine's process, and how far its load has come."""

    host: EngineHost
    progress: float | None = None
    ready: bool = False
    loading: "asyncio.Task[None] | None" = None
    footfall: Footfall | None = None
    most_tokens: int = 0
    measuring: bool = False
    unloading: "asyncio.Future[None] | None" = None


@dataclass(slots=True)
class _History:
    """What is remembered of an engine's last loads."""

    load_s: float | None = None
    error: RunError | None = None
    backoff: Backoff = field(default_factory=Backoff)


@dataclass(frozen=True, slots=True)
class Reports:
    """Who is told what.

    `progressed` of a load, `refused` for each step that a failed load has ended, and `changed`
    whenever the planner has something to decide.
    """

    progressed: Callable[[str, float], None]
    refused: Callable[[Refuse], None]
    changed: Callable[[], None]


class Residency:
    """The engines that have a process. All methods on the daemon's loop."""

    def __init__(
        self,
        catalogue: Catalogue,
        planner: Planner,
        loader: Loader,
        settings: Callable[[], LoadingSettings],
        reports: Reports,
    ) -> None:
        """None has one."""
        self._catalogue = catalogue
        self._planner = planner
        self._loader = loader
        self._settings = settings
        self._reports = reports
        self._hosted: dict[str, _Hosted] = {}
        self._histories: dict[str, _History] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._stopping = False

    def __len__(self) -> int:
        return len(self._hosted)

    def host(self, name: str) -> EngineHost:
        """The process of a resident engine."""
        return self._hosted[name].host

    def facts(self, manifest: Manifest) -> tuple[Options, EngineFacts]:
        """How an engine would be loaded, and what the planner must know of it.

        Raises:
            LoadFailed: it can't be loaded as configured; remembered as its failure.
        """
        try:
            options = self._settings().options(manifest)
        except LoadFailed as error:
            self.failed(manifest.name, error)
            raise
        load_s = self.load_s(manifest.name)
        now_s = asyncio.get_running_loop().time()
        refusal = self._loader.quarantine.refusal(manifest) or self.refusal(manifest, now_s)
        shape = (options.slots, options.context_tokens)
        return options, EngineFacts(
            name=manifest.name,
            footprint=self._loader.footprints.of(manifest, *shape),
            slots=options.slots,
            kv_tokens=options.slots * options.context_tokens,
            load_s=_expected_load_s(manifest) if load_s is None else load_s,
            cache_bytes=manifest.memory.cache_bytes,
            refusal=refusal,
        )

    def load_s(self, name: str) -> float | None:
        """How long its last load took; None when it was never loaded."""
        history = self._histories.get(name)
        return history.load_s if history else None

    def info(self, manifest: Manifest) -> EngineInfo:
        """An installed engine as it is now."""
        name, state = manifest.name, self._state(manifest.name)
        hosted = self._hosted.get(name)
        history = self._histories.get(name, _History())
        state_now = self._planner.state
        leak = state_now.leaks.get(name)
        shape = self._shape(manifest)
        estimated = estimate(manifest, *shape)
        footprint = self._loader.footprints.of(manifest, *shape)
        return EngineInfo(
            name=name,
            digest=manifests.digest(manifest),
            backend=manifest.backend.name,
            state=state,
            context_tokens=(hosted.host if hosted else manifest).context_tokens,
            max_output_tokens=manifest.max_output_tokens,
            load_peak_bytes=footprint.load_peak_bytes,
            steady_bytes=footprint.steady_bytes,
            capabilities=manifest.capabilities,
            licence=manifest.licence,
            worker=self._worker(name, hosted.host) if hosted else None,
            error=None if state is EngineState.READY else history.error,
            load_progress=hosted.progress if hosted and state is EngineState.LOADING else None,
            pinned=name in state_now.pins,
            quarantined=self._loader.quarantine.refusal(manifest) is not None,
            leaked_bytes=leak.missing_bytes if leak else 0,
            measurements=self._loader.footprints.history(manifest, *shape),
            estimated_load_peak_bytes=estimated.load_peak_bytes,
            estimated_steady_bytes=estimated.steady_bytes,
            template_hash=manifests.template_hash(manifest),
        )

    def failed(self, name: str, error: LoadFailed) -> None:
        """Remember why an engine can't be loaded, where that is known without trying."""
        self._histories.setdefault(name, _History()).error = error.as_run_error()

    def refusal(self, manifest: Manifest, now_s: float) -> EdgeAgentError | None:
        """Why an engine is not tried now, after its last loads; None when it may be."""
        history = self._histories.get(manifest.name)
        if history is None:
            return None
        return history.backoff.refusal(now_s, lambda: self._loader.files(manifest))

    def forgive(self, name: str | None = None) -> None:
        """Forget the failures of an engine, or of all: the next step may try it again."""
        for each, history in self._histories.items():
            if name in (None, each):
                history.backoff.forgive()

    async def release(self, manifest: Manifest) -> None:
        """Forget an engine's failures, and what it was measured to take."""
        self.forgive(manifest.name)
        await self._loader.footprints.forget(manifest, *self._shape(manifest))

    def begin_load(self, name: str, attempt: int) -> None:
        """Start an engine's process and load it."""
        history = self._histories.setdefault(name, _History())
        history.error = None
        try:
            manifest = self._catalogue.get(name)
        except EdgeAgentError as error:  # removed, or broken, since its step came
            self._load_failed(name, attempt, LoadTrouble(error, Failure.OTHER))
            return
        hosted = _Hosted(self._loader.new_host(manifest, self._settings()))
        self._hosted[name] = hosted
        hosted.loading = self._spawn(self._load(name, hosted, attempt))
        hosted.loading.add_done_callback(lambda loading: self._load_ended(name, attempt, loading))

    def begin_unload(self, name: str) -> None:
        """End an engine's process."""
        hosted = self._hosted[name]
        hosted.unloading = asyncio.get_running_loop().create_future()
        self._spawn(self._unload(name, hosted, hosted.unloading))

    async def unloaded(self, name: str) -> None:
        """Wait until an engine that is on its way out is gone."""
        hosted = self._hosted.get(name)
        if hosted is not None and hosted.unloading is not None:
            await asyncio.shield(hosted.unloading)

    def kill(self, name: str) -> None:
        """End an engine's process at once, whatever it does."""
        hosted = self._hosted[name]
        log.error("engine_killed", engine=name, why="HARD_FLOOR", pid=hosted.host.pid)
        hosted.host.kill()
        if hosted.ready:
            self.begin_unload(name)
        elif hosted.loading is not None:
            hosted.loading.cancel()

    def step_ended(self, name: str, tokens: int) -> None:
        """A step with so many tokens, prompt and output, has gone through the engine."""
        hosted = self._hosted.get(name)
        if hosted is None or not hosted.ready or tokens <= hosted.most_tokens:
            return
        hosted.most_tokens = tokens
        if hosted.footfall is not None and not hosted.measuring:
            hosted.measuring = True
            self._spawn(self._measure_again(name, hosted, hosted.footfall))

    async def stop(self) -> None:
        """End every process, busy or not."""
        self._stopping = True
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        timeout_s = self._settings().unload_timeout_s
        stops = [each.host.stop(timeout_s) for each in self._hosted.values()]
        for outcome in await asyncio.gather(*stops, return_exceptions=True):
            if isinstance(outcome, WorkerError):
                log.error("engine_unload_unproven", reason=outcome.reason, error=str(outcome))
        for hosted in self._hosted.values():
            if hosted.unloading is not None and not hosted.unloading.done():
                hosted.unloading.set_result(None)
        self._hosted.clear()

    async def _load(self, name: str, hosted: _Hosted, attempt: int) -> None:
        try:
            footfall = await self._loader.load(
                hosted.host,
                self._settings(),
                lambda fraction: self._progressed(name, fraction),
                again=attempt > 1,
            )
        except LoadTrouble as trouble:
            self._load_failed(name, attempt, trouble)
        else:
            self._loaded(name, hosted, footfall)
            self._spawn(self._settle(name, hosted, footfall))
        self._reports.changed()

    def _load_ended(self, name: str, attempt: int, loading: "asyncio.Task[None]") -> None:
        """A load that was cancelled, maybe before it began, was killed for memory."""
        if loading.cancelled() and not self._stopping:
            self._load_failed(name, attempt, _killed(name))
            self._reports.changed()

    async def _settle(self, name: str, hosted: _Hosted, footfall: Footfall) -> None:
        """What a load has taken in its last moments shows only at telemetry's next look."""
        if not footfall.of_process:
            await self._loader.observed()
            if not self._stays(name, hosted):
                return
            await footfall.look(hosted.host)
        await self._learn(name, hosted, footfall)

    async def _measure_again(self, name: str, hosted: _Hosted, footfall: Footfall) -> None:
        """After the largest step since the load."""
        raised = await footfall.look_again(hosted.host)
        hosted.measuring = False
        if raised:
            await self._learn(name, hosted, footfall)

    async def _learn(self, name: str, hosted: _Hosted, footfall: Footfall) -> None:
        """What was seen counts at once, for the engine in memory too, and is kept."""
        footprint = self._loader.learn(hosted.host.manifest, footfall)
        if self._stays(name, hosted):
            self._planner.remeasured(name, footprint.steady_bytes, footfall.held_bytes)
            self._reports.changed()
        await self._loader.footprints.keep()

    def _stays(self, name: str, hosted: _Hosted) -> bool:
        return self._hosted.get(name) is hosted and hosted.unloading is None

    def _loaded(self, name: str, hosted: _Hosted, footfall: Footfall) -> None:
        host, held_bytes, history = hosted.host, footfall.held_bytes, self._histories[name]
        hosted.ready, hosted.progress, hosted.footfall = True, None, footfall
        history.backoff.forgive()
        now_s = asyncio.get_running_loop().time()
        self._planner.loaded(name, host.slots, held_bytes, now_s)
        history.load_s = self._planner.state.residents[name].facts.load_s
        host.lost.add_done_callback(lambda lost: self._lost(name, hosted, lost.result()))
        log.info(
            "engine_loaded",
            engine=name,
            pid=host.pid,
            load_s=host.load_s,
            slots=host.slots,
            held_bytes=held_bytes,
            backend_version=host.backend_version,
        )

    def _load_failed(self, name: str, attempt: int, trouble: LoadTrouble) -> None:
        hosted = self._hosted.pop(name, None)
        error, failure = trouble.error, trouble.failure
        retry = failure is not Failure.OTHER
        again = retry and attempt == 1
        if retry and not again:
            needed = self._planner.state.residents[name].committed_bytes
            available = self._planner.state.machine.memory.available_bytes
            error = out_of_memory(name, failure, needed, available, error.message)
        log.error(
            "engine_load_failed",
            engine=name,
            reason=error.reason,
            error=str(error),
            attempt=attempt,
            again=again,
        )
        if not again:
            history = self._histories[name]
            history.error = error.as_run_error()
            if hosted is not None:
                files = self._loader.files(hosted.host.manifest)
                history.backoff.failed(error, files, asyncio.get_running_loop().time())
        for refused in self._planner.load_failed(name, error, retry=retry):
            self._reports.refused(refused)

    def _progressed(self, name: str, fraction: float) -> None:
        hosted = self._hosted.get(name)
        if hosted is not None and fraction > (hosted.progress or 0.0):
            hosted.progress = fraction
            self._reports.progressed(name, fraction)

    async def _unload(self, name: str, hosted: _Hosted, ended: "asyncio.Future[None]") -> None:
        held = self._planner.state.residents[name].held_bytes
        try:
            missing = await self._loader.unload(hosted.host, held, self._settings())
        except Exception:  # whatever it is: an engine must not stay on its way for ever
            log.exception("engine_unload_broke", engine=name)
            missing = held
        del self._hosted[name]
        if missing:
            self._planner.leaked(name, missing)
            log.error("engine_memory_leaked", engine=name, missing_bytes=missing)
        else:
            self._planner.gone(name)
            log.info("engine_unloaded", engine=name)
        ended.set_result(None)
        self._reports.changed()

    def _lost(self, name: str, hosted: _Hosted, error: WorkerError) -> None:
        """A worker ended by itself; its steps have failed already."""
        if self._stopping or hosted.unloading is not None:
            return
        log.error("worker_lost", engine=name, pid=hosted.host.pid, reason=error.reason)
        self._histories[name].error = error.as_run_error()
        self._planner.lost(name)
        self.begin_unload(name)
        self._reports.changed()

    def _state(self, name: str) -> EngineState:
        resident = self._planner.state.residents.get(name)
        if resident is not None:
            return EngineState.FAILED if resident.why == LOST else resident.state
        if name in self._planner.state.leaks:
            return EngineState.LEAKED
        failed = self._histories.get(name, _History()).error is not None
        return EngineState.FAILED if failed else EngineState.INSTALLED

    def _shape(self, manifest: Manifest) -> tuple[int, int]:
        """Slots and context, as configured; as in the manifest where that can't be."""
        try:
            options = self._settings().options(manifest)
        except LoadFailed:
            return manifest.slots, manifest.context_tokens
        return options.slots, options.context_tokens

    def _worker(self, name: str, host: EngineHost) -> WorkerInfo:
        resident = self._planner.state.residents.get(name)
        active = len(resident.running) if resident else 0
        waiting = self._planner.state.queue.count(name)
        return WorkerInfo(host.pid, host.slots, active, waiting, host.load_s)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def _expected_load_s(manifest: Manifest) -> float:
    """How long a first load may take."""
    return _START_S + sum(spec.size_bytes for spec in manifest.files) / _READ_BYTES_PER_S


def _killed(name: str) -> LoadTrouble:
    message = f"engine {name}: memory fell below the hard floor while it was loaded"
    error = LoadFailed(message, reason="OUT_OF_MEMORY", metadata={"engine": name})
    return LoadTrouble(error, Failure.MEMORY)
