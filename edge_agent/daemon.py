"""The composition root: builds the parts, starts, reloads, drains and stops them.

Decides nothing about runs or engines.
"""

import asyncio
import contextlib
import gc
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from edge_agent import __version__, durable, memory_lock, paths
from edge_agent.api.server import ApiServers
from edge_agent.config import Config, load_config, needs_restart
from edge_agent.engines.catalogue import Catalogue
from edge_agent.epoch import next_epoch
from edge_agent.errors import ConfigError, LedgerFailed, ManifestError
from edge_agent.ledger.absent import AbsentLedger
from edge_agent.ledger.ledger import Ledger
from edge_agent.notify import ServiceManager
from edge_agent.observability import logging
from edge_agent.runs.acknowledged import AcknowledgedRuns, LedgerJournal, LedgerRecords
from edge_agent.runs.halts import HaltLatch
from edge_agent.runs.holding import Resources
from edge_agent.runs.runs import Runs
from edge_agent.runs.stored_sessions import StoredSessions
from edge_agent.scheduling.footprints import FOOTPRINTS, Footprints
from edge_agent.scheduling.machine import TelemetryMachine
from edge_agent.scheduling.probe import Probe, Stuck
from edge_agent.scheduling.quarantine import Quarantine, read_boot_id
from edge_agent.scheduling.scheduler import Scheduler
from edge_agent.settings import (
    context_problem,
    ledger_settings,
    request_limits,
    run_settings,
    scheduler_settings,
    tools_settings,
)
from edge_agent.status import DaemonState, DaemonStatus, HoldStatus
from edge_agent.telemetry.recorder import Recorder
from edge_agent.telemetry.sampler import Sampler
from edge_agent.telemetry.snapshot import TelemetrySnapshot
from edge_agent.tools.tools import DaemonTools

LAST_GOOD_CONFIG = "config.last-good.yaml"
HALTS = "halts.json"
EPOCH = "epoch"
_CLOSE_STREAMS_S = 2.0
_STOP_MARGIN_S = 10.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Locations:
    """Where the daemon reads and writes. `config` None: what `default_config_path` finds."""

    config: Path | None
    runtime_dir: Path
    state_dir: Path
    engines_dir: Path | None = None


@dataclass(slots=True)
class ConfigFile:
    """The configuration in force, and why it is not the one in the file, if it is not.

    `path` None: the built-in defaults.
    """

    locations: Locations
    environ: Mapping[str, str]
    config: Config = field(default_factory=Config)
    path: Path | None = None
    problem: str = ""

    def start(self) -> None:
        """Read it, or the last known good one.

        Raises:
            ConfigError: it is broken, and no good one is known.
        """
        try:
            self.reload()
        except ConfigError as error:
            last_good = self.locations.state_dir / LAST_GOOD_CONFIG
            if not last_good.exists():
                raise
            try:
                self.config = self._load(last_good)
            except ConfigError:  # of an older release, say: the file's own errors are what helps
                raise error from None
            self.path = last_good
            self.problem = f"running on the last known good configuration: {error.message}"

    def reload(self) -> tuple[str, ...]:
        """Read it again; returns the keys that need a restart.

        Raises:
            ConfigError: it is broken; what was in force stays so.
        """
        try:
            path = self.locations.config or paths.default_config_path(self.environ)
            new = self._load(path)
        except ConfigError as error:
            self.problem = f"the configuration was not reloaded: {error.message}"
            raise
        changed = needs_restart(self.config, new)
        self.config, self.path, self.problem = new, path, ""
        if path is not None:
            self._keep_last_good(path)
        return changed

    def _load(self, path: Path | None) -> Config:
        config = load_config(path, {**self.environ, "STATE_DIRECTORY": str(self._state_dir)})
        if self.locations.engines_dir is not None:
            config = config.model_copy(update={"engines_dir": self.locations.engines_dir})
        return config

    @property
    def _state_dir(self) -> Path:
        return self.locations.state_dir

    def _keep_last_good(self, path: Path) -> None:
        try:
            durable.replace(self._state_dir / LAST_GOOD_CONFIG, path.read_bytes())
        except OSError as error:  # a full disk is no reason to refuse a good configuration
            log.warning("last_good_config_not_kept", error=str(error))


