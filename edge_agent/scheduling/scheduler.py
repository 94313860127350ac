"""The one owner of what is in memory and of the order of steps.

Feeds the planner with what happens and carries out what it decides. Between reading the planner's
state and acting on it nothing is awaited; whatever takes time runs beside and reports back. Runs on
the daemon's loop, whose clock is the only one, and never blocks it.
"""

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

import structlog

from edge_agent.core import (
    EngineInfo,
    EngineState,
    Priority,
    RunState,
    StepOrigin,
    StepRequest,
    StepResult,
)
from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.host import EngineHost, OnText
from edge_agent.engines.manifest import Manifest
from edge_agent.engines.protocol import Options
from edge_agent.errors import (
    EdgeAgentError,
    FailedPrecondition,
    Unavailable,
)
from edge_agent.scheduling.explain import explain, memory_status
from edge_agent.scheduling.footprints import Footprints
from edge_agent.scheduling.loading import Loader, LoadingSettings, NewHost
from edge_agent.scheduling.machine import Machine
from edge_agent.scheduling.pending import OnState, PendingStep, queued_step
from edge_agent.scheduling.planner import Planner
from edge_agent.scheduling.quarantine import Quarantine
from edge_agent.scheduling.residency import Reports, Residency
from edge_agent.scheduling.steps import Steps
from edge_agent.scheduling.values import (
    Action,
    DropCache,
    Kill,
    Load,
    MachineView,
    Preempt,
    QueuedStep,
    Ready,
    Refuse,
    Rules,
    Start,
    Unload,
)
from edge_agent.status import MemoryStatus, StepWait
from edge_agent.wakeup import Wakeup

