"""What the simulated devices are asked to do: seeded traces, the same for every policy.

Arrivals are open: an agent's next step comes when its previous one would have ended if served at
once, and a tool has run; then its queue grows under a bad policy, as a robot's does that goes on.
Assumed: a step has 300 prompt tokens that are not cached and 60 tokens out, 0.4 to 1.6 times that;
a tool takes 3 s on average, with slow models as long as a step; agents work 8 hours a day. An
agent's `load` is the share of the device's time in those hours that its steps would take alone.
Every few minutes other processes take another part of what is reserved for them.
"""

import bisect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from benchmarks._sched_devices import Device
from edge_agent.core import Priority
from edge_agent.scheduling.values import QueuedStep

DAY_S = 86_400.0
SHIFT_S = 8 * 3600.0
_URGENT_SLACK_S = 4.0
_URGENT_FACTOR = 5.0
_RAMP_S = 30.0
_CHANGE_S = 300.0


@dataclass(frozen=True, slots=True)
class Task:
    """One step of the trace and what it really takes, which no policy is told beforehand."""

    step: QueuedStep
    computed_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Tasks in order of arrival; memory of other processes, linear between points; throttling."""

    device: Device
    horizon_s: float
    tasks: tuple[Task, ...]
    others: tuple[tuple[float, int], ...]
    throttled: tuple[tuple[float, float], ...] = ()
    pins: frozenset[str] = frozenset()

    def engines(self) -> frozenset[str]:
        """What is asked for."""
        return frozenset(task.step.engine for task in self.tasks)

    def others_bytes(self, at_s: float) -> int:
        """What other processes use then."""
        index = bisect.bisect_right(self.others, at_s, key=_moment) - 1
        start_s, start = self.others[max(index, 0)]
        if index + 1 == len(self.others) or at_s < start_s:
            return start
        end_s, end = self.others[index + 1]
        return start + int((end - start) * (at_s - start_s) / (end_s - start_s))

    def cut(self, start_s: float, seconds: float) -> "Trace":
        """What arrives within `seconds` from `start_s`, with the clock set to 0 there."""
        end_s = start_s + seconds
        tasks = [task for task in self.tasks if start_s <= task.step.asked_s < end_s]
        inside = [(at_s - start_s, used) for at_s, used in self.others if at_s > start_s]
        heat = [(first - start_s, last - start_s) for first, last in self.throttled]
        return replace(
            self,
            horizon_s=seconds,
            tasks=tuple(_moved(number, task, -start_s) for number, task in enumerate(tasks)),
            others=((0.0, self.others_bytes(start_s)), *inside),
            throttled=tuple((max(0.0, first), last) for first, last in heat if last > 0),
        )


@dataclass(frozen=True, slots=True)
class Agent:
    """A client and what it asks for; `steps` is how many a run has on average."""

    client: str
    engine: str
    priority: Priority = Priority.INTERACTIVE
    load: float = 0.1
    steps: float = 8.0
    least_tool_s: float = 3.0
    prompt_tokens: int = 300
    output_tokens: int = 60


@dataclass(slots=True)
class _Builder:
    device: Device
    days: float
    random: random.Random
    tasks: list[Task] = field(default_factory=list)

    def add(self, agent: Agent) -> None:
        """All steps of an agent, day by day."""
        day_s = 0.0
        while day_s < self.days * DAY_S:
            self._shift(agent, day_s, min(day_s + SHIFT_S, self.days * DAY_S))
            day_s += DAY_S

    def _shift(self, agent: Agent, start_s: float, end_s: float) -> None:
        solo_s = self._solo_s(agent, agent.prompt_tokens, agent.output_tokens)
        tool_s = max(agent.least_tool_s, solo_s)
        run_s = agent.steps * (solo_s + tool_s)
        pause_s = max(tool_s, agent.steps * solo_s / agent.load - run_s)
        now_s = start_s + self.random.expovariate(1 / pause_s)
        while now_s < end_s:
            for _ in range(self._run_steps(agent)):
                if now_s < end_s:
                    now_s += self._step(agent, now_s)
                now_s += self.random.expovariate(1 / tool_s)
            now_s += self.random.expovariate(1 / pause_s)

    def _run_steps(self, agent: Agent) -> int:
        return max(1, round(agent.steps * self.random.uniform(0.2, 1.8)))

    def _step(self, agent: Agent, now_s: float) -> float:
        """Appends one step; returns how long it takes if served at once, alone."""
        prompt = self._spread(agent.prompt_tokens)
        output = self._spread(agent.output_tokens)
        solo_s = self._solo_s(agent, prompt, output)
        urgent = agent.priority is Priority.URGENT
        deadline_s = now_s + _URGENT_SLACK_S + _URGENT_FACTOR * solo_s if urgent else None
        step = QueuedStep(
            id=0,
            engine=agent.engine,
            client=agent.client,
            priority=agent.priority,
            asked_s=now_s,
            need_tokens=4 * agent.prompt_tokens + 2 * agent.output_tokens,
            prompt_tokens=agent.prompt_tokens,
            output_tokens=agent.output_tokens,
            deadline_s=deadline_s,
            preemptible=agent.priority is Priority.BATCH,
        )
        self.tasks.append(Task(step, prompt, output))
        return solo_s

    def _solo_s(self, agent: Agent, prompt_tokens: int, output_tokens: int) -> float:
        engine = self.device.engine(agent.engine)
        return prompt_tokens / engine.prefill_tokens_s + output_tokens / engine.decode_tokens_s

    def _spread(self, tokens: int) -> int:
        return max(1, round(tokens * self.random.uniform(0.4, 1.6)))

    def trace(
        self,
        others: tuple[tuple[float, int], ...] | None = None,
        throttled: tuple[tuple[float, float], ...] = (),
        pins: frozenset[str] = frozenset(),
    ) -> Trace:
        """The trace of all agents added."""
        ordered = sorted(self.tasks, key=lambda task: (task.step.asked_s, task.step.client))
        numbered = tuple(_moved(number, task, 0.0) for number, task in enumerate(ordered))
        others = others or _within_reserve(self)
        return Trace(self.device, self.days * DAY_S, numbered, others, throttled, pins)


def ping_pong(build: _Builder) -> Trace:
    """Two agents at work for minutes at a time, on engines that do not fit together."""
    first, second = build.device.pair
    build.add(Agent("operator", first, load=0.25, steps=30.0))
    build.add(Agent("executor", second, Priority.NORMAL, load=0.25, steps=30.0))
    return build.trace()


def bursts(build: _Builder) -> Trace:
    """Five models, each with an agent of its own, at work in bursts."""
    _five(build)
    return build.trace()


def robot(build: _Builder) -> Trace:
    """URGENT steps of a pinned small model, an operator, and BATCH summaries on both."""
    return build.trace(pins=_robot(build))


def ramps(build: _Builder) -> Trace:
    """Three models that fit, until other processes take memory twice an hour."""
    for number, engine in enumerate(build.device.engines[:3]):
        priority = Priority.NORMAL if number % 2 else Priority.INTERACTIVE
        build.add(Agent(f"agent-{number}", engine.name, priority, load=0.15))
    return build.trace(others=_ramps(build, 0.3))


def throttle(build: _Builder) -> Trace:
    """The five models, on a device that is too hot for a quarter of the time."""
    _five(build)
    return build.trace(throttled=_heat(build))


def mix(build: _Builder) -> Trace:
    """The robot, the ramps and the heat together, with two agents more."""
    pins = _robot(build)
    for number, engine in enumerate(build.device.engines[1:3]):
        build.add(Agent(f"guest-{number}", engine.name, Priority.NORMAL, load=0.05))
    return build.trace(others=_ramps(build, 0.15), throttled=_heat(build), pins=pins)


WORKLOADS: dict[str, Callable[[_Builder], Trace]] = {
    "ping-pong": ping_pong,
    "bursts": bursts,
    "robot": robot,
    "ramps": ramps,
    "throttle": throttle,
    "mix": mix,
}


def make_trace(workload: str, device: Device, days: float, seed: int) -> Trace:
    """The trace of one workload on one device; the same for the same arguments."""
    source = random.Random(f"{workload} {device.name} {seed}")  # noqa: S311  # a simulation
    return WORKLOADS[workload](_Builder(device, days, source))


def _five(build: _Builder) -> None:
    for number, engine in enumerate(build.device.engines):
        priority = Priority.NORMAL if number % 2 else Priority.INTERACTIVE
        build.add(Agent(f"agent-{number}", engine.name, priority, load=0.1, steps=12.0))


def _robot(build: _Builder) -> frozenset[str]:
    small = build.device.engines[0].name
    middle, large = build.device.engines[1].name, build.device.pair[0]
    urgent = {"prompt_tokens": 120, "output_tokens": 20}
    build.add(Agent("reflexes", small, Priority.URGENT, 0.01, 1.0, 5.0, **urgent))
    build.add(Agent("navigation", small, Priority.NORMAL, load=0.05))
    build.add(Agent("operator", large, load=0.1))
    summary = {"prompt_tokens": 700, "output_tokens": 150}
    build.add(Agent("archive", middle, Priority.BATCH, 0.15, 4.0, 1.0, **summary))
    build.add(Agent("archive", small, Priority.BATCH, 0.1, 4.0, 1.0, **summary))
    return frozenset({small})


def _within_reserve(build: _Builder) -> tuple[tuple[float, int], ...]:
    """In working hours others take any part of their reserve above rest, for minutes each time."""
    device = build.device
    most = device.reserve_bytes - device.soft_floor_bytes
    points = [(0.0, device.others_bytes)]
    for start_s in _every(build, _CHANGE_S, margin_s=30.0):
        if start_s % DAY_S < SHIFT_S:
            level = int(build.random.uniform(device.others_bytes, max(most, device.others_bytes)))
            points += [(start_s, points[-1][1]), (start_s + 10.0, level)]
    return tuple(points)


def _ramps(build: _Builder, share: float) -> tuple[tuple[float, int], ...]:
    """Twice an hour others take `share` of what engines may have, for ten minutes."""
    device = build.device
    rest = device.others_bytes
    high = rest + int(share * (device.total_bytes - device.reserve_bytes))
    points = [(0.0, rest)]
    for start_s in _every(build, 1800.0):
        points += [(start_s, rest), (start_s + _RAMP_S, high)]
        points += [(start_s + 600.0, high), (start_s + 600.0 + _RAMP_S, rest)]
    return tuple(points)


def _heat(build: _Builder) -> tuple[tuple[float, float], ...]:
    return tuple((start_s, start_s + 900.0) for start_s in _every(build, 3600.0))


def _every(build: _Builder, period_s: float, margin_s: float = 960.0) -> Iterator[float]:
    """Once in each period, at a moment that leaves `margin_s` until the next one."""
    start_s = 0.0
    while start_s + period_s <= build.days * DAY_S:
        yield start_s + build.random.uniform(0.1 * margin_s, period_s - margin_s)
        start_s += period_s


def _moment(point: tuple[float, int]) -> float:
    return point[0]


def _moved(number: int, task: Task, by_s: float) -> Task:
    """The same task with another number, earlier or later."""
    step = task.step
    due_s = None if step.deadline_s is None else step.deadline_s + by_s
    moved = replace(step, id=number, asked_s=step.asked_s + by_s, deadline_s=due_s)
    return replace(task, step=moved)
