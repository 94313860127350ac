"""Brings engines into memory and takes them out: one transition at a time. No clock, no I/O.

Under pressure engines go; otherwise the first step whose engine is not in memory decides which one
comes. A plan's victims drain and leave; a plan is given up when somebody whose turn is sooner wants
one of them.
"""

import math
from collections.abc import Iterator

from edge_agent.core import EngineState, Priority
from edge_agent.scheduling import refusals
from edge_agent.scheduling.eviction import Blocked, LoadPlan, TooLarge, plan_load, still_holds
from edge_agent.scheduling.pressure import Level
from edge_agent.scheduling.queue import Key
from edge_agent.scheduling.residents import Resident
from edge_agent.scheduling.state import State
from edge_agent.scheduling.values import (
    Action,
    DropCache,
    Kill,
    Load,
    Preempt,
    QueuedStep,
    Unload,
)

_MAX_PREEMPTIONS = 3
"""After so many a step is not preempted again: it has been delayed enough."""


class RoomMaker:
    """Decides loads, unloads and kills over the shared state."""

    def __init__(self, state: State) -> None:
        """No plan yet."""
        self._state = state
        self._plan: LoadPlan | None = None
        self.wake_s = math.inf
        self.second_attempts: set[str] = set()

    def relieve(self) -> Iterator[Action]:
        """Below a floor: idle engines go one by one, and below the hard one workers are killed."""
        state = self._state
        stopping = [each for each in state.residents.values() if each.state is EngineState.STOPPING]
        if state.level is Level.NORMAL or stopping:
            return
        self._abandon_plan()
        if state.level is Level.HARD:
            least = min(state.residents.values(), key=self._importance, default=None)
            if least is not None:
                least.state, least.why = EngineState.STOPPING, "HARD_FLOOR"
                yield Kill(least.name)
            return
        idle = min(state.idle(), key=lambda each: (each.last_used_s, each.name), default=None)
        if idle is not None:
            yield self._unload(idle, "SOFT_FLOOR")

    def make_way(self, now_s: float) -> Iterator[Action]:
        """Bring in the engine whose step is next; make room first where it must be made."""
        state = self._state
        self.wake_s = math.inf
        while state.level is Level.NORMAL and not state.in_transition():
            head = state.next_load()
            self._review_plan(head)
            if head is None:
                return
            key, step = head
            plan = self._plan or self._choose(key, step, now_s)
            if isinstance(plan, TooLarge):
                yield from state.refuse_all(step.engine, refusals.too_large(plan))
                continue
            if isinstance(plan, Blocked):
                self.wake_s = math.inf if plan.until_s is None else plan.until_s
                return
            yield from self._carry_out(plan, step, now_s)
            return

    def preempt_for(self, resident: Resident, key: Key, step: QueuedStep) -> Iterator[Preempt]:
        """One at a time: the running BATCH step whose turn would have come last."""
        runs = resident.running.values()
        if step.priority is Priority.BATCH or any(run.preempting for run in runs):
            return
        victims = [
            run
            for run in runs
            if run.step.preemptible
            and run.key > key
            and self._state.preemptions.get(run.step.id, 0) < _MAX_PREEMPTIONS
        ]
        if victims:
            victim = max(victims, key=lambda run: run.key)
            victim.preempting = True
            yield Preempt(victim.step, step)

    def _choose(self, key: Key, step: QueuedStep, now_s: float) -> LoadPlan | Blocked | TooLarge:
        if step.engine in self.second_attempts:  # everything idle goes, whatever the ledger says
            victims = sorted(resident.name for resident in self._state.idle())
            if victims:
                return LoadPlan(step.engine, key, tuple(victims))
        return plan_load(self._state.scene(), step.engine, key, step, now_s)

    def _review_plan(self, head: tuple[Key, QueuedStep] | None) -> None:
        """Keep the plan while it is for whoever is next, its victims may go, and some are left."""
        plan = self._plan
        if plan is None:
            return
        left = [name for name in plan.victims if name in self._state.residents]
        for_next = head is not None and head[1].engine == plan.engine
        if not left or not for_next or not still_holds(self._state.scene(), plan):
            self._abandon_plan()

    def _carry_out(self, plan: LoadPlan, step: QueuedStep, now_s: float) -> Iterator[Action]:
        for name in plan.drop_caches:
            resident = self._state.residents[name]
            resident.committed_bytes -= resident.cache_bytes
            resident.held_bytes = max(0, resident.held_bytes - resident.cache_bytes)
            resident.cache_bytes = 0
            yield DropCache(name)
        if plan.victims:
            self._plan = plan
            yield from self._drain(plan)
        else:
            yield self._begin_load(plan.engine, step, now_s)

    def _begin_load(self, engine: str, step: QueuedStep, now_s: float) -> Load:
        facts = self._state.facts[engine]
        attempt = 2 if engine in self.second_attempts else 1
        self._state.residents[engine] = Resident(
            facts,
            asked_s=now_s,
            attempt=attempt,
            committed_bytes=facts.footprint.load_peak_bytes,
            lease=None if step.load_only else step.id,
        )
        return Load(engine, attempt)

    def _drain(self, plan: LoadPlan) -> Iterator[Action]:
        """The victims take no more steps; whoever is empty goes."""
        head = self._state.queue.head(plan.engine)
        for name in plan.victims:
            victim = self._state.residents.get(name)
            if victim is None or victim.state is EngineState.STOPPING:
                continue
            victim.state, victim.why = EngineState.DRAINING, plan.engine
            if not victim.running:
                yield self._unload(victim, "ROOM")
            elif head is not None:
                yield from self.preempt_for(victim, *head)

    def _unload(self, resident: Resident, why: str) -> Unload:
        resident.state, resident.why = EngineState.STOPPING, why
        return Unload(resident.name, why)

    def _abandon_plan(self) -> None:
        """Who still drains for it takes steps again."""
        plan, self._plan = self._plan, None
        for name in plan.victims if plan else ():
            victim = self._state.residents.get(name)
            if victim is not None and victim.state is EngineState.DRAINING:
                victim.state, victim.why = EngineState.READY, ""

    def _importance(self, resident: Resident) -> tuple[bool, bool, int, int, str]:
        """Smallest goes first: not pinned, still loading, least urgent work, most memory."""
        ranks = [run.step.priority.rank for run in resident.running.values()]
        return (
            resident.name in self._state.pins,
            resident.state is not EngineState.LOADING,
            -min(ranks, default=len(Priority)),
            -resident.committed_bytes,
            resident.name,
        )