DAEMON = "edge-agent"
"""The client of what the daemon itself wants."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """From the configuration; replaced as a whole on reload. `pinned`: never evicted."""

    rules: Rules
    loading: LoadingSettings
    pinned: frozenset[str] = frozenset()


class Scheduler:
    """Loads, unloads, and decides steps. All methods on the daemon's loop."""

    def __init__(
        self,
        catalogue: Catalogue,
        settings: SchedulerSettings,
        machine: Machine,
        *,
        footprints: Footprints | None = None,
        quarantine: Quarantine | None = None,
        new_host: NewHost = EngineHost,
    ) -> None:
        """Nothing is loaded yet. Without `footprints` and `quarantine` nothing is remembered."""
        self._settings = settings
        self._catalogue = catalogue
        self._footprints = footprints or Footprints(None, "")
        self._quarantine = quarantine or Quarantine(None, "")
        self._loader = Loader(catalogue, machine, self._footprints, self._quarantine, new_host)
        self._planner = Planner(settings.rules, machine.view())
        self._planner.state.pins.update(settings.pinned)
        self._residency = Residency(
            catalogue,
            self._planner,
            self._loader,
            lambda: self._settings.loading,
            Reports(self._progressed, self._carry_out, self._turn),
        )
        self._steps = Steps(self._planner, self._residency, self._turn)
        self._probe: PendingStep | None = None
        self._ids = itertools.count(1)
        self._changed = Wakeup()
        self._background: set[asyncio.Task[None]] = set()
        self._releasing = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._deciding = False
        self._stopping = False

    @property
    def settings(self) -> SchedulerSettings:
        """What is in force."""
        return self._settings

    @settings.setter
    def settings(self, settings: SchedulerSettings) -> None:
        self._settings = settings
        self._planner.state.rules = settings.rules
        self._planner.state.pins = set(settings.pinned)
        self._residency.forgive()
        self._turn()

    @property
    def moves(self) -> int:
        """How much steps have moved: texts and results that have come from workers."""
        return self._steps.moves

    @property
    def planner(self) -> Planner:
        """What is decided from; to be read only."""
        return self._planner

    # --- steps ---

    async def decide(
        self,
        engine: str,
        request: StepRequest,
        origin: StepOrigin,
        *,
        on_text: OnText,
        on_state: OnState,
    ) -> StepResult:
        """Decide one step: wait for the engine and a place in it, then for the worker.

        Cancelling this returns at once; the place is free when the worker has let go.

        Args:
            engine: an installed engine's name.
            request: what is to be decided.
            origin: whose step it is, how urgent, and by when.
            on_text: told each piece of the answer and its number of tokens.
            on_state: told QUEUED, LOADING (with progress) and RUNNING as they come.

        Raises:
            NotFound, LoadFailed, WorkerError, StepFailed, Overloaded, DeadlineExceeded: as they
                say.
        """
        manifest, options = self._know(engine)
        step = queued_step(
            next(self._ids),
            engine,
            request,
            origin,
            self._now_s(),
            context_tokens=options.context_tokens,
            max_output_tokens=manifest.max_output_tokens,
        )
        result = await self._steps.run(PendingStep(step, request, on_text, on_state))
        assert result is not None  # noqa: S101 - only steps that load end without one
        return result

    async def probe(self, engine: str, request: StepRequest, origin: StepOrigin) -> None:
        """Decide a step on an engine that is in memory, through the queue; it is never loaded.

        Raises:
            Unavailable: it is not in memory, or leaves before the step has a place.
            EdgeAgentError: as `decide`.
        """
        _, options = self._know(engine)
        step = queued_step(
            next(self._ids),
            engine,
            request,
            origin,
            self._now_s(),
            context_tokens=options.context_tokens,
            max_output_tokens=1,
        )
        step = dataclasses.replace(step, probe=True)
        self._probe = PendingStep(step, request, _ignore_text, _ignore_state)
        await self._steps.run(self._probe)

    async def load(self, name: str) -> EngineInfo:
        """Load an engine, or wait for whoever does.

        Raises:
            NotFound, LoadFailed, DeadlineExceeded: as they say.
        """
        self._residency.forgive(name)
        self._know(name)
        loading, now_s = self._settings.loading, self._now_s()
        attempt_s = loading.load_timeout_s + loading.unload_timeout_s
        step = QueuedStep(
            id=next(self._ids),
            engine=name,
            client=DAEMON,
            priority=Priority.NORMAL,
            asked_s=now_s,
            need_tokens=0,
            deadline_s=now_s + 2 * attempt_s,
            load_only=True,
        )
        await self._steps.run(PendingStep(step, StepRequest(()), _ignore_text, _ignore_state))
        return self.engine(name)

    # --- engines ---

    def engines(self) -> tuple[EngineInfo, ...]:
        """All installed engines, by name."""
        return tuple(self._residency.info(manifest) for manifest in self._catalogue.list())

    def engine(self, name: str) -> EngineInfo:
        """One installed engine.

        Raises:
            NotFound: not installed.
        """
        return self._residency.info(self._catalogue.get(name))

    async def unload(self, name: str) -> EngineInfo:
        """Unload an idle engine; returns once its process is gone.

        Raises:
            NotFound: not installed.
            FailedPrecondition: reason ENGINE_BUSY, steps use it or wait for it.
        """
        self._catalogue.get(name)
        # Nobody is refused because of a probe.
        while not self._stopping and self._probe_runs_on(name):
            await self._changed.next()
        if self._planner.unload(name):
            self._residency.begin_unload(name)
        await self._residency.unloaded(name)
        return self.engine(name)

    def pin(self, name: str, *, pinned: bool) -> EngineInfo:
        """Keep an engine in memory whatever else is asked for, until it is unpinned or a reload.

        Raises:
            NotFound: not installed.
        """
        self._catalogue.get(name)
        pins = self._planner.state.pins
        (pins.add if pinned else pins.discard)(name)
        self._turn()
        return self.engine(name)

    async def release(self, name: str) -> EngineInfo:
        """Forget what is held against an engine.

        Boots that ended in its load, a leak, failed loads, and what it was measured to take.

        Raises:
            NotFound: not installed.
            FailedPrecondition: reason STATE_NOT_WRITABLE, the disk does not forget the boots.
        """
        manifest = self._catalogue.get(name)
        async with self._releasing:
            try:
                await asyncio.to_thread(self._quarantine.release, manifest)
            except OSError as error:
                raise FailedPrecondition(
                    f"engine {name}: the release could not be written, it stays as it is: {error}",
                    reason="STATE_NOT_WRITABLE",
                    metadata={"engine": name, "cause": str(error)},
                ) from error
        self._planner.release(name)
        await self._residency.release(manifest)
        self._turn()
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
        return len(self._residency)

    def explain(self, run_id: str = "") -> tuple[StepWait, ...]:
        """Why each waiting step waits, in the order in which they are expected to go."""
        return explain(self._planner.state, self._now_s(), run_id)

    def memory(self) -> MemoryStatus:
        """What is left for engines."""
        return memory_status(self._planner.state)

    def problems(self) -> tuple[str, ...]:
        """What an operator must look at: engines in quarantine, memory that did not come back.

        Raises:
            ManifestError: the store can't be read.
        """
        refusals = [self._quarantine.refusal(manifest) for manifest in self._catalogue.list()]
        leaks = self._planner.state.leaks.items()
        return (
            *(refusal.message for refusal in refusals if refusal),
            *(
                f"engine {name}: {leak.missing_bytes} bytes did not come back when its process "
                f"ended; `edge-agent engines release {name}` counts them as free again"
                for name, leak in leaks
            ),
        )

    def step_counts(self) -> tuple[int, int]:
        """How many steps wait and how many run."""
        state = self._planner.state
        running = sum(len(resident.running) for resident in state.residents.values())
        return len(state.queue), running

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

    def observe(self, view: MachineView) -> None:
        """Telemetry has a new view of the machine."""
        before = self._planner.state.level
        self._planner.observe(view)
        self._loader.observe(view)
        level = self._planner.state.level
        if level is not before:
            available = view.memory.available_bytes
            log.warning("memory_pressure", floor=level.name, available_bytes=available)
        self._turn()

    async def stop(self) -> None:
        """Unload everything, busy or not."""
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._residency.stop()
        self._steps.stop()
        self._changed.notify()

    # --- the loop: decide, carry out, come back when time alone changes something ---

    def _turn(self) -> None:
        if self._deciding or self._stopping:
            return
        self._deciding = True
        try:
            self._end_homeless_probe()
            while actions := self._planner.decide(self._now_s()):
                for action in actions:
                    self._carry_out(action)
        finally:
            self._deciding = False
        self._steps.tell_waiting()
        self._set_timer()
        self._changed.notify()

    def _probe_runs_on(self, name: str) -> bool:
        resident = self._planner.state.residents.get(name)
        return bool(resident and self._probe and self._probe.step.id in resident.running)

    def _end_homeless_probe(self) -> None:
        """Before decisions are made: no engine is loaded for a probe."""
        probe = self._probe
        if probe is None or probe.done.done() or probe.sequence is not None:
            return
        resident = self._planner.state.residents.get(probe.step.engine)
        if resident is None or resident.state is not EngineState.READY:
            self._planner.withdraw(probe.step.id)
            self._steps.refuse(
                probe.step, Unavailable(f"engine {probe.step.engine} is not in memory")
            )

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        wake_s = self._planner.wake_s()
        loop = asyncio.get_running_loop()
        self._timer = None if wake_s is None else loop.call_at(wake_s, self._turn)

    def _carry_out(self, action: Action) -> None:
        match action:
            case Start(step=step):
                self._steps.start(step)
            case Ready(step=step):
                self._steps.ready(step)
            case Refuse(step=step, error=error):
                self._steps.refuse(step, error)
            case Preempt(step=step, by=by):
                self._steps.preempt(step, by)
            case Load(engine=name, attempt=attempt):
                self._residency.begin_load(name, attempt)
            case Unload(engine=name, why=why):
                log.info("engine_evicted", engine=name, why=why)
                self._residency.begin_unload(name)
            case Kill(engine=name):
                self._steps.put_off(name)
                self._residency.kill(name)
            case DropCache(engine=name):
                self._residency.host(name).drop_cache()

    def _progressed(self, name: str, fraction: float) -> None:
        self._steps.tell_progress(name, fraction)
        self._changed.notify()

    def _know(self, name: str) -> tuple[Manifest, Options]:
        """Look an engine up, and tell the planner what it is now.

        Raises:
            NotFound: not installed.
            LoadFailed: it can't be loaded as configured.
        """
        manifest = self._catalogue.get(name)
        options, facts = self._residency.facts(manifest)
        self._planner.know(facts)
        return manifest, options

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _ignore_text(_text: str, _tokens: int) -> None:
    """Of what is only loaded."""


def _ignore_state(_state: RunState, _progress: float | None) -> None:
    """Of what is only loaded."""
