"""How long the production core takes to decide: CPU time, so that a busy machine does not count.

1,000 steps of 40 clients and all classes wait for 32 installed engines of which 8 are in memory,
each of them a possible victim. Events are those of a busy daemon: steps end, others arrive, loads
end, processes go. What is timed is the report of the event and the decision after it.
"""

import random
import time
from collections import deque

from edge_agent.core import Priority
from edge_agent.scheduling.pace import Served
from edge_agent.scheduling.planner import Planner
from edge_agent.scheduling.values import (
    Action,
    EngineFacts,
    Footprint,
    Load,
    MachineView,
    Memory,
    Preempt,
    QueuedStep,
    Rules,
    Start,
    Unload,
)
from edge_agent.units import GIB, MIB

WAITING = 1000
INSTALLED = 32
RESIDENT = 8
_CLIENTS = 40
_SLOTS = 4
_STEP_S = 0.05
_TRANSITION_EVENTS = 20


class _Daemon:
    """The planner and what the daemon around it would report."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311  # a simulation
        self.now_s = 0.0
        self.numbers = 0
        self.running: list[QueuedStep] = []
        self.moving: deque[tuple[int, Load | Unload]] = deque()
        self.preempting: deque[QueuedStep] = deque()
        self.events = 0
        self.timings_s: list[float] = []
        rules = Rules(2 * GIB, GIB // 2, GIB // 4, max_waiting_steps=100_000)
        self.planner = Planner(rules, MachineView(Memory(64 * GIB, 62 * GIB)))
        for number in range(INSTALLED):
            steady = (5 + number % 4) * GIB
            footprint = Footprint(steady + 256 * MIB, steady)
            facts = EngineFacts(f"engine-{number}", footprint, _SLOTS, _SLOTS * 4096, 4.0)
            self.planner.know(facts)

    def arrive(self) -> None:
        self.numbers += 1
        step = QueuedStep(
            id=self.numbers,
            engine=f"engine-{self.random.randrange(INSTALLED)}",
            client=f"client-{self.random.randrange(_CLIENTS)}",
            priority=self.random.choice(tuple(Priority)),
            asked_s=self.now_s,
            need_tokens=1000,
            prompt_tokens=300,
            output_tokens=60,
            deadline_s=self.now_s + 3600.0 if self.random.random() < 0.1 else None,
            preemptible=self.random.random() < 0.3,
        )
        started = time.thread_time()
        self.planner.submit(step, self.now_s)
        self.decide(started)

    def end_one(self) -> None:
        step = self.running.pop(self.random.randrange(len(self.running)))
        started = time.thread_time()
        self.planner.ended(step, self.now_s, Served(300, 60, 0.3, 1.5))
        self.decide(started)

    def move(self) -> None:
        _, action = self.moving.popleft()
        resident = self.planner.state.residents[action.engine]
        started = time.thread_time()
        if isinstance(action, Load):
            steady = resident.facts.footprint.steady_bytes
            self.planner.loaded(action.engine, _SLOTS, steady, self.now_s)
        else:
            self.planner.gone(action.engine)
        self.decide(started)

    def decide(self, started: float) -> None:
        actions = self.planner.decide(self.now_s)
        self.timings_s.append(time.thread_time() - started)
        for action in actions:
            self.carry_out(action)

    def carry_out(self, action: Action) -> None:
        match action:
            case Start(step=step):
                self.running.append(step)
                self.planner.first_token(step)
            case Load() | Unload():
                self.moving.append((self.events + _TRANSITION_EVENTS, action))
            case Preempt(step=step):
                self.running.remove(step)
                self.preempting.append(step)

    def event(self) -> None:
        """Whatever is due next; the queue stays as long as it is."""
        self.events += 1
        self.now_s += _STEP_S
        held = sum(each.held_bytes for each in self.planner.state.residents.values())
        self.planner.observe(MachineView(Memory(64 * GIB, 62 * GIB - held)))
        if self.preempting:
            step = self.preempting.popleft()
            started = time.thread_time()
            self.planner.preempted(step, self.now_s)
            self.decide(started)
        elif self.moving and self.moving[0][0] <= self.events:
            self.move()
        elif len(self.planner.state.queue) < WAITING or not self.running:
            self.arrive()
        else:
            self.end_one()


def decision_times_s(events: int, seed: int = 1) -> list[float]:
    """Of so many events, after the queue was filled and 8 engines were in memory."""
    daemon = _Daemon(seed)
    while len(daemon.planner.state.queue) < WAITING:
        daemon.event()
    for _ in range(events // 4):
        daemon.event()
    daemon.timings_s.clear()
    for _ in range(events):
        daemon.event()
    return daemon.timings_s
