"""The policies that the benchmark compares: the production core, and today's peers as described.

The peers are written from descriptions of what they do, never from their code; where a description
is silent they are given what is better for them. They know no classes, no deadlines and no
fairness, so their queues are first come, first served. All get the same slots per engine.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks._sched_devices import Device, Engine
from benchmarks._sched_workloads import Trace
from edge_agent.core import Priority
from edge_agent.errors import EdgeAgentError, Overloaded
from edge_agent.scheduling.pace import Served
from edge_agent.scheduling.planner import Planner
from edge_agent.scheduling.values import (
    Action,
    Kill,
    Load,
    MachineView,
    Memory,
    QueuedStep,
    Refuse,
    Start,
    Unload,
)

_KEEP_ALIVE_S = 300.0
_FREE_SHARE = 0.8
_USED_SHARE = 0.95
_RECLAIM_S = 5.0
_BUSY_TRIES_S = 30.0


class Ours:
    """The planner that the daemon runs, driven by simulated reports."""

    verified = True
    keeps_steps = True

    def __init__(self, trace: Trace) -> None:
        """All engines of the device are installed; pinned ones are asked for at the start."""
        device = trace.device
        memory = Memory(device.total_bytes, device.total_bytes - device.others_bytes)
        self.planner = Planner(device.rules(), MachineView(memory))
        for engine in device.engines:
            self.planner.know(engine.facts())
        self.planner.state.pins = set(trace.pins)
        for number, name in enumerate(sorted(trace.pins), 1):
            ask = QueuedStep(-number, name, "preload", Priority.NORMAL, 0.0, 0, load_only=True)
            self.planner.submit(ask, 0.0)
        self.observe = self.planner.observe
        self.first_token = self.planner.first_token
        self.preempted = self.planner.preempted
        self.decide = self.planner.decide
        self.wake_s = self.planner.wake_s

    def submit(self, step: QueuedStep, now_s: float) -> bool:
        """False: its deadline can't be met."""
        try:
            self.planner.submit(step, now_s)
        except EdgeAgentError:
            return False
        return True

    def ended(self, step: QueuedStep, now_s: float, served: Served) -> None:
        """It says how fast the engine is."""
        self.planner.ended(step, now_s, served)

    def loaded(self, engine: Engine, now_s: float) -> None:
        """What it was seen to take is what it takes."""
        self.planner.loaded(engine.name, engine.slots, engine.steady_bytes, now_s)

    def gone(self, engine: str, now_s: float) -> None:
        """Its memory is back."""
        del now_s
        self.planner.gone(engine)


@dataclass(slots=True)
class _Process:
    engine: Engine
    last_used_s: float
    ready: bool = False
    expiring: bool = False
    stopping: bool = False
    running: set[int] = field(default_factory=set)
    queue: deque[QueuedStep] = field(default_factory=deque)

    @property
    def used(self) -> bool:
        return bool(self.running or self.queue or not self.ready)


