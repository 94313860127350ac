"""A clairvoyant bound: the least seconds of loading with which anybody could serve a trace.

A program in time steps of `dt` over what every schedule must satisfy. For each engine e and moment
t: x[e,t] says that it is in memory then, y[e,t] counts loads begun in the step that ends there.

- x[e,t] - x[e,t-1] <= y[e,t], and memory: engines that do not fit together at t are not all there.
- A step that asks at a and must start by s finds its engine in memory at a, or it is loaded early
  enough: x[e,a] + sum of y[e] from a to s - load >= 1. This is what makes the relaxation tight.
- A load keeps its engine in memory for the load and the shortest step of the trace at least.
- Loads come one after the other, since the disk is one.
- Enough time in memory within the step's window for the step alone.

Rounding goes the generous way everywhere, the GPU is never the limit, and a load takes its engine's
steady memory only. A step must start by its own deadline, or within the longest wait that its class
had under our policy on the same trace. HiGHS solves the relaxation with x and y as fractions; with
`seconds` more it tightens it by branching on whole loads. What it then proves is the bound.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from benchmarks._sched_devices import Engine
from benchmarks._sched_workloads import Task, Trace
from edge_agent.core import Priority


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds of loading: of the relaxation, and what branching proved beyond it.

    `feasible`: that all URGENT deadlines and all waits can be kept, as far as the relaxation knows.
    """

    relaxed_load_s: float
    proven_load_s: float
    feasible: bool


@dataclass(slots=True)
class _Rows:
    """Inequalities `sum of value * variable <= limit`, one by one."""

    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)

    def add(self, terms: Iterable[tuple[int, float]], limit: float) -> None:
        """One more."""
        for column, value in terms:
            self.rows.append(len(self.limits))
            self.columns.append(column)
            self.values.append(value)
        self.limits.append(limit)


@dataclass(frozen=True, slots=True)
class _Window:
    """When a step may start, and how long it takes alone."""

    asked_s: float
    latest_s: float
    solo_s: float


class _Program:
    def __init__(self, trace: Trace, waits_s: Mapping[Priority, float], dt_s: float) -> None:
        self.trace = trace
        self.dt_s = dt_s
        self.engines = [trace.device.engine(name) for name in sorted(trace.engines())]
        longest_s = max(waits_s.values(), default=0.0)
        self.steps = math.ceil((trace.horizon_s + longest_s) / dt_s) + 2
        self.rows = _Rows()
        self.windows: dict[str, list[_Window]] = defaultdict(list)
        for task in trace.tasks:
            window = _window(task, trace.device.engine(task.step.engine), waits_s)
            self.windows[task.step.engine].append(window)
        self._residency()
        self._memory()
        self._disk()
        for number, engine in enumerate(self.engines):
            for window in _tightest(self.windows[engine.name]):
                self._service(number, engine, window)

    @property
    def size(self) -> int:
        return 2 * len(self.engines) * self.steps

    def x(self, engine: int, moment: int) -> int:
        return engine * self.steps + moment

    def y(self, engine: int, moment: int) -> int:
        return (len(self.engines) + engine) * self.steps + moment

    def loads(self, engine: int, first: int, last: int) -> list[tuple[int, float]]:
        """Loads begun in steps `first` to `last`."""
        least = max(0, first)
        return [(self.y(engine, moment), 1.0) for moment in range(least, last + 1)]

    def _residency(self) -> None:
        for number, engine in enumerate(self.engines):
            shortest_s = min(window.solo_s for window in self.windows[engine.name])
            stay = max(1, math.floor((engine.load_s + shortest_s) / self.dt_s))
            for moment in range(self.steps):
                terms = [(self.x(number, moment), 1.0), (self.y(number, moment), -1.0)]
                if moment:
                    terms.append((self.x(number, moment - 1), -1.0))
                self.rows.add(terms, 0.0)
                kept = self.loads(number, moment - stay + 1, moment)
                self.rows.add([*kept, (self.x(number, moment), -1.0)], 0.0)

    def _memory(self) -> None:
        names = range(len(self.engines))
        for moment in range(self.steps):
            room = _room_bytes(self.trace, moment * self.dt_s)
            minimal: list[tuple[int, ...]] = []
            for size in range(1, len(self.engines) + 1):
                for together in itertools.combinations(names, size):
                    if any(set(small) <= set(together) for small in minimal):
                        continue
                    if sum(self.engines[each].steady_bytes for each in together) > room:
                        minimal.append(together)
                        terms = [(self.x(each, moment), 1.0) for each in together]
                        self.rows.add(terms, size - 1.0)

    def _disk(self) -> None:
        for moment in range(self.steps):
            terms = []
            for number, engine in enumerate(self.engines):
                busy = math.floor(engine.load_s / self.dt_s)
                terms += self.loads(number, moment - busy + 1, moment)
            self.rows.add(terms, 1.0)

    def _service(self, number: int, engine: Engine, window: _Window) -> None:
        asked = math.floor(window.asked_s / self.dt_s)
        last = math.ceil((window.latest_s - engine.load_s) / self.dt_s)
        there = min(asked, max(last, 0))
        terms = [(self.x(number, there), 1.0), *self.loads(number, there + 1, last)]
        self.rows.add([(column, -value) for column, value in terms], -1.0)
        samples = math.floor(window.solo_s / self.dt_s)
        if samples:
            end = math.ceil((window.latest_s + window.solo_s) / self.dt_s)
            inside = range(asked, min(end, self.steps - 1) + 1)
            self.rows.add([(self.x(number, moment), -1.0) for moment in inside], -samples)


