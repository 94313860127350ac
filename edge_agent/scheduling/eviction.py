"""Which engine is loaded next, and which must go for it. Pure, over the planner's records.

Strictly in the order of the queue: an engine that would fit is not loaded past one that waits for
room, or the larger one would wait for ever.
"""

import dataclasses
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from edge_agent.core import EngineState, Priority
from edge_agent.scheduling.budget import (
    Candidate,
    Reservation,
    ceiling_bytes,
    choose_victims,
    room_bytes,
)
from edge_agent.scheduling.pace import Demand
from edge_agent.scheduling.queue import Key, StepQueue
from edge_agent.scheduling.residents import Leak, Resident
from edge_agent.scheduling.values import EngineFacts, Memory, QueuedStep, Rules
from edge_agent.status import WaitReason

_HORIZON_S = 60.0
"""An engine that is wanted again within this time should not have gone."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The engine to load, and those that go first. `key` is its first step's."""

    engine: str
    key: Key
    victims: tuple[str, ...] = ()
    drop_caches: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Blocked:
    """No load now: why, because of which engines, and until when, where that is known.

    `missing_bytes`: of memory; 0 or less when only a place is missing.
    """

    engine: str
    reason: WaitReason
    missing_bytes: int
    engines: tuple[str, ...] = ()
    until_s: float | None = None


@dataclass(frozen=True, slots=True)
class TooLarge:
    """It can never fit beside what must stay: `needed_bytes` against `most_bytes`."""

    engine: str
    needed_bytes: int
    most_bytes: int
    pinned: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that the choice looks at."""

    memory: Memory
    rules: Rules
    facts: Mapping[str, EngineFacts]
    residents: Mapping[str, Resident]
    leaks: Mapping[str, Leak]
    pins: AbstractSet[str]
    demands: Mapping[str, Demand]
    queue: StepQueue

    @property
    def ledger(self) -> tuple[Reservation, ...]:
        """What is reserved now."""
        residents = [resident.reservation for resident in self.residents.values()]
        return (*residents, *(leak.reservation for leak in self.leaks.values()))


def plan_load(
    scene: Scene, engine: str, key: Key, step: QueuedStep, now_s: float
) -> LoadPlan | Blocked | TooLarge:
    """How `engine` gets into memory for `step`, the first that waits for it."""
    facts = scene.facts[engine]
    need = facts.footprint.load_peak_bytes
    missing = need - room_bytes(scene.memory, scene.ledger, scene.rules)
    places = 1 + len(scene.residents) - scene.rules.max_resident_engines
    if missing <= 0 and places <= 0:
        return LoadPlan(engine, key)
    too_large = _never_fits(scene, facts)
    if too_large is not None:
        return too_large
    caches = _caches_to_drop(scene, missing) if places <= 0 else ()
    if caches:
        return LoadPlan(engine, key, drop_caches=caches)
    return _plan_victims(scene, LoadPlan(engine, key), step, missing, places, now_s)


def still_holds(scene: Scene, plan: LoadPlan, key: Key) -> bool:
    """Whether a plan's victims may still be taken: none serves somebody whose turn is sooner.

    `key` is that of the engine's first step now.
    """
    for name in plan.victims:
        victim = scene.residents.get(name)
        if victim is None or victim.state is EngineState.STOPPING:
            continue
        if name in scene.pins or victim.lease is not None or _serves_sooner(scene, name, key):
            return False
    return True


def still_enough(scene: Scene, plan: LoadPlan) -> bool:
    """Whether a plan's victims are needed, and free enough, as things are now."""
    need = scene.facts[plan.engine].footprint.load_peak_bytes
    missing = need - room_bytes(scene.memory, scene.ledger, scene.rules)
    places = 1 + len(scene.residents) - scene.rules.max_resident_engines
    victims = [scene.residents[name] for name in plan.victims if name in scene.residents]
    frees = sum(victim.committed_bytes for victim in victims)
    return (missing > 0 or places > 0) and frees >= missing and len(victims) >= places


def _never_fits(scene: Scene, facts: EngineFacts) -> TooLarge | None:
    need, most = facts.footprint.load_peak_bytes, ceiling_bytes(scene.memory, scene.rules)
    if need > most:
        return TooLarge(facts.name, need, most)
    pinned = [scene.residents[name] for name in sorted(scene.pins & scene.residents.keys())]
    beside = most - sum(each.committed_bytes - each.cache_bytes for each in pinned)
    if len(pinned) >= scene.rules.max_resident_engines:  # no place is no byte
        beside = 0
    if need > beside:
        return TooLarge(facts.name, need, max(0, beside), tuple(each.name for each in pinned))
    return None


