"""Why each waiting step waits, in words, and when it is expected to start. Pure.

Looks at the same state as the decisions and with the same functions, so it can't tell another
story than they do.
"""

from collections import Counter
from dataclasses import dataclass

from edge_agent.core import EngineState
from edge_agent.scheduling.budget import kept_bytes, room_bytes
from edge_agent.scheduling.eviction import Blocked, LoadPlan, TooLarge, plan_load
from edge_agent.scheduling.pressure import Level, slowdown
from edge_agent.scheduling.queue import Key
from edge_agent.scheduling.residents import Resident
from edge_agent.scheduling.state import State
from edge_agent.scheduling.values import QueuedStep
from edge_agent.status import MemoryStatus, StepWait, WaitReason
from edge_agent.units import size_text


@dataclass(frozen=True, slots=True)
class _Cause:
    """Why steps for one engine wait; `ready_in_s` is when the first could start."""

    reason: WaitReason
    text: str
    engines: tuple[str, ...] = ()
    missing_bytes: int = 0
    ready_in_s: float | None = None


def explain(state: State, now_s: float, run_id: str = "") -> tuple[StepWait, ...]:
    """One entry for each waiting step, in the order in which they are expected to go.

    Args:
        state: of the scheduler.
        now_s: on its clock.
        run_id: only this run's steps; empty: all.
    """
    causes = {engine: _cause(state, engine, now_s) for engine in state.queue.engines()}
    positions: Counter[str] = Counter()
    waits = []
    for step in state.queue.in_order():
        positions[step.engine] += 1
        if not run_id or step.run_id == run_id:
            waits.append(_wait(state, step, causes[step.engine], positions[step.engine], now_s))
    return tuple(waits)


def memory_status(state: State) -> MemoryStatus:
    """What is left for engines, and why it is not more."""
    memory, rules, ledger = state.machine.memory, state.rules, state.scene().ledger
    return MemoryStatus(
        total_bytes=memory.total_bytes,
        available_bytes=memory.available_bytes,
        reserve_bytes=rules.reserve_bytes,
        budget_bytes=rules.budget_bytes,
        soft_floor_bytes=rules.soft_floor_bytes,
        hard_floor_bytes=rules.hard_floor_bytes,
        kept_bytes=kept_bytes(memory, ledger, rules),
        committed_bytes=sum(entry.committed_bytes for entry in ledger),
        held_bytes=sum(entry.held_bytes for entry in ledger),
        leaked_bytes=sum(leak.missing_bytes for leak in state.leaks.values()),
        room_bytes=max(0, room_bytes(memory, ledger, rules)),
        level=state.level.name,
    )


def _wait(state: State, step: QueuedStep, cause: _Cause, position: int, now_s: float) -> StepWait:
    return StepWait(
        run_id=step.run_id,
        client=step.client,
        engine=step.engine,
        priority=step.priority,
        waited_s=now_s - step.asked_s,
        reason=cause.reason,
        text=cause.text,
        engines=cause.engines,
        position=position,
        missing_bytes=cause.missing_bytes,
        starts_in_s=_starts_in_s(state, step.engine, cause, position),
        deadline_in_s=None if step.deadline_s is None else step.deadline_s - now_s,
    )


def _starts_in_s(state: State, engine: str, cause: _Cause, position: int) -> float | None:
    """The first one's start, then as fast as the engine was measured to get steps done."""
    if cause.ready_in_s is None or position == 1:
        return cause.ready_in_s
    step_s = state.pace(engine).step_s
    if step_s is None:
        return None
    resident = state.residents.get(engine)
    places = state.parallel(resident) if resident and resident.slots else 1
    return cause.ready_in_s + (position - 1) / places * step_s * _slowdown(state)


def _cause(state: State, engine: str, now_s: float) -> _Cause:
    resident = state.residents.get(engine)
    if resident is None:
        return _absent(state, engine, now_s)
    if resident.state is EngineState.READY:
        return _taken(state, resident, now_s)
    if resident.state is EngineState.LOADING:
        left_s = max(0.0, resident.facts.load_s - (now_s - resident.asked_s))
        text = f"{engine} is being loaded, for {now_s - resident.asked_s:.1f} s so far"
        return _Cause(WaitReason.LOADING, text, (engine,), ready_in_s=left_s)
    if resident.state is EngineState.DRAINING:
        text = f"{engine} leaves for {resident.why}, whose step has its turn sooner"
        return _Cause(WaitReason.DRAINING, text, (resident.why,))
    return _Cause(WaitReason.TRANSITION, f"{engine} is being unloaded ({resident.why})", (engine,))