def least_load_s(
    trace: Trace, waits_s: Mapping[Priority, float], *, dt_s: float, seconds: float = 0.0
) -> Bound:
    """The bound for a trace that starts with nothing in memory; branching may take `seconds`."""
    program = _Program(trace, waits_s, dt_s)
    rows = program.rows
    shape = (len(rows.limits), program.size)
    matrix = csr_array((rows.values, (rows.rows, rows.columns)), shape=shape)
    cost = np.zeros(program.size)
    for number, engine in enumerate(program.engines):
        first = program.y(number, 0)
        cost[first : first + program.steps] = engine.load_s
    relaxed = linprog(cost, A_ub=matrix, b_ub=rows.limits, bounds=(0, 1), method="highs")
    if not relaxed.success:
        return Bound(0.0, 0.0, feasible=False)
    proven = float(relaxed.fun)
    if seconds > 0:
        whole = milp(
            cost,
            constraints=LinearConstraint(matrix, ub=rows.limits),
            bounds=Bounds(0, 1),
            integrality=np.ones(program.size),
            options={"time_limit": seconds},
        )
        if whole.mip_dual_bound is not None:
            proven = max(proven, float(whole.mip_dual_bound))
    return Bound(float(relaxed.fun), proven, feasible=True)


def _window(task: Task, engine: Engine, waits_s: Mapping[Priority, float]) -> _Window:
    step = task.step
    solo_s = task.computed_tokens / engine.prefill_tokens_s
    solo_s += task.output_tokens / engine.decode_tokens_s
    latest_s = step.asked_s + waits_s.get(step.priority, 0.0)
    if step.deadline_s is not None:
        latest_s = max(step.asked_s, step.deadline_s - solo_s)
    return _Window(step.asked_s, latest_s, solo_s)


def _tightest(windows: Sequence[_Window]) -> list[_Window]:
    """Those within which no other lies: the others are served with them."""
    kept: list[_Window] = []
    for window in sorted(windows, key=lambda each: (-each.asked_s, each.latest_s)):
        if not kept or window.latest_s < kept[-1].latest_s:
            kept.append(window)
    return kept


def _room_bytes(trace: Trace, at_s: float) -> int:
    """What engines may take then: all but the reserve, or what others use and the soft floor."""
    device = trace.device
    others = trace.others_bytes(at_s) + device.soft_floor_bytes
    return device.total_bytes - max(device.reserve_bytes, others)