def _caches_to_drop(scene: Scene, missing_bytes: int) -> tuple[str, ...]:
    """Idle engines whose caches make enough room, the least recently used first."""
    idle = [
        resident
        for resident in scene.residents.values()
        if resident.state is EngineState.READY and not resident.running and resident.cache_bytes
    ]
    chosen: list[str] = []
    for resident in sorted(idle, key=lambda each: (each.last_used_s, each.name)):
        if missing_bytes <= 0:
            break
        missing_bytes -= resident.cache_bytes
        chosen.append(resident.name)
    return tuple(chosen) if missing_bytes <= 0 else ()


def _plan_victims(
    scene: Scene, plan: LoadPlan, step: QueuedStep, missing: int, places: int, now_s: float
) -> LoadPlan | Blocked:
    free: list[Candidate] = []
    later: list[tuple[float, Candidate]] = []
    leased: list[str] = []
    sooner: list[str] = []
    for name, resident in scene.residents.items():
        if name in scene.pins:
            continue
        if resident.state not in (EngineState.READY, EngineState.DRAINING):
            return Blocked(plan.engine, WaitReason.TRANSITION, missing, (name,))
        if resident.lease is not None:
            leased.append(name)
        elif _serves_sooner(scene, name, plan.key):
            sooner.append(name)
        else:
            candidate = _candidate(scene, resident, now_s)
            until_s = resident.protected_until_s(scene.rules, wanted=scene.queue.count(name) > 0)
            if step.priority is Priority.URGENT or until_s <= now_s:
                free.append(candidate)
            else:
                later.append((until_s, candidate))
    chosen = choose_victims(free, missing, places)
    if chosen is not None:
        return LoadPlan(plan.engine, plan.key, tuple(each.name for each in chosen))
    blocked = _wait_for(plan.engine, missing, places, free, later, leased, sooner)
    if blocked.reason is not WaitReason.ROOM:
        return blocked
    chosen = choose_victims(_unseen(scene, free), missing, places)
    if chosen is not None:
        return LoadPlan(plan.engine, plan.key, tuple(each.name for each in chosen))
    return dataclasses.replace(blocked, until_s=min((each[0] for each in later), default=None))


def _unseen(scene: Scene, free: list[Candidate]) -> list[Candidate]:
    """What idle engines free at most: they may have taken more than is known, as others it seems.

    Tried before somebody waits for ever for what an engine that nobody wants has taken.
    """
    residents = [(each, scene.residents[each.name]) for each in free]
    return [
        Candidate(each.name, 2 * resident.committed_bytes - resident.held_bytes, each.cost)
        for each, resident in residents
        if not resident.running and not scene.queue.count(each.name)
    ]


def _wait_for(
    engine: str,
    missing: int,
    places: int,
    free: list[Candidate],
    later: list[tuple[float, Candidate]],
    leased: list[str],
    sooner: list[str],
) -> Blocked:
    """When protection has ended for enough engines, or what else is in the way."""
    going = list(free)
    for until_s, candidate in sorted(later, key=lambda entry: (entry[0], entry[1].name)):
        going.append(candidate)
        chosen = choose_victims(going, missing, places)
        if chosen is not None:
            names = tuple(each.name for each in chosen)
            return Blocked(engine, WaitReason.RESIDENCY, missing, names, until_s)
    if leased:
        return Blocked(engine, WaitReason.LEASE, missing, tuple(leased))
    if sooner:
        return Blocked(engine, WaitReason.TURN, missing, tuple(sooner))
    return Blocked(engine, WaitReason.ROOM, missing)


def _serves_sooner(scene: Scene, name: str, key: Key) -> bool:
    """Whether somebody whose turn is sooner waits for this engine: he goes before it leaves."""
    head = scene.queue.head(name)
    return head is not None and head[0] < key


def _candidate(scene: Scene, resident: Resident, now_s: float) -> Candidate:
    """Expected cost: the chance that it is wanted again soon x what bringing it back takes."""
    demand = scene.demands.get(resident.name)
    reuse = demand.reuse(now_s, _HORIZON_S) if demand else 0.0
    if resident.running or scene.queue.count(resident.name):
        reuse = 1.0
    cost = reuse * resident.facts.load_s * resident.facts.weight
    return Candidate(resident.name, resident.committed_bytes, cost)