def _taken(state: State, resident: Resident, now_s: float) -> _Cause:
    """Of an engine that is in memory."""
    running, parallel = len(resident.running), state.parallel(resident)
    ready_in_s = _place_in_s(state, resident, now_s)
    if parallel < resident.slots and running >= parallel:
        heat = state.machine.heat.value
        text = f"{running} steps run; only {parallel} of {resident.slots} may while heat is {heat}"
        return _Cause(WaitReason.HEAT, text, (resident.name,), ready_in_s=ready_in_s)
    text = f"all {parallel} places of {resident.name} are taken"
    if parallel == 1:
        text = f"the only place of {resident.name} is taken"
    if running < parallel:
        free = resident.facts.kv_tokens - resident.used_tokens
        text = (
            f"{free} tokens are free in the KV cache of {resident.name}, the next step needs more"
        )
    return _Cause(WaitReason.PLACE, text, (resident.name,), ready_in_s=ready_in_s)


def _absent(state: State, engine: str, now_s: float) -> _Cause:
    """Of an engine that is not in memory."""
    if state.level is not Level.NORMAL:
        floor, available = state.level.name.lower(), state.machine.memory.available_bytes
        free = "" if available is None else f": {size_text(available)} are free"
        text = f"memory is short, at the {floor} floor{free}"
        return _Cause(WaitReason.PRESSURE, text)
    moving = [each for each in state.residents.values() if each.state in _MOVING]
    for key, step in state.next_loads():
        if step.engine != engine and not _waits_for_others(state, key, step, now_s):
            text = f"{step.engine} is loaded first, its step's turn is sooner"
            return _Cause(WaitReason.TURN, text, (step.engine,))
        if step.engine == engine:
            break
    else:
        return _Cause(WaitReason.LOADING, f"nothing that waits makes {engine} load")
    if moving:
        doing = ", ".join(f"{each.name} is {each.state.value.lower()}" for each in moving)
        engines = tuple(each.name for each in moving)
        return _Cause(WaitReason.TRANSITION, f"one engine moves at a time: {doing}", engines)
    plan = plan_load(state.scene(), engine, key, step, now_s)
    if isinstance(plan, LoadPlan):
        names = ", ".join(plan.victims)
        text = f"{names} finish what they run and leave for it" if names else "it is loaded next"
        return _Cause(WaitReason.DRAINING, text, plan.victims)
    if isinstance(plan, TooLarge):
        needed, most = size_text(plan.needed_bytes), size_text(plan.most_bytes)
        text = f"needs {needed}, at most {most} can be free"
        return _Cause(WaitReason.ROOM, text, plan.pinned, plan.needed_bytes - plan.most_bytes)
    return _blocked(state, plan, now_s)


def _waits_for_others(state: State, key: Key, step: QueuedStep, now_s: float) -> bool:
    """Whether nothing that could go would make room: who waits behind it comes in before it."""
    plan = plan_load(state.scene(), step.engine, key, step, now_s)
    return isinstance(plan, Blocked) and plan.reason is WaitReason.ROOM


def _blocked(state: State, plan: Blocked, now_s: float) -> _Cause:
    names = ", ".join(plan.engines)
    left_s = None if plan.until_s is None else plan.until_s - now_s
    load_s = state.facts[plan.engine].load_s
    ready_in_s = None if left_s is None else left_s + load_s
    text = {
        WaitReason.RESIDENCY: f"{names} may go in {left_s or 0.0:.1f} s: just loaded, or in use",
        WaitReason.LEASE: f"{names} was loaded for a step that has no token yet",
        WaitReason.TURN: f"steps whose turn is sooner wait for {names}",
        WaitReason.TRANSITION: f"{names} is on its way in or out",
    }.get(plan.reason, f"{size_text(plan.missing_bytes)} are missing and nothing can go for them")
    pinned = ", ".join(sorted(state.pins & state.residents.keys()))
    if plan.reason is WaitReason.ROOM and pinned:
        text += f"; pinned: {pinned}"
    return _Cause(plan.reason, text, plan.engines, max(0, plan.missing_bytes), ready_in_s)


def _place_in_s(state: State, resident: Resident, now_s: float) -> float | None:
    """When the next place is free: the running step that is the furthest, as usual steps go."""
    step_s = state.pace(resident.name).step_s
    if step_s is None:
        return None
    usual_s = step_s * _slowdown(state)
    left = [usual_s - (now_s - run.started_s) for run in resident.running.values()]
    return max(0.0, min(left, default=0.0))


def _slowdown(state: State) -> float:
    return slowdown(state.machine.heat)


_MOVING = (EngineState.LOADING, EngineState.STOPPING)