class Daemon:
    """Everything that runs in the daemon's process."""

    def __init__(self, file: ConfigFile, manager: ServiceManager) -> None:
        """Build the parts; nothing runs yet. `file` has been started."""
        self._file = file
        self._manager = manager
        self._started_s = time.time()
        self._started_monotonic_s = time.monotonic()
        self._draining = False
        self._telling: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        config = file.config
        assert config.engines_dir is not None  # noqa: S101 - load_config fills it in
        self._catalogue = Catalogue(config.engines_dir)
        state_dir, sysroot = file.locations.state_dir, config.telemetry.sysroot
        latch = HaltLatch(state_dir / HALTS)
        self._sampler = Sampler(
            sysroot, interval_s=config.telemetry.interval_s, on_snapshot=self._hand_over
        )
        self._machine = TelemetryMachine(self._sampler, sysroot)
        self._scheduler = Scheduler(
            self._catalogue,
            scheduler_settings(config, self._machine.part, self._machine.total_bytes),
            self._machine,
            footprints=Footprints(state_dir / FOOTPRINTS, self._machine.device),
            quarantine=Quarantine(state_dir, read_boot_id(sysroot)),
        )
        self._recorder = Recorder(self.telemetry)
        self._tools = DaemonTools(
            tools_settings(config), status=self._device_status, on_change=self._set_limits
        )
        self._set_limits()
        self._ledger = _open_ledger(state_dir, config)
        sessions = StoredSessions(self._ledger)
        journal = LedgerJournal(self._ledger, sessions.memory)
        self._runs = Runs(
            self._scheduler,
            latch,
            run_settings(config),
            recorder=self._recorder,
            daemon_tools=self._tools,
            records=LedgerRecords(self._ledger),
            journal=journal,
            resources=Resources(next_epoch(state_dir / EPOCH, self._started_s)),
            sessions=sessions.memory,
        )
        self._acknowledged = AcknowledgedRuns(self._runs, self._ledger, journal, sessions)
        self._probe = Probe(
            self._scheduler,
            lambda: self._file.config.scheduling.probe_interval_s,
            self._health_changed,
        )
        self._servers = ApiServers(
            file.locations.runtime_dir,
            runs=self._acknowledged,
            engines=self._scheduler,
            daemon=self,
            limits=lambda: self._limits,
        )

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; the second one cuts the grace period short."""
        self._handle_signals()
        await self._acknowledged.recover()
        await self._servers.start()
        self._sampler.start()
        await self._tools.start()
        gc.freeze()  # what is built by now stays: the collector need not look at it at every call
        own = [asyncio.create_task(self._feed_watchdog()), asyncio.create_task(self._probe.run())]
        try:
            await self._servers.set_serving(serving=True)
            self._manager.ready(self._status_line())
            log.info(
                "daemon_ready",
                version=__version__,
                socket=str(self._servers.api_socket),
                engines=str(self._catalogue.root),
                ready_ms=round((time.monotonic() - self._started_monotonic_s) * 1000),
                degraded=list(self._degraded_reasons()),
            )
            self._scheduler.preload(self._file.config.preload)
            await self._stop.wait()
            await self._shut_down()
        finally:
            await self._scheduler.stop()
            await self._tools.stop()
            self._sampler.stop()
            for task in own:
                task.cancel()
            await self._ledger.close()
        log.info("daemon_stopped")

    def status(self) -> DaemonStatus:
        """How the daemon is."""
        reasons, installed = self._look()
        state = DaemonState.DEGRADED if reasons else DaemonState.READY
        path = self._file.path
        waiting, running = self._scheduler.step_counts()
        return DaemonStatus(
            version=__version__,
            state=DaemonState.DRAINING if self._draining else state,
            degraded_reasons=reasons,
            pid=os.getpid(),
            started_at_s=self._started_s,
            uptime_s=time.monotonic() - self._started_monotonic_s,
            runs=self._runs.counts(),
            engines_installed=installed,
            engines_loaded=self._scheduler.loaded_count(),
            max_resident_engines=self._file.config.scheduling.max_resident_engines,
            memory=self._scheduler.memory(),
            waiting_steps=waiting,
            running_steps=running,
            halts=self._runs.halts(),
            holds=self._holds(),
            config_path=str(path) if path else "",
        )

    def telemetry(self) -> TelemetrySnapshot:
        """The machine as it was last seen, as old as that is by now."""
        return self._sampler.latest

    def reload(self) -> tuple[str, ...]:
        """Read the configuration again; returns the keys that need a restart.

        Raises:
            ConfigError: it is broken; what was in force stays so.
        """
        self._manager.reloading()
        try:
            changed = self._file.reload()
            config = self._file.config
            logging.set_level(config.log.level)
            self._scheduler.settings = scheduler_settings(
                config, self._machine.part, self._machine.total_bytes
            )
            self._runs.settings = run_settings(config)
            self._set_limits()
            log.info("config_reloaded", needs_restart=list(changed))
        except ConfigError as error:
            log.error("config_reload_failed", error=error.message)
            raise
        finally:
            self._manager.ready(self._status_line())
        return changed

    def drain(self) -> None:
        """Accept no new runs from now on."""
        self._draining = True
        self._runs.stop_accepting()
        self._manager.status(self._status_line())

    async def _shut_down(self) -> None:
        """Let runs finish, end the rest with a final event, then hang up."""
        grace_s = self._file.config.shutdown.grace_s
        self.drain()
        self._manager.stopping(self._status_line())
        self._manager.extend_timeout(grace_s + _STOP_MARGIN_S)
        log.info("daemon_draining", grace_s=grace_s)
        await self._servers.set_serving(serving=False)
        draining = asyncio.create_task(self._runs.drain(grace_s))
        hurry = asyncio.create_task(self._stop_now.wait())
        await asyncio.wait({draining, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not draining.done():
            draining.cancel()
            await self._runs.drain(0)
        # Engines first: the lock goes with the servers, and who takes it next needs the memory.
        await self._scheduler.stop()
        await self._servers.stop(_CLOSE_STREAMS_S)

    def _holds(self) -> tuple[HoldStatus, ...]:
        return tuple(
            HoldStatus(
                resource=resource,
                run_id=holder.run_id,
                tool_call_id=holder.call_id,
                tool=holder.tool,
                client=holder.client,
                agent=holder.agent,
                holding=holder.holding.value,
            )
            for resource, holder in sorted(self._runs.holders().items())
        )

    def _set_limits(self) -> None:
        """What requests may ask for, as the configuration and the tools that are up have it."""
        self._limits = request_limits(self._file.config, self._default_engine, self._tools.tools())

    def _device_status(self) -> dict[str, object]:
        """What the tool `device_status` tells a model; unknown is null."""
        snapshot = self.telemetry()
        return {
            "memory_available_bytes": snapshot.mem_available_bytes,
            "memory_total_bytes": snapshot.mem_total_bytes,
            "hottest_zone": snapshot.hottest.fresh,
            "power_mode": self._recorder.power_mode(),
            "power_mw": snapshot.power_mw.fresh,
            "throttled": snapshot.is_throttled,
            "engines": {each.name: each.state for each in self._scheduler.engines()},
        }

    def _hand_over(self, snapshot: TelemetrySnapshot) -> None:
        """From the sampler's thread to this loop."""
        self._loop.call_soon_threadsafe(self._observe, snapshot)

    def _observe(self, snapshot: TelemetrySnapshot) -> None:
        self._recorder.observe(snapshot)
        self._scheduler.observe(self._machine.seen(snapshot))

    def _health_changed(self, stuck: Stuck | None) -> None:
        """Health says what the probe has found."""
        if not self._draining:
            self._telling = asyncio.create_task(self._servers.set_serving(serving=stuck is None))
            self._manager.status(self._status_line())

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()

        def stop() -> None:
            if self._stop.is_set():
                self._stop_now.set()
            self._stop.set()

        def reload() -> None:
            if self._stop.is_set():  # READY must not follow STOPPING
                return
            with contextlib.suppress(ConfigError):  # logged, and in the status
                self.reload()

        loop.add_signal_handler(signal.SIGTERM, stop)
        loop.add_signal_handler(signal.SIGINT, stop)
        loop.add_signal_handler(signal.SIGHUP, reload)

    async def _feed_watchdog(self) -> None:
        """From this loop and nothing else: a daemon whose loop hangs is restarted."""
        while self._manager.watchdog_s is not None:
            self._manager.alive()
            await asyncio.sleep(self._manager.watchdog_s / 3)

    def _default_engine(self) -> str | None:
        """As configured, else the only one there is."""
        configured = self._file.config.runs.default_engine
        installed = () if configured else self._catalogue.list()
        return installed[0].name if len(installed) == 1 else configured

    def _degraded_reasons(self) -> tuple[str, ...]:
        return self._look()[0]

    def _look(self) -> tuple[tuple[str, ...], int]:
        """What is wrong, and how many engines are installed."""
        reasons = [self._file.problem] if self._file.problem else []
        reasons += [self._probe.stuck.text] if self._probe.stuck else []
        reasons += self._ledger.degraded
        reasons += self._tools.problems()
        try:
            installed, broken = self._catalogue.contents()
        except ManifestError as error:
            return (*reasons, f"engine store: {error.message}"), 0
        reasons += [f"engine {each.name}: {each.description}" for each in broken]
        wrong = (context_problem(self._file.config, manifest) for manifest in installed)
        reasons += [f"{each.field}: {each.description}" for each in wrong if each]
        reasons += self._scheduler.problems()
        return tuple(reasons), len(installed)

    def _status_line(self) -> str:
        if self._draining:
            return "draining: no new runs"
        reasons = self._degraded_reasons()
        return f"degraded: {reasons[0].splitlines()[0]}" if reasons else "ready: accepting runs"