class Peer:
    """What the peers share: engines take steps as they come, as many as they have slots."""

    verified = False
    keeps_steps = False

    def __init__(self, trace: Trace) -> None:
        """Nothing is in memory."""
        self.device: Device = trace.device
        self.processes: dict[str, _Process] = {}
        self.pins = trace.pins
        self.actions: list[Action] = []
        self.available_bytes = 0
        self.wake_at_s: float | None = None

    def observe(self, machine: MachineView) -> None:
        """Only free memory is looked at."""
        self.available_bytes = machine.memory.available_bytes or 0

    def submit(self, step: QueuedStep, now_s: float) -> bool:
        """Into the engine's own queue where it is in memory, else to whoever places it."""
        process = self.processes.get(step.engine)
        if process is not None and not process.expiring and not process.stopping:
            process.queue.append(step)
            process.last_used_s = now_s
            return True
        return self.place(step, now_s)

    def place(self, step: QueuedStep, now_s: float) -> bool:
        """A step whose engine is not in memory; False: it is turned away."""
        raise NotImplementedError

    def make_way(self, now_s: float) -> None:
        """Decide loads and evictions."""
        raise NotImplementedError

    def first_token(self, step: QueuedStep) -> None:
        """Nothing follows from it."""

    def preempted(self, step: QueuedStep, now_s: float) -> None:
        """Never decided."""

    def ended(self, step: QueuedStep, now_s: float, served: Served) -> None:
        """A slot is free."""
        del served
        process = self.processes.get(step.engine)
        if process is not None:
            process.running.discard(step.id)
            process.last_used_s = now_s

    def loaded(self, engine: Engine, now_s: float) -> None:
        """It takes steps."""
        self.processes[engine.name].ready = True
        self.processes[engine.name].last_used_s = now_s

    def gone(self, engine: str, now_s: float) -> None:
        """Who waited in it gets an error."""
        del now_s
        process = self.processes.pop(engine)
        self.actions += [Refuse(step, _error()) for step in process.queue]

    def decide(self, now_s: float) -> Sequence[Action]:
        """What was decided since, then loads and evictions, then free slots."""
        self.wake_at_s = None
        self.make_way(now_s)
        for process in self.processes.values():
            while (
                process.ready
                and not process.stopping
                and process.queue
                and len(process.running) < process.engine.slots
            ):
                step = process.queue.popleft()
                process.running.add(step.id)
                process.last_used_s = now_s
                self.actions.append(Start(step))
        actions, self.actions = self.actions, []
        return actions

    def wake_s(self) -> float | None:
        """When a time-out of its own comes."""
        return self.wake_at_s

    def wake_by(self, at_s: float) -> None:
        """Ask again at this time, or sooner."""
        self.wake_at_s = at_s if self.wake_at_s is None else min(self.wake_at_s, at_s)

    def load(self, name: str, now_s: float) -> _Process:
        """Bring an engine in, whatever there is room for."""
        self.actions.append(Load(name, 1))
        self.processes[name] = _Process(self.device.engine(name), now_s)
        return self.processes[name]

    def end(self, name: str) -> None:
        """End a process, with whatever it does."""
        process = self.processes[name]
        process.stopping = True
        self.actions.append(Kill(name) if process.used else Unload(name, "evicted"))

    def least_recent(self, *, idle_only: bool) -> str | None:
        """The least recently used one; pinned ones stay."""
        found = [
            process
            for name, process in self.processes.items()
            if not process.stopping and name not in self.pins and not (idle_only and process.used)
        ]
        if not found:
            return None
        return min(found, key=lambda each: (each.last_used_s, each.engine.name)).engine.name


class KeepAliveOrder(Peer):
    """Keep-alive order, name tie-break and an 80 % rule, as described of Ollama.

    One step at a time is placed and blocks all behind it whose engine is not in memory; steps for
    an engine in memory pass it. The prediction must fit 80 % of free memory, or of what the
    predictions of loaded engines leave, or one engine is evicted: idle first, shortest keep-alive,
    then by name. A busy one takes no new steps and is waited for. The first engine always loads.
    Five minutes unused and an engine goes; a pinned one is kept alive for ever, so it goes last.
    That freed memory is back is not verified on integrated GPUs.
    """

    def __init__(self, trace: Trace) -> None:
        """Nobody waits."""
        super().__init__(trace)
        self.pending: deque[QueuedStep] = deque()

    def place(self, step: QueuedStep, now_s: float) -> bool:
        """Behind all who wait."""
        del now_s
        self.pending.append(step)
        return True

    def make_way(self, now_s: float) -> None:
        """Time-outs, then whoever is first."""
        for name, process in self.processes.items():
            if process.used or process.stopping:
                continue
            due_s = process.last_used_s + _KEEP_ALIVE_S
            if process.expiring or (due_s <= now_s and name not in self.pins):
                self.end(name)
            elif name not in self.pins:
                self.wake_by(due_s)
        while self.pending and self._placed(self.pending[0], now_s):
            self.pending.popleft()

    def _placed(self, step: QueuedStep, now_s: float) -> bool:
        process = self.processes.get(step.engine)
        if process is not None and not process.expiring and not process.stopping:
            process.queue.append(step)
            return True
        moving = any(
            each.stopping or each.expiring or not each.ready for each in self.processes.values()
        )
        if process is not None or moving:
            return False
        if not self.processes or self._fits(self.device.engine(step.engine)):
            self.load(step.engine, now_s).queue.append(step)
            return True
        victim = min(
            self.processes.values(),
            key=lambda each: (each.used, each.engine.name in self.pins, each.engine.name),
        )
        victim.expiring = True
        if not victim.used:
            self.end(victim.engine.name)
        return False

    def _fits(self, engine: Engine) -> bool:
        predicted = sum(each.engine.steady_bytes for each in self.processes.values())
        free = min(self.available_bytes, self.device.total_bytes - predicted)
        return engine.steady_bytes <= _FREE_SHARE * free


