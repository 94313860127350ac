"""The scheduler's mind: facts go in, decisions come out. No clock, no I/O, no await.

Each decision changes the record at once, so that no second one can be made from the same state: a
victim belongs to one plan, a place to one step. The owner carries decisions out and reports what
came of them.
"""

import math
from collections.abc import Iterator

from edge_agent.core import EngineState, Priority
from edge_agent.errors import DeadlineExceeded, EdgeAgentError, FailedPrecondition
from edge_agent.scheduling import refusals
from edge_agent.scheduling.making_room import RoomMaker
from edge_agent.scheduling.pace import Served
from edge_agent.scheduling.pressure import next_level, slowdown
from edge_agent.scheduling.residents import Leak, Resident, Running
from edge_agent.scheduling.state import State
from edge_agent.scheduling.values import (
    Action,
    EngineFacts,
    MachineView,
    QueuedStep,
    Ready,
    Refuse,
    Rules,
    Start,
)

LOST = "LOST"
"""Why an engine goes whose process has ended by itself."""
_URGENT_SHARE = 0.1
"""URGENT steps may wait beyond the limit by this share, so that others can't shut them out."""
_DEFAULT_COST_S = 1.0
"""Of a step before anything was measured, for fairness only."""


class Planner:
    """All decisions of one daemon about engines in memory and the order of steps."""

    def __init__(self, rules: Rules, machine: MachineView) -> None:
        """Nothing is installed, resident or waiting."""
        self.state = State(rules, machine)
        self._room = RoomMaker(self.state)

    # --- facts ---

    def know(self, facts: EngineFacts) -> None:
        """What is installed, or has changed; what is resident keeps what it was loaded with."""
        self.state.facts[facts.name] = facts

    def observe(self, machine: MachineView) -> None:
        """What telemetry says now."""
        state = self.state
        state.machine, state.reading_is_old = machine, False
        state.level = next_level(state.level, machine, state.rules)
        if (unclaimed := state.unclaimed_bytes()) is not None:
            for name in [name for name, leak in state.leaks.items() if leak.returned(unclaimed)]:
                del state.leaks[name]

    def submit(self, step: QueuedStep, now_s: float) -> None:
        """Let a step wait.

        Raises:
            Overloaded: too many wait already; says when it is worth another try.
            DeadlineExceeded: its deadline can't be met, with the arithmetic.
            EdgeAgentError: why its engine must not be loaded.
        """
        state = self.state
        facts = state.facts[step.engine]
        if facts.refusal is not None and step.engine not in state.residents:
            raise facts.refusal
        limit = state.rules.max_waiting_steps
        extra = math.ceil(limit * _URGENT_SHARE) if step.priority is Priority.URGENT else 0
        if len(state.queue) >= limit + extra:
            raise refusals.overloaded(len(state.queue), limit, self._steps_per_s())
        self._refuse_late(step, now_s)
        if not step.probe:
            state.demand(step.engine).arrived(now_s)
        state.wait(step)

    def withdraw(self, step_id: int) -> bool:
        """Nobody wants this waiting step any more; False when it does not wait."""
        return self.state.drop(step_id) is not None

    def first_token(self, step: QueuedStep) -> None:
        """The step has its first token: the load that was made for it has paid off."""
        self.state.end_lease(step)

    def ended(self, step: QueuedStep, now_s: float, served: Served | None) -> None:
        """A running step's place is free again; `served` None: it says nothing about the pace."""
        if not self.state.give_place(step, now_s):
            self.state.drop(step.id)  # its engine has gone meanwhile, so it waits again
        self.state.preemptions.pop(step.id, None)
        if served is not None:
            self.state.pace(step.engine).observe(served, slowdown(self.state.machine.heat))

    def preempted(self, step: QueuedStep, now_s: float) -> None:
        """A running step was stopped for another: it waits again, its turn paid for."""
        if self.state.give_place(step, now_s):  # else it waits already: its engine has gone
            self.state.wait(step, again=True)

    def loaded(self, engine: str, slots: int, held_bytes: int, now_s: float) -> None:
        """The load has ended well; `held_bytes` is what it was seen to take."""
        self._room.second_attempts.discard(engine)
        self.state.residents[engine].became_ready(slots, held_bytes, now_s)

    def remeasured(self, engine: str, steady_bytes: int, held_bytes: int) -> None:
        """What a resident engine takes was seen again: by its largest step, or only just now."""
        resident = self.state.residents[engine]
        resident.committed_bytes = max(resident.committed_bytes, steady_bytes)
        resident.held_bytes = min(held_bytes, resident.committed_bytes)

    def load_failed(self, engine: str, error: EdgeAgentError, *, retry: bool) -> list[Refuse]:
        """A load has ended badly and its process is gone.

        `retry`: it lacked memory, so everything idle goes and it is tried once more. Else, and the
        second time, everybody who waits for it gets the error.
        """
        attempt = self.state.leave(engine).attempt
        if retry and attempt == 1:
            self._room.second_attempts.add(engine)
            return []
        self._room.second_attempts.discard(engine)
        return self.state.refuse_all(engine, error)

    def lost(self, engine: str) -> None:
        """The engine's process has ended by itself; it takes no more steps."""
        resident = self.state.residents[engine]
        resident.state, resident.why = EngineState.STOPPING, LOST

    def gone(self, engine: str) -> None:
        """The engine's process has ended; steps that it had not finished wait again."""
        for run in self.state.leave(engine).running.values():
            self.state.wait(run.step, again=True)

    def leaked(self, engine: str, missing_bytes: int) -> None:
        """The engine's process was ended, and this much of its memory did not come back."""
        state = self.state
        self.gone(engine)
        before = state.leaks.pop(engine, None)
        missing = missing_bytes + (before.missing_bytes if before else 0)
        unclaimed = state.unclaimed_bytes()
        state.leaks[engine] = Leak(missing, max(0, (unclaimed or missing) - missing))

    def release(self, engine: str) -> bool:
        """Forget what an engine has leaked: somebody has looked after it."""
        return self.state.leaks.pop(engine, None) is not None

    def unload(self, engine: str) -> bool:
        """Somebody wants an engine out of memory; False when nothing needs to be done.

        Raises:
            FailedPrecondition: reason ENGINE_BUSY, steps use it or wait for it.
        """
        resident = self.state.residents.get(engine)
        if resident is None or resident.state is EngineState.STOPPING:
            return False
        active, waiting = len(resident.running), self.state.queue.count(engine)
        if active or waiting or resident.state is EngineState.LOADING:
            raise FailedPrecondition(
                f"engine {engine}: {active} steps use it, {waiting} wait for it",
                reason="ENGINE_BUSY",
                metadata={"engine": engine, "active_steps": active, "waiting_steps": waiting},
            )
        resident.state, resident.why = EngineState.STOPPING, "REQUESTED"
        return True

    # --- decisions ---

    def decide(self, now_s: float) -> list[Action]:
        """What happens now. The record has changed accordingly."""
        actions: list[Action] = [
            Refuse(step, _too_late(step, now_s)) for step in self.state.expired(now_s)
        ]
        resumed = True
        while resumed:
            # First, since an engine that nobody waits for any more may have to go.
            actions += [Ready(step) for step in self.state.satisfied()]
            actions += self._room.relieve()
            while found := list(self._serve_all(now_s)):
                actions += found  # a start moves its client's turn in all engines
            actions += self._room.make_way(now_s)
            resumed, self._room.resumed = self._room.resumed, False
        return actions

    def wake_s(self) -> float | None:
        """When time alone may change a decision; None: never."""
        due_s = min(self._room.wake_s, self.state.next_deadline_s())
        return None if due_s == math.inf else due_s

    def _serve_all(self, now_s: float) -> Iterator[Action]:
        for resident in self.state.residents.values():
            if resident.state is EngineState.READY:
                yield from self._serve(resident, now_s)

    def _serve(self, resident: Resident, now_s: float) -> Iterator[Action]:
        """Give out free places in turn; a BATCH step may have to leave one."""
        state = self.state
        while (head := state.queue.head(resident.name)) is not None:
            key, step = head
            if not resident.has_place(step, state.parallel(resident, step)):
                yield from self._room.preempt_for(resident, key, step)
                return
            state.take(step, self._cost_s(step))
            resident.running[step.id] = Running(step, key, now_s)
            resident.last_used_s = now_s
            yield Start(step)

    def _cost_s(self, step: QueuedStep) -> float:
        estimate = self.state.pace(step.engine).estimate_s(step.prompt_tokens, step.output_tokens)
        return _DEFAULT_COST_S if estimate is None else estimate

    def _steps_per_s(self) -> float | None:
        """What all resident engines together get done, as measured; None: nothing was."""
        rates = [
            self.state.parallel(resident) / (pace.step_s * slowdown(self.state.machine.heat))
            for resident in self.state.residents.values()
            if (pace := self.state.pace(resident.name)).step_s
        ]
        return sum(rates) or None

    def _refuse_late(self, step: QueuedStep, now_s: float) -> None:
        if step.deadline_s is None or step.load_only:
            return
        state = self.state
        needs = refusals.estimate(
            step,
            state.facts[step.engine],
            state.residents.get(step.engine),
            state.pace(step.engine),
            state.machine.heat,
            now_s,
        )
        left_s = step.deadline_s - now_s
        if needs is not None and needs.sure_s > left_s:
            raise refusals.unmeetable(step, needs, left_s)


def _too_late(step: QueuedStep, now_s: float) -> DeadlineExceeded:
    waited_s = now_s - step.asked_s
    return DeadlineExceeded(
        f"waited {waited_s:.1f} s for engine {step.engine}, until the deadline",
        reason="DEADLINE_PASSED",
        metadata={"engine": step.engine, "waited_s": f"{waited_s:.1f}"},
    )