def _open_ledger(state_dir: Path, config: Config) -> Ledger | AbsentLedger:
    """The ledger; without one the daemon comes up all the same, and takes no durable runs."""
    try:
        return Ledger.open(state_dir, ledger_settings(config))
    except LedgerFailed as error:
        log.error("ledger_not_opened", error=error.message)
        return AbsentLedger(error)


def main(
    config_path: Path | None = None,
    runtime_dir: Path | None = None,
    state_dir: Path | None = None,
    engines_dir: Path | None = None,
) -> int:
    """Run the daemon in this process until it is told to stop; returns the exit code.

    What is None comes from the environment (see `paths`).

    Raises:
        ConfigError: the configuration is broken, and no good one is known.
        FailedPrecondition: another daemon or something else is in the way.
    """
    environ = os.environ
    locations = Locations(
        config=config_path,
        runtime_dir=runtime_dir or paths.runtime_dir(environ),
        state_dir=state_dir or paths.state_dir(environ),
        engines_dir=engines_dir,
    )
    locations.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    locations.runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = ConfigFile(locations, environ)
    file.start()
    logging.configure(file.config.log.level, file.config.log.format)
    memory_lock.lock()
    if file.problem:
        log.error("config_degraded", problem=file.problem)

    async def serve() -> None:
        await Daemon(file, ServiceManager(environ)).run()

    asyncio.run(serve())
    return 0
