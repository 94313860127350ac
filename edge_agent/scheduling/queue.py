"""In which order waiting steps go. Pure: no clock, no I/O.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) over flows of one client and priority,
with the class as a fixed offset: a step's key is the virtual time at which its flow's turn comes
plus the offset of its class. Virtual time advances by the seconds of service that are given out,
so a lower class is overtaken for a bounded amount of service and never starves, and no key changes
while a step only waits. Within a flow the earliest deadline goes first.
"""

import bisect
import math
import operator
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
INTERACTIVE one that comes after 780 s of service were given to others. Where n flows wait at once
each gets its part of the service, so it is n times that."""

_LEAST_COST_S = 0.01
"""So that virtual time always advances."""
_SWEEP_FLOWS = 256

Key = tuple[float, int]
"""Virtual time and arrival number: smaller goes first."""

_Head = tuple[Key, QueuedStep]
_FlowId = tuple[str, Priority]
_Entry = tuple[float, int, QueuedStep]
"""Deadline, arrival number (no two are the same), step."""


@dataclass(slots=True)
class _Flow:
    """One client's steps of one priority: when its next turn is, and how many of them wait.

    `weight` is what it counts for among its rivals: nothing while none of them waits.
    """

    client: str
    priority: Priority
    tag_s: float
    weight: float = 0.0
    waiting: int = 0
    lanes: "dict[str, _Lane]" = field(default_factory=dict)


@dataclass(slots=True)
class _Lane:
    """What waits of one flow for one engine, the earliest deadline first; never empty.

    `key` is its flow's turn and the arrival number of the step that opened it: between flows whose
    turn comes at the same time, whoever has waited for longer goes first.
    """

    flow: _Flow
    key: Key
    entries: list[_Entry] = field(default_factory=list)

    def first_but_probes(self) -> QueuedStep | None:
        return next((step for _, _, step in self.entries if not step.probe), None)


_key_of = operator.attrgetter("key")


class StepQueue:
    """Waiting steps. `weight` gives a client's share, 1 unless told otherwise."""

    def __init__(self, weight: Callable[[str], float] = lambda _client: 1.0) -> None:
        """Nothing waits."""
        self._weight = weight
        self._virtual_s = 0.0
        self._arrivals = 0
        self._flows: dict[_FlowId, _Flow] = {}
        self._lanes: dict[str, dict[_FlowId, _Lane]] = {}
        self._entries: dict[int, _Entry] = {}
        self._paid: set[int] = set()
        self._counts: dict[str, int] = {}
        self._rivals = dict.fromkeys(Priority, 0.0)
        self._heads: dict[str, _Head | None] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, step_id: int) -> bool:
        return step_id in self._entries

    def count(self, engine: str) -> int:
        """Steps that wait for this engine."""
        return self._counts.get(engine, 0)

    def engines(self) -> Iterator[str]:
        """Engines that steps wait for."""
        return iter(self._lanes)

    def add(self, step: QueuedStep, *, again: bool = False) -> None:
        """Let a step wait. `again`: it was preempted; its turn has been paid for already."""
        self._arrivals += 1
        due_s = math.inf if step.deadline_s is None else step.deadline_s
        entry = self._entries[step.id] = (due_s, self._arrivals, step)
        if again:
            self._paid.add(step.id)
        flow = self._flow(step.client, step.priority)
        if not flow.waiting:
            flow.tag_s = max(flow.tag_s, self._virtual_s)
            self._weigh(flow)
        flow.waiting += 1
        self._counts[step.engine] = self._counts.get(step.engine, 0) + 1
        lane = flow.lanes.get(step.engine)
        if lane is None:
            key = flow.tag_s + OFFSETS_S[step.priority], self._arrivals
            lane = flow.lanes[step.engine] = _Lane(flow, key)
            self._lanes.setdefault(step.engine, {})[step.client, step.priority] = lane
        bisect.insort(lane.entries, entry)
        head = self._heads.get(step.engine)
        if head is None or lane.key <= head[0]:
            self._forget_head(step.engine)

    def discard(self, step_id: int) -> QueuedStep | None:
        """Take a step out without starting it; None when it does not wait."""
        if step_id not in self._entries:
            return None
        return self._remove(step_id)

    def head(self, engine: str, *, probes: bool = True) -> _Head | None:
        """Who goes next on this engine, and its key; None when nobody waits for it.

        `probes`: whether those count that never cause a load.
        """
        if engine not in self._heads:
            lane = min(self._lanes.get(engine, {}).values(), key=_key_of, default=None)
            self._heads[engine] = None if lane is None else (lane.key, lane.entries[0][2])
        head = self._heads[engine]
        if probes or head is None or not head[1].probe:
            return head
        heads = (
            (lane.key, step)
            for lane in self._lanes[engine].values()
            if (step := lane.first_but_probes()) is not None
        )
        return min(heads, key=lambda each: each[0], default=None)

    def take(self, step: QueuedStep, cost_s: float) -> Key:
        """Start a step: its flow's next turn comes `cost_s` of service later. Returns its key."""
        flow = self._flows[step.client, step.priority]
        key = flow.lanes[step.engine].key
        if step.id not in self._paid:
            cost_s = max(cost_s, _LEAST_COST_S)
            self._weigh(flow)  # who always waits would never hear of a reload
            rivals = sum(
                weight
                for priority, weight in self._rivals.items()
                if priority.rank <= step.priority.rank
            )
            flow.tag_s += cost_s / flow.weight
            self._virtual_s += cost_s / max(rivals, flow.weight)
            self._postpone(flow)
        self._remove(step.id)
        return key

    def in_order(self) -> list[QueuedStep]:
        """Everybody who waits, roughly as they will go: each flow counts with its next turn."""
        entries = [
            (lane.key[0], entry)
            for lanes in self._lanes.values()
            for lane in lanes.values()
            for entry in lane.entries
        ]
        return [step for _, (_, _, step) in sorted(entries)]

    def waiting(self) -> Iterator[QueuedStep]:
        """Everybody who waits, in no order."""
        return (step for _, _, step in self._entries.values())

    def _flow(self, client: str, priority: Priority) -> _Flow:
        flow = self._flows.get((client, priority))
        if flow is None:
            if len(self._flows) >= _SWEEP_FLOWS:
                self._sweep()
            flow = self._flows[client, priority] = _Flow(client, priority, self._virtual_s)
        return flow

    def _weigh(self, flow: _Flow) -> None:
        """Take over the weight that a waiting flow's client has now."""
        weight = self._weight(flow.client)
        self._rivals[flow.priority] += weight - flow.weight
        flow.weight = weight

    def _sweep(self) -> None:
        """Forget flows whose history makes no difference any more."""
        idle = [
            flow_id
            for flow_id, flow in self._flows.items()
            if not flow.waiting and flow.tag_s <= self._virtual_s
        ]
        for flow_id in idle:
            del self._flows[flow_id]

    def _remove(self, step_id: int) -> QueuedStep:
        entry = self._entries.pop(step_id)
        self._paid.discard(step_id)
        step = entry[2]
        flow_id = step.client, step.priority
        lanes = self._lanes[step.engine]
        lane = lanes[flow_id]
        del lane.entries[bisect.bisect_left(lane.entries, entry)]
        lane.flow.waiting -= 1
        if not lane.flow.waiting:
            self._rivals[lane.flow.priority] -= lane.flow.weight
            lane.flow.weight = 0.0
        head = self._heads.get(step.engine)
        if head is None or head[1] is step:
            self._forget_head(step.engine)
        self._counts[step.engine] -= 1
        if not lane.entries:
            del lanes[flow_id], lane.flow.lanes[step.engine]
        if not lanes:
            del self._lanes[step.engine], self._counts[step.engine]
        return step

    def _postpone(self, flow: _Flow) -> None:
        """The flow's turn comes later now, for every engine that it waits for."""
        key_s = flow.tag_s + OFFSETS_S[flow.priority]
        for engine, lane in flow.lanes.items():
            lane.key = key_s, lane.key[1]
            head = self._heads.get(engine)
            if head is not None and head[1] is lane.entries[0][2]:
                self._forget_head(engine)

    def _forget_head(self, engine: str) -> None:
        """It is found anew when it is asked for."""
        self._heads.pop(engine, None)
