"""Brings engines into memory and takes them out: one transition at a time. No clock, no I/O.

Under pressure engines go; otherwise the first step whose engine is not in memory decides which one
comes. A plan's victims drain and leave; a plan is given up when somebody whose turn is sooner wants
one of them, or when nobody needs to go any more.
"""

import math
from collections.abc import Iterator

from edge_agent.core import EngineState, Priority
from edge_agent.errors import EdgeAgentError
from edge_agent.scheduling import refusals
from edge_agent.scheduling.eviction import (
    Blocked,
    LoadPlan,
    TooLarge,
    plan_load,
    still_enough,
    still_holds,
)
from edge_agent.scheduling.pressure import Level
from edge_agent.scheduling.queue import Key
from edge_agent.scheduling.residents import Resident, Running
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
from edge_agent.status import WaitReason

_MAX_PREEMPTIONS = 3
"""After so many a step is not preempted again: it has been delayed enough."""


class RoomMaker:
    """Decides loads, unloads and kills over the shared state.

    `wake_s` is when time alone may bring a load. `resumed`: an engine that drained takes steps
    again. `second_attempts` are engines whose load has failed once for want of memory.
    """

    def __init__(self, state: State) -> None:
        """No plan yet."""
        self._state = state
        self._plan: LoadPlan | None = None
        self.wake_s = math.inf
        self.resumed = False
        self.second_attempts: set[str] = set()

    def relieve(self) -> Iterator[Action]:
        """Below a floor: idle engines go one by one, and below the hard one workers are killed."""
        state = self._state
        stopping = [each for each in state.residents.values() if each.state is EngineState.STOPPING]
        if state.level is Level.NORMAL or stopping or state.reading_is_old:
            return  # what goes or has gone may be enough
        self._abandon_plan()
        if state.level is Level.HARD:
            least = min(state.residents.values(), key=self._importance, default=None)
            if least is not None:
                least.state, least.why = EngineState.STOPPING, "HARD_FLOOR"
                yield Kill(least.name)
            return
        idle = min(state.idle(), key=lambda each: (each.last_used_s, each.name), default=None)
        if idle is not None and not state.in_transition():
            yield self._unload(idle, "SOFT_FLOOR")

    def make_way(self, now_s: float) -> Iterator[Action]:
        """Bring in the engine whose step is next; make room first where it must be made."""
        state = self._state
        self.wake_s = math.inf
        self.second_attempts.intersection_update(state.queue.engines())
        self._review_plan()
        if state.level is not Level.NORMAL or state.in_transition():
            return
        for key, step in state.next_loads():
            plan = self._choose(key, step, now_s)
            if isinstance(plan, EdgeAgentError):
                yield from state.refuse_all(step.engine, plan)
                continue
            if isinstance(plan, Blocked) and plan.until_s is not None:
                self.wake_s = min(self.wake_s, plan.until_s)
            if isinstance(plan, Blocked) and plan.reason is WaitReason.ROOM:
                continue  # nothing that could go would do: who comes in now is not in its way
            if plan is not self._plan:
                self._abandon_plan()
            if isinstance(plan, Blocked):
                return
            yield from self._carry_out(plan, key, step, now_s)
            return
        self._abandon_plan()

    def preempt_for(self, resident: Resident, key: Key, step: QueuedStep) -> Iterator[Preempt]:
        """Make a place for a waiting step, unless it would not get one even so."""
        victims = self._preemptible(resident, key, step)
        without = {run.step.id for run in victims}
        if resident.has_place(step, self._state.parallel(resident, step), without):
            yield from self._preempt(resident, victims, step)

    def _preemptible(self, resident: Resident, key: Key, step: QueuedStep) -> list[Running]:
        """Running BATCH steps whose turn is later."""
        if step.priority is Priority.BATCH:
            return []
        return [
            run
            for run in resident.running.values()
            if run.step.preemptible
            and run.key > key
            and self._state.preemptions[run.step.id] < _MAX_PREEMPTIONS
        ]

    def _preempt(
        self, resident: Resident, victims: list[Running], step: QueuedStep
    ) -> Iterator[Preempt]:
        """One at a time: whose turn would have come last."""
        if victims and not any(run.preempting for run in resident.running.values()):
            victim = max(victims, key=lambda run: run.key)
            victim.preempting = True
            yield Preempt(victim.step, step)

    def _choose(
        self, key: Key, step: QueuedStep, now_s: float
    ) -> LoadPlan | Blocked | EdgeAgentError:
        """The plan that is under way, unless it is not needed or not enough; else a new one."""
        state, engine = self._state, step.engine
        if (refusal := state.facts[engine].refusal) is not None:
            return refusal
        under_way = self._plan if self._plan and self._plan.engine == engine else None
        if engine in self.second_attempts:  # everything idle goes, whatever the ledger says
            idle = tuple(sorted(resident.name for resident in state.idle()))
            if under_way or idle:
                return under_way or LoadPlan(engine, key, idle)
        if under_way and still_enough(state.scene(), under_way):
            return under_way
        found = plan_load(state.scene(), engine, key, step, now_s)
        if isinstance(found, TooLarge):
            return refusals.too_large(found)
        if isinstance(found, Blocked):
            makes_room = found.reason is not WaitReason.ROOM
        else:
            makes_room = bool(found.victims)
        return under_way if under_way and makes_room else found

    def _review_plan(self) -> None:
        """Keep the plan while somebody waits for its engine, its victims may go, some are left."""
        plan = self._plan
        if plan is None:
            return
        head = self._state.queue.head(plan.engine, probes=False)
        left = any(name in self._state.residents for name in plan.victims)
        if head is None or not left or not still_holds(self._state.scene(), plan, head[0]):
            self._abandon_plan()

    def _carry_out(
        self, plan: LoadPlan, key: Key, step: QueuedStep, now_s: float
    ) -> Iterator[Action]:
        for name in plan.drop_caches:
            resident = self._state.residents[name]
            resident.committed_bytes -= resident.cache_bytes
            resident.held_bytes = max(0, resident.held_bytes - resident.cache_bytes)
            resident.cache_bytes = 0
            yield DropCache(name)
        if plan.victims:
            self._plan = plan
            yield from self._drain(plan, key, step)
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

    def _drain(self, plan: LoadPlan, key: Key, step: QueuedStep) -> Iterator[Action]:
        """The victims take no more steps; those that are empty go one by one."""
        victims = [
            self._state.residents[name] for name in plan.victims if name in self._state.residents
        ]
        for victim in victims:
            victim.state, victim.why = EngineState.DRAINING, plan.engine
            yield from self._preempt(victim, self._preemptible(victim, key, step), step)
        empty = next((victim for victim in victims if not victim.running), None)
        if empty is not None:
            yield self._unload(empty, "ROOM")

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
                self.resumed = True

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
