"""All that the scheduler knows: what waits, what is resident, how tight memory is. No I/O.

Changed by the planner and by what makes room; reads no clock.
"""

import bisect
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterator

from edge_agent.core import EngineState, Priority
from edge_agent.errors import EdgeAgentError
from edge_agent.scheduling.budget import others_bytes
from edge_agent.scheduling.eviction import Scene
from edge_agent.scheduling.pace import Demand, Pace
from edge_agent.scheduling.pressure import Level, parallel_steps
from edge_agent.scheduling.queue import Key, StepQueue
from edge_agent.scheduling.residents import Leak, Resident
from edge_agent.scheduling.values import EngineFacts, MachineView, QueuedStep, Refuse, Rules


class State:
    """The records, and the changes that keep them whole.

    `reading_is_old`: a process has ended since memory was read.
    """

    def __init__(self, rules: Rules, machine: MachineView) -> None:
        """Nothing is installed, resident or waiting."""
        self.rules = rules
        self.machine = machine
        self.reading_is_old = False
        self.level = Level.NORMAL
        self.facts: dict[str, EngineFacts] = {}
        self.residents: dict[str, Resident] = {}
        self.leaks: dict[str, Leak] = {}
        self.pins: set[str] = set()
        self.paces: dict[tuple[str, int | None], Pace] = {}
        self.demands: dict[str, Demand] = {}
        self.preemptions: Counter[int] = Counter()
        self.queue = StepQueue(lambda client: self.rules.client_weights.get(client, 1.0))
        self._deadlines: list[tuple[float, int, QueuedStep]] = []
        self._load_only: dict[int, QueuedStep] = {}

    # --- what is known ---

    def scene(self) -> Scene:
        """What the choice of the next load looks at."""
        return Scene(
            self.machine.memory,
            self.rules,
            self.facts,
            self.residents,
            self.leaks,
            self.pins,
            self.demands,
            self.queue,
        )

    def parallel(self, resident: Resident, step: QueuedStep | None = None) -> int:
        """How many steps the engine may decide at once; for an URGENT one heat does not count."""
        if step is not None and step.priority is Priority.URGENT:
            return resident.slots
        return parallel_steps(resident.slots, self.machine.heat)

    def next_loads(self) -> Iterator[tuple[Key, QueuedStep]]:
        """The first step of each engine that is waited for and not in memory, in turn."""
        heads = [
            head
            for name in self.queue.engines()
            if name not in self.residents
            and (head := self.queue.head(name, probes=False)) is not None
        ]
        heapq.heapify(heads)  # mostly one is asked for; no two keys are the same
        while heads:
            yield heapq.heappop(heads)

    def in_transition(self) -> bool:
        """Whether an engine is on its way in or out: they move one at a time."""
        moving = (EngineState.LOADING, EngineState.STOPPING)
        return any(resident.state in moving for resident in self.residents.values())

    def idle(self) -> list[Resident]:
        """Engines that nobody uses, waits for, leases or has pinned."""
        return [
            resident
            for resident in self.residents.values()
            if resident.state is EngineState.READY
            and not resident.running
            and not self.queue.count(resident.name)
            and resident.lease is None
            and resident.name not in self.pins
        ]

    def unclaimed_bytes(self) -> int | None:
        """What everything but resident engines uses, leaks included; None when nobody knows."""
        entries = [resident.reservation for resident in self.residents.values()]
        return others_bytes(self.machine.memory, entries)

    def next_deadline_s(self) -> float:
        """When the next waiting step runs out of time; infinite when none does."""
        return self._deadlines[0][0] if self._deadlines else math.inf

    def pace(self, engine: str) -> Pace:
        """What this engine was measured to do in the power mode that is in force."""
        return self.paces.setdefault((engine, self.machine.power_mode), Pace())

    def demand(self, engine: str) -> Demand:
        """How often steps ask for this engine."""
        return self.demands.setdefault(engine, Demand())

    # --- changes ---

    def wait(self, step: QueuedStep, *, again: bool = False) -> None:
        """Let a step wait; `again`: it has run, and was stopped for no fault of its own."""
        self.queue.add(step, again=again)
        if again:
            self.preemptions[step.id] += 1
        if step.load_only:
            self._load_only[step.id] = step
        if step.deadline_s is not None:
            bisect.insort(self._deadlines, (step.deadline_s, step.id, step))

    def take(self, step: QueuedStep, cost_s: float) -> None:
        """A waiting step runs now, at this cost to its flow (see `StepQueue.take`)."""
        self.queue.take(step, cost_s)
        self._forget_deadline(step)

    def drop(self, step_id: int) -> QueuedStep | None:
        """A waiting step leaves without having run; None when it does not wait."""
        step = self.queue.discard(step_id)
        if step is not None:
            self._forget_deadline(step)
            self.preemptions.pop(step_id, None)
            self._load_only.pop(step_id, None)
            self.end_lease(step)
        return step

    def expired(self, now_s: float) -> list[QueuedStep]:
        """Take out every waiting step whose deadline has come, the earliest first."""
        due = itertools.takewhile(lambda entry: entry[0] <= now_s, self._deadlines)
        steps = [step for _, _, step in due]
        for step in steps:
            self.drop(step.id)
        return steps

    def satisfied(self) -> list[QueuedStep]:
        """Take out those who ask for no more than that their engine takes steps, which it does."""
        steps = [
            step
            for step in self._load_only.values()
            if (resident := self.residents.get(step.engine)) is not None
            and resident.state is EngineState.READY
        ]
        for step in steps:
            self.drop(step.id)
        return steps

    def refuse_all(self, engine: str, error: EdgeAgentError) -> list[Refuse]:
        """Everybody who waits for an engine gets this error."""
        waiting = [step for step in self.queue.waiting() if step.engine == engine]
        for step in waiting:
            self.drop(step.id)
        return [Refuse(step, error) for step in waiting]

    def give_place(self, step: QueuedStep, now_s: float) -> bool:
        """A running step's place is free again; False: it had none."""
        self.end_lease(step)
        resident = self.residents.get(step.engine)
        if resident is None or resident.running.pop(step.id, None) is None:
            return False
        resident.last_used_s = now_s
        return True

    def leave(self, engine: str) -> Resident:
        """An engine's process has ended."""
        self.reading_is_old = True
        return self.residents.pop(engine)

    def end_lease(self, step: QueuedStep) -> None:
        """The load that was made for this step has served it, or is not needed for it any more."""
        resident = self.residents.get(step.engine)
        if resident is not None and resident.lease == step.id:
            resident.lease = None

    def _forget_deadline(self, step: QueuedStep) -> None:
        if step.deadline_s is not None:
            entry = step.deadline_s, step.id, step
            del self._deadlines[bisect.bisect_left(self._deadlines, entry)]
