"""In which order waiting steps go. Pure: no clock, no I/O.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) over flows of one client and priority,
with the class as a fixed offset: a step's key is the virtual time at which its flow's turn comes
plus the offset of its class. Virtual time advances by the seconds of service that are given out,
so a lower class is overtaken for a bounded amount of service and never starves, and no key changes
while a step only waits. Within a flow the earliest deadline goes first.
"""

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from edge_agent.core import Priority
from edge_agent.scheduling.values import QueuedStep

OFFSETS_S = {
    Priority.URGENT: 0.0,
    Priority.INTERACTIVE: 120.0,
    Priority.NORMAL: 300.0,
    Priority.BATCH: 900.0,
}
"""By how many seconds of service the classes above may overtake: a BATCH step goes before an
INTERACTIVE one that comes after 780 s of service were given to others."""

_LEAST_COST_S = 0.01
"""So that virtual time always advances."""
_SWEEP_FLOWS = 256

Key = tuple[float, int]
"""Virtual time and arrival number: smaller goes first."""

_FlowId = tuple[str, Priority]
_Entry = tuple[float, int, QueuedStep]


@dataclass(slots=True)
class _Flow:
    """One client's steps of one priority: when its next turn is, and what waits, by engine."""

    client: str
    priority: Priority
    tag_s: float
    weight: float = 1.0
    waiting: int = 0
    by_engine: dict[str, list[_Entry]] = field(default_factory=dict)
    has_turn: set[str] = field(default_factory=set)

    @property
    def key_s(self) -> float:
        return self.tag_s + OFFSETS_S[self.priority]


class StepQueue:
    """Waiting steps. `weight` gives a client's share, 1 unless told otherwise."""

    def __init__(self, weight: Callable[[str], float] = lambda _client: 1.0) -> None:
        """Nothing waits."""
        self._weight = weight
        self._virtual_s = 0.0
        self._arrivals = 0
        self._flows: dict[_FlowId, _Flow] = {}
        self._turns: dict[str, list[tuple[float, int, _FlowId]]] = {}
        self._steps: dict[int, tuple[QueuedStep, int]] = {}
        self._counts: dict[str, int] = {}
        self._class_weights = dict.fromkeys(Priority, 0.0)
        self._paid: set[int] = set()

    def __len__(self) -> int:
        return len(self._steps)

    def __contains__(self, step_id: int) -> bool:
        return step_id in self._steps

    def count(self, engine: str) -> int:
        """Steps that wait for this engine."""
        return self._counts.get(engine, 0)

    def engines(self) -> Iterator[str]:
        """Engines that steps wait for."""
        return iter(self._counts)

    def add(self, step: QueuedStep, *, again: bool = False) -> None:
        """Let a step wait. `again`: it was preempted; its turn has been paid for already."""
        self._arrivals += 1
        order = self._arrivals
        self._steps[step.id] = (step, order)
        self._counts[step.engine] = self._counts.get(step.engine, 0) + 1
        if again:
            self._paid.add(step.id)
        flow = self._flow(step.client, step.priority)
        if not flow.waiting:
            flow.tag_s = max(flow.tag_s, self._virtual_s)
            flow.weight = self._weight(flow.client)
            self._class_weights[flow.priority] += flow.weight
        flow.waiting += 1
        steps = flow.by_engine.setdefault(step.engine, [])
        due_s = math.inf if step.deadline_s is None else step.deadline_s
        heapq.heappush(steps, (due_s, order, step))
        if step.engine not in flow.has_turn:
            flow.has_turn.add(step.engine)
            turn = (flow.key_s, order, (flow.client, flow.priority))
            heapq.heappush(self._turns.setdefault(step.engine, []), turn)

    def discard(self, step_id: int) -> QueuedStep | None:
        """Take a step out without starting it; None when it does not wait."""
        found = self._steps.get(step_id)
        if found is None:
            return None
        step = found[0]
        self._forget(step)
        return step

    def head(self, engine: str) -> tuple[Key, QueuedStep] | None:
        """Who goes next on this engine, and its key; None when nobody waits for it."""
        turns = self._turns.get(engine)
        while turns:
            key_s, _, flow_id = turns[0]
            flow = self._flows.get(flow_id)
            entry = self._first(flow, engine) if flow else None
            if flow is None or entry is None:
                heapq.heappop(turns)
                if flow is not None:
                    flow.has_turn.discard(engine)
            elif key_s != flow.key_s:  # its turn has moved back since: keys only grow
                heapq.heapreplace(turns, (flow.key_s, entry[1], flow_id))
            else:
                return (key_s, entry[1]), entry[2]
        self._turns.pop(engine, None)
        return None

    def take(self, step: QueuedStep, cost_s: float) -> Key:
        """Start a step: its flow's next turn comes `cost_s` of service later. Returns its key."""
        flow = self._flows[step.client, step.priority]
        key = (flow.key_s, self._steps[step.id][1])
        if step.id not in self._paid:
            cost_s = max(cost_s, _LEAST_COST_S)
            rivals = sum(
                weight
                for priority, weight in self._class_weights.items()
                if priority.rank <= step.priority.rank
            )
            flow.tag_s += cost_s / flow.weight
            self._virtual_s += cost_s / max(rivals, flow.weight)
        self._forget(step)
        return key

    def in_order(self) -> list[QueuedStep]:
        """Everybody who waits, roughly as they will go: each flow counts with its next turn."""
        entries = []
        for step, order in self._steps.values():
            flow = self._flows[step.client, step.priority]
            due_s = math.inf if step.deadline_s is None else step.deadline_s
            entries.append((flow.key_s, due_s, order, step))
        return [entry[3] for entry in sorted(entries, key=lambda entry: entry[:3])]

    def waiting(self) -> Iterator[QueuedStep]:
        """Everybody who waits, in no order."""
        return (step for step, _ in self._steps.values())

    def _flow(self, client: str, priority: Priority) -> _Flow:
        flow = self._flows.get((client, priority))
        if flow is None:
            if len(self._flows) >= _SWEEP_FLOWS:
                self._sweep()
            flow = self._flows[client, priority] = _Flow(client, priority, self._virtual_s)
        return flow

    def _sweep(self) -> None:
        """Forget flows whose history makes no difference any more."""
        idle = [
            flow_id
            for flow_id, flow in self._flows.items()
            if not flow.waiting and flow.tag_s <= self._virtual_s
        ]
        for flow_id in idle:
            del self._flows[flow_id]

    def _first(self, flow: _Flow, engine: str) -> _Entry | None:
        """The flow's first step on an engine; steps that do not wait any more are cleared away."""
        steps = flow.by_engine.get(engine)
        while steps:
            known = self._steps.get(steps[0][2].id)
            if known is not None and known[1] == steps[0][1]:
                return steps[0]
            heapq.heappop(steps)
        flow.by_engine.pop(engine, None)
        return None

    def _forget(self, step: QueuedStep) -> None:
        del self._steps[step.id]
        self._paid.discard(step.id)
        self._counts[step.engine] -= 1
        if not self._counts[step.engine]:
            del self._counts[step.engine]
        flow = self._flows[step.client, step.priority]
        flow.waiting -= 1
        if not flow.waiting:
            self._class_weights[flow.priority] -= flow.weight
            flow.by_engine.clear()