class LeastRecentByCount(Peer):
    """Least recently used beyond a number of engines, as described of llama-server's router.

    No look at memory. The victim may serve or load: its work is lost, and its clients come back.
    While one makes place, others whose engine is not in memory are turned away. The number is the
    largest with which any of the engines in use fit, as who runs it would set it.
    """

    def __init__(self, trace: Trace) -> None:
        """Nobody waits."""
        super().__init__(trace)
        self.limit = trace.device.count_that_fits(trace.engines())
        self.pins = frozenset()
        self.next_up: deque[QueuedStep] = deque()

    def place(self, step: QueuedStep, now_s: float) -> bool:
        """At once, or when its victim has gone."""
        stopping = step.engine in self.processes
        if stopping or (self.next_up and self.next_up[0].engine != step.engine):
            return False
        if not self.next_up and len(self.processes) >= self.limit:
            victim = self.least_recent(idle_only=False)
            if victim is None:
                return False
            self.end(victim)
        self.next_up.append(step)
        self._load_next(now_s)
        return True

    def make_way(self, now_s: float) -> None:
        """Load for whom a place was made."""
        self._load_next(now_s)

    def _load_next(self, now_s: float) -> None:
        if self.next_up and len(self.processes) < self.limit:
            self.load(self.next_up[0].engine, now_s).queue.extend(self.next_up)
            self.next_up.clear()


class ReclaimAbove95(Peer):
    """Least recently used by number, and a reclaimer above 95 %, as described of LocalAI.

    Before a load, the least recently used engine that is not busy goes; where all are busy it is
    tried again each second, thirty times, then loaded all the same. Each interval (5 s, assumed),
    if more than 95 % of memory is in use, the least recently used idle engine goes.
    """

    def __init__(self, trace: Trace) -> None:
        """Nobody waits."""
        super().__init__(trace)
        self.limit = trace.device.count_that_fits(trace.engines())
        self.wanted: dict[str, list[QueuedStep]] = {}
        self.since_s: dict[str, float] = {}
        self.next_try_s: dict[str, float] = {}
        self.reclaim_s = 0.0

    def place(self, step: QueuedStep, now_s: float) -> bool:
        """With all who wait for the engine."""
        self.wanted.setdefault(step.engine, []).append(step)
        self.since_s.setdefault(step.engine, now_s)
        return True

    def make_way(self, now_s: float) -> None:
        """The reclaimer, then each engine that is wanted."""
        self._reclaim(now_s)
        for name in list(self.wanted):
            if name in self.processes:
                continue  # on its way out
            if len(self.processes) >= self.limit and now_s < self.next_try_s.get(name, 0.0):
                self.wake_by(self.next_try_s[name])
                continue
            self.next_try_s[name] = now_s + 1.0
            idle = self.least_recent(idle_only=True)
            late = now_s - self.since_s[name] >= _BUSY_TRIES_S
            stopping = any(each.stopping for each in self.processes.values())
            if len(self.processes) < self.limit or (late and idle is None and not stopping):
                self.load(name, now_s).queue.extend(self.wanted.pop(name))
                del self.since_s[name], self.next_try_s[name]
            elif not stopping and idle is not None:
                self.end(idle)
            else:
                self.wake_by(now_s + 1.0)

    def _reclaim(self, now_s: float) -> None:
        if now_s >= self.reclaim_s:
            self.reclaim_s = now_s + _RECLAIM_S
            used = 1.0 - self.available_bytes / self.device.total_bytes
            idle = self.least_recent(idle_only=True)
            if used > _USED_SHARE and idle is not None:
                self.end(idle)
        if self.processes:
            self.wake_by(self.reclaim_s)


PEERS: dict[str, type[Peer]] = {
    "keep-alive order": KeepAliveOrder,
    "LRU by count": LeastRecentByCount,
    "reclaim above 95 %": ReclaimAbove95,
}


def _error() -> EdgeAgentError:
    return Overloaded("its engine was unloaded", metadata={}, retry_after_s=1.0)
