"""The simulated device that policies run on: steps, engines, memory, heat. No wall clock.

One GPU is shared: engines that have work get equal parts of it. In one engine n steps decode
together 1 + 3.7 (n - 1) / 7 times as fast as one; prompts are read one after the other, as far as
time goes. A throttled device is half as fast (assumed).

Memory is that of the processes, exactly: a load takes it evenly up to its peak, an ended process
gives it back `RETURN_S` later. Where nothing is left the kernel kills the largest engine and its
memory is back at once. What engines and others take and what is available is always the total.
"""

import heapq
import math
from collections import defaultdict

from benchmarks._sched_devices import BATCH8_RATIO
from benchmarks._sched_records import Outcome, Policy, Process, Run, Tally
from benchmarks._sched_workloads import Task, Trace
from edge_agent.scheduling.pace import Served
from edge_agent.scheduling.values import (
    Action,
    DropCache,
    Heat,
    Kill,
    Load,
    MachineView,
    Memory,
    Preempt,
    QueuedStep,
    Ready,
    Refuse,
    Start,
    Unload,
)

EXIT_S = 0.3
RETURN_S = 0.7
"""An ended process's memory is back so long after the process has gone."""
_PREEMPT_S = 0.05
_TICK_S = 0.25
"""Memory is read so often while it changes, as the daemon reads it."""
_REACTION_S = 2.0
"""Below the hard floor for longer counts: one reading, a kill, and its memory is back."""
_RETRY_S = (1.0, 30.0)
_PATIENCE_S = 600.0
"""A client whose step was killed or turned away comes back, ever more seldom, for so long."""
_DRAIN_S = 3600.0
"""After the last arrival: what has not ended then never does."""


class World:
    """One trace under one policy. `run` goes to its end."""

    def __init__(self, trace: Trace, policy: Policy) -> None:
        """Nothing is in memory."""
        self.trace = trace
        self.tally = Tally()
        self._policy = policy
        self._now_s = 0.0
        self._events: list[tuple[float, int, str, object]] = []
        self._sequence = 0
        self.processes: dict[str, Process] = {}
        self._returning: dict[int, int] = {}
        self._runs: dict[int, Run] = {}
        self._tasks = {task.step.id: task for task in trace.tasks}
        self._open = {task.step.id for task in trace.tasks}
        self._tries: dict[int, int] = defaultdict(int)
        self._preempted: set[int] = set()
        self._wake_s = math.inf
        self._tick_at_s = -math.inf
        self._below_since_s: float | None = None
        self._below_counted = False
        self._throttled = False

    # --- the machine ---

    def others_bytes(self) -> int:
        """What other processes use now."""
        return self.trace.others_bytes(self._now_s)

    def held_bytes(self) -> int:
        """What engines hold now, those included whose memory is on its way back."""
        held = sum(process.held(self._now_s) for process in self.processes.values())
        return held + sum(self._returning.values())

    def available_bytes(self) -> int:
        """What is left."""
        return self.trace.device.total_bytes - self.others_bytes() - self.held_bytes()

    # --- the run ---

    def run(self) -> Tally:
        """Everything from the first arrival until all has ended, or an hour after the last."""
        trace = self.trace
        for task in trace.tasks:
            self._at(task.step.asked_s, "arrive", task)
        for at_s, _ in trace.others[1:]:
            self._at(at_s, "memory", None)
        for start_s, end_s in trace.throttled:
            self._at(start_s, "heat", True)
            self._at(end_s, "heat", False)
        self._react()
        limit_s = trace.horizon_s + _DRAIN_S
        while self._open:
            finish_s, finished = self._next_phase_end()
            event_s = self._events[0][0] if self._events else math.inf
            if min(finish_s, event_s) > limit_s:
                break
            self._advance(min(finish_s, event_s))
            self._check_memory()
            if finished is not None and finish_s <= event_s:
                if finished.step.id in self._runs:
                    self._phase_ended(finished)
            else:
                _, _, kind, payload = heapq.heappop(self._events)
                getattr(self, f"_on_{kind}")(payload)
            self.tally.events += 1
            self._check_memory()
            self._react()
        for step_id in sorted(self._open):
            step = self._tasks[step_id].step
            waited_s = max(0.0, self._now_s - step.asked_s)
            self.tally.outcomes.append(Outcome(step, waited_s, None))
        return self.tally

    def _react(self) -> None:
        """Let the policy decide, and carry it out."""
        memory = Memory(self.trace.device.total_bytes, max(0, self.available_bytes()))
        heat = Heat.THROTTLED if self._throttled else Heat.NOMINAL
        self._policy.observe(MachineView(memory, heat=heat))
        for action in self._policy.decide(self._now_s):
            self._carry_out(action)
        self._set_speeds()
        wake_s = self._policy.wake_s()
        if wake_s is not None and wake_s < self._wake_s:
            self._wake_s = max(wake_s, self._now_s + 1e-3)
            self._at(self._wake_s, "wake", self._wake_s)

    def _carry_out(self, action: Action) -> None:
        match action:
            case Start(step=step):
                self._start(step)
            case Load(engine=name):
                self._load(name)
            case Unload(engine=name) | Kill(engine=name):
                self._end(name)
            case Preempt(step=step):
                self.tally.preemptions += 1
                self._at(self._now_s + _PREEMPT_S, "preempt", step)
            case Refuse(step=step):
                self._turned_away(step)
            case Ready() | DropCache():
                pass

    def _start(self, step: QueuedStep) -> None:
        task = self._tasks[step.id]
        process = self.processes[step.engine]
        assert process.loaded
        assert not process.ending
        cached = step.id in self._preempted
        prefill_s = task.computed_tokens / process.engine.prefill_tokens_s
        self._runs[step.id] = Run(task, step, self._now_s, 0.0 if cached else prefill_s)

    def _load(self, name: str) -> None:
        assert name not in self.processes, name
        engine = self.trace.device.engine(name)
        self._sequence += 1
        process = Process(engine, self._now_s, self._sequence)
        self.processes[name] = process
        self.tally.loads += 1
        self._at(self._now_s + engine.load_s, "loaded", process)

    def _end(self, name: str) -> None:
        process = self.processes[name]
        if process.ending:
            return
        lost = [run for run in self._runs.values() if run.step.engine == name]
        if lost or not process.loaded:
            self.tally.busy_evictions += 1
        self._stop(process)
        self._at(self._now_s + EXIT_S, "exit", process)

    def _stop(self, process: Process) -> None:
        """It serves nobody any more, whoever has ended it."""
        process.held_bytes = process.held(self._now_s)
        if not process.loaded:
            self.tally.load_s += self._now_s - process.started_s
        process.ending = True
        name = process.engine.name
        for run in [run for run in self._runs.values() if run.step.engine == name]:
            del self._runs[run.step.id]
            if not self._policy.keeps_steps:
                self._turned_away(run.step)

    def _turned_away(self, step: QueuedStep) -> None:
        """Killed or refused: the client comes back, or the step has failed."""
        self._tries[step.id] += 1
        again_s = self._now_s + min(_RETRY_S[1], _RETRY_S[0] * 2 ** (self._tries[step.id] - 1))
        if self._policy.keeps_steps or again_s > step.asked_s + _PATIENCE_S:
            self._close(step, None, self._now_s - step.asked_s)
        else:
            self._at(again_s, "arrive", self._tasks[step.id])

    def _close(self, step: QueuedStep, ended_s: float | None, wait_s: float) -> None:
        self._open.discard(step.id)
        self.tally.outcomes.append(Outcome(step, wait_s, ended_s))

    # --- events ---

    def _on_arrive(self, task: Task) -> None:
        if not self._policy.submit(task.step, self._now_s):
            self._turned_away(task.step)

    def _on_loaded(self, process: Process) -> None:
        if process.ending or self.processes.get(process.engine.name) is not process:
            return
        process.loaded = True
        process.held_bytes = process.engine.steady_bytes
        self.tally.load_s += process.engine.load_s
        self._policy.loaded(process.engine, self._now_s)

    def _on_exit(self, process: Process) -> None:
        if self.processes.get(process.engine.name) is not process:
            return  # the kernel was faster
        if self._policy.verified:
            self._at(self._now_s + RETURN_S, "returned", process)
            return
        del self.processes[process.engine.name]
        self._returning[process.number] = process.held_bytes
        self._at(self._now_s + RETURN_S, "returned", process)
        self._policy.gone(process.engine.name, self._now_s)

    def _on_returned(self, process: Process) -> None:
        self._returning.pop(process.number, None)
        if self._policy.verified and self.processes.get(process.engine.name) is process:
            del self.processes[process.engine.name]
            self._policy.gone(process.engine.name, self._now_s)

    def _on_preempt(self, step: QueuedStep) -> None:
        if self._runs.pop(step.id, None) is not None:
            self._preempted.add(step.id)
            self._policy.preempted(step, self._now_s)

    def _on_memory(self, _: object) -> None:
        self._tick()

    def _on_tick(self, _: object) -> None:
        self._tick()

    def _on_wake(self, at_s: float) -> None:
        if at_s == self._wake_s:  # else a sooner one has taken its place
            self._wake_s = math.inf

    def _on_heat(self, throttled: bool) -> None:  # noqa: FBT001  # a payload
        self._throttled = throttled

    def _phase_ended(self, run: Run) -> None:
        engine = self.processes[run.step.engine].engine
        if not run.decoding:
            run.decoding = True
            run.first_token_s = self._now_s
            run.left_s = run.task.output_tokens / engine.decode_tokens_s
            self._policy.first_token(run.step)
            return
        del self._runs[run.step.id]
        self._close(run.step, self._now_s, run.started_s - run.step.asked_s)
        served = Served(
            run.task.computed_tokens,
            run.task.output_tokens,
            run.first_token_s - run.started_s,
            self._now_s - run.first_token_s,
        )
        self._policy.ended(run.step, self._now_s, served)

    # --- the GPU ---

    def _set_speeds(self) -> None:
        by_engine: dict[str, list[Run]] = defaultdict(list)
        for run in self._runs.values():
            by_engine[run.step.engine].append(run)
        if not by_engine:
            return
        share = (0.5 if self._throttled else 1.0) / len(by_engine)
        for runs in by_engine.values():
            count = len(runs)
            gain = 1.0 + (BATCH8_RATIO - 1.0) * (count - 1) / 7
            for run in runs:
                run.speed = share * (gain if run.decoding else 1.0) / count

    def _next_phase_end(self) -> tuple[float, Run | None]:
        least, first = math.inf, None
        for run in self._runs.values():
            left_s = run.left_s / run.speed
            if left_s < least:
                least, first = left_s, run
        return self._now_s + least, first

    def _advance(self, now_s: float) -> None:
        passed_s = now_s - self._now_s
        if passed_s > 0:
            for run in self._runs.values():
                run.left_s = max(0.0, run.left_s - passed_s * run.speed)
        self._now_s = now_s

    # --- memory ---

    def _check_memory(self) -> None:
        available = self.available_bytes()
        while available < 0 and self.processes:
            largest = max(
                self.processes.values(), key=lambda each: (each.held(self._now_s), each.number)
            )
            self.tally.oom_kills += 1
            self._stop(largest)
            del self.processes[largest.engine.name]
            largest.held_bytes = 0
            self._policy.gone(largest.engine.name, self._now_s)
            available = self.available_bytes()
        self._judge_floor(available)

    def _judge_floor(self, available: int) -> None:
        """A violation: an engine's load went below the floor, or it was not answered in time."""
        if available >= self.trace.device.hard_floor_bytes:
            self._below_since_s = None
            return
        if self._below_since_s is None:
            self._below_since_s = self._now_s
            self._below_counted = False
            self.tally.floor_touches += 1
        loading = any(not each.loaded and not each.ending for each in self.processes.values())
        late = self._now_s - self._below_since_s > _REACTION_S
        if (loading or late) and not self._below_counted:
            self._below_counted = True
            self.tally.floor_violations += 1

    def _others_change(self) -> bool:
        later = self.trace.others_bytes(self._now_s + _TICK_S)
        return later != self.trace.others_bytes(self._now_s)

    def _tick(self) -> None:
        """Look again in a quarter of a second, while others take or give back memory."""
        if self._others_change() and self._tick_at_s <= self._now_s:
            self._tick_at_s = self._now_s + _TICK_S
            self._at(self._tick_at_s, "tick", None)

    def _at(self, at_s: float, kind: str, payload: object) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (at_s, self._sequence, kind, payload))
