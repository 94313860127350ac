"""A small world for the planner: processes, their memory and their steps, and nothing by itself.

Whoever drives it says what happens next. Each decision is carried out and checked against the
world's own books, which are kept apart from the planner's.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from edge_agent.core import EngineState, Priority
from edge_agent.errors import EdgeAgentError, LoadFailed
from edge_agent.scheduling.pace import Served
from edge_agent.scheduling.planner import Planner
from edge_agent.scheduling.values import (
    Action,
    DropCache,
    EngineFacts,
    Footprint,
    Heat,
    Kill,
    Load,
    MachineView,
    Memory,
    Preempt,
    QueuedStep,
    Ready,
    Refuse,
    Rules,
    Start,
    Unload,
)

ENDINGS = ("ended", "ready", "refused", "withdrawn", "rejected")
WORKER_LOST = LoadFailed("the worker ended", reason="WORKER_LOST")


@dataclass(slots=True)
class Process:
    """An engine's process: `claim_bytes` are its in the books, `real_bytes` what it holds."""

    facts: EngineFacts
    state: EngineState = EngineState.LOADING
    claim_bytes: int = 0
    held_bytes: int = 0
    real_bytes: int = 0
    cache_bytes: int = 0
    lease: int | None = None
    running: dict[int, QueuedStep] = field(default_factory=dict)


def engine(
    name: str, gib: int, *, slots: int = 1, load_s: float = 4.0, cache_gib: int = 0, peak: int = 0
) -> EngineFacts:
    """An engine of so many (made-up) units of memory; a slot's KV cache holds 100 tokens."""
    return EngineFacts(
        name=name,
        footprint=Footprint(gib + peak, gib),
        slots=slots,
        kv_tokens=100 * slots,
        load_s=load_s,
        cache_bytes=cache_gib,
    )


class World:
    """The books: what waits, runs and has ended, whose memory is whose. Times in seconds."""

    planner_type: type[Planner] = Planner

    def __init__(self, rules: Rules, total_bytes: int, engines: list[EngineFacts]) -> None:
        self.now_s = 1000.0
        self.total_bytes = total_bytes
        self.others_bytes = 0
        self.leaked_bytes: dict[str, int] = {}
        self.heat = Heat.NOMINAL
        self.blind = False
        self.processes: dict[str, Process] = {}
        self.seen = self.view()
        self.seen_exits = True
        self.planner = self.planner_type(rules, self.seen)
        self.facts = {facts.name: facts for facts in engines}
        for facts in engines:
            self.planner.know(facts)
        self.waiting: dict[int, QueuedStep] = {}
        self.preempting: set[int] = set()
        self.outcomes: dict[int, str] = {}
        self.errors: dict[int, EdgeAgentError] = {}
        self.actions: list[tuple[float, Action]] = []
        self.closed: set[str] = set()
        self.dropped_bytes = 0
        self._ids = 0

    # --- the machine ---

    @property
    def rules(self) -> Rules:
        return self.planner.state.rules

    def view(self) -> MachineView:
        """What telemetry says; nothing about memory while blind."""
        if self.blind:
            return MachineView(Memory(self.total_bytes, None), heat=self.heat)
        return MachineView(Memory(self.total_bytes, self.available_bytes()), heat=self.heat)

    def available_bytes(self) -> int:
        """What is really free."""
        used = sum(each.real_bytes for each in self.processes.values())
        used += sum(self.leaked_bytes.values()) + self.others_bytes
        return max(0, self.total_bytes - used)

    def observe(self) -> None:
        """Telemetry tells how it is."""
        self.seen, self.seen_exits, self.dropped_bytes = self.view(), True, 0
        self.planner.observe(self.seen)
        self.turn()

    # --- what callers do ---

    def submit(
        self,
        name: str,
        *,
        client: str = "arm",
        priority: Priority = Priority.NORMAL,
        tokens: int = 10,
        within_s: float | None = None,
        load_only: bool = False,
        probe: bool = False,
        preemptible: bool = False,
    ) -> int:
        """A step asks for an engine; returns its id."""
        self._ids += 1
        step = QueuedStep(
            id=self._ids,
            engine=name,
            client=client,
            priority=priority,
            asked_s=self.now_s,
            need_tokens=tokens,
            prompt_tokens=tokens,
            output_tokens=tokens,
            deadline_s=None if within_s is None else self.now_s + within_s,
            load_only=load_only,
            probe=probe,
            preemptible=preemptible,
        )
        try:
            self.planner.submit(step, self.now_s)
        except EdgeAgentError as error:
            self._end(step, "rejected")
            self.errors[step.id] = error
        else:
            self.waiting[step.id] = step
            self.turn()
        return step.id

    def withdraw(self, step_id: int) -> None:
        """Nobody wants a waiting step any more."""
        step = self.waiting.pop(step_id)
        assert self.planner.withdraw(step_id)
        self._end_lease(step)
        self._end(step, "withdrawn")
        self.turn()

    # --- what workers do ---

    def running(self) -> Iterator[QueuedStep]:
        for process in self.processes.values():
            yield from process.running.values()

    def first_token(self, step: QueuedStep) -> None:
        self._end_lease(step)
        self.planner.first_token(step)
        self.turn()

    def finish(self, step: QueuedStep, served: Served | None = None) -> None:
        """A step's last token."""
        self._let_go(step)
        self._end(step, "ended")
        self.planner.ended(step, self.now_s, served)
        self.turn()

    def let_go(self, step: QueuedStep) -> None:
        """The worker has stopped a step that was preempted."""
        assert step.id in self.preempting
        self._let_go(step)
        self.waiting[step.id] = step
        self.planner.preempted(step, self.now_s)
        self.turn()

    def load_ends(self, name: str, held_bytes: int | None = None) -> None:
        process = self.processes[name]
        steady = process.facts.footprint.steady_bytes
        process.state = EngineState.READY
        process.claim_bytes = process.real_bytes = steady
        process.held_bytes = min(steady if held_bytes is None else held_bytes, steady)
        process.cache_bytes = process.facts.cache_bytes
        self.planner.loaded(name, process.facts.slots, process.held_bytes, self.now_s)
        self.turn()

    def load_fails(self, name: str, error: EdgeAgentError = WORKER_LOST, *, retry: bool) -> None:
        del self.processes[name]
        self.seen_exits = False
        for refused in self.planner.load_failed(name, error, retry=retry):
            self._refused(refused)
        self.turn()

    def crash(self, name: str, *, steps_fail: bool = True) -> None:
        """A process ends by itself; its steps fail, or are left to wait again."""
        if steps_fail:
            for step in list(self.processes[name].running.values()):
                self._let_go(step)
                self._end(step, "ended")
                self.planner.ended(step, self.now_s, None)
        self.processes[name].state = EngineState.STOPPING
        self.planner.lost(name)
        self.turn()

    def process_ends(self, name: str, leak_bytes: int = 0) -> None:
        """A process that was told to end, or has crashed, is gone."""
        process = self.processes.pop(name)
        self.seen_exits = False
        for step in list(process.running.values()):
            self.preempting.discard(step.id)
            self.waiting[step.id] = step
        if leak_bytes:
            self.leaked_bytes[name] = self.leaked_bytes.get(name, 0) + leak_bytes
            self.planner.leaked(name, leak_bytes)
        else:
            self.planner.gone(name)
        self.turn()

    # --- what the daemon's owner does ---

    def unload(self, name: str) -> None:
        if self.planner.unload(name):
            self.processes[name].state = EngineState.STOPPING
        self.turn()

    def pin(self, name: str, *, pinned: bool) -> None:
        (self.planner.state.pins.add if pinned else self.planner.state.pins.discard)(name)
        self.turn()

    def reload(self, rules: Rules) -> None:
        self.planner.state.rules = rules
        self.turn()

    def know(self, facts: EngineFacts) -> None:
        self.facts[facts.name] = facts
        self.planner.know(facts)
        self.turn()

    def turn(self) -> None:
        """Carry out what is decided; asked again at once, the planner has nothing to add."""
        draining = self._draining()
        actions = self.planner.decide(self.now_s)
        self.closed = draining & self._draining()
        for action in actions:
            self.actions.append((self.now_s, action))
            self._carry_out(action)
        again = self.planner.decide(self.now_s)
        assert again == [], (actions, again)
        wake_s = self.planner.wake_s()
        assert wake_s is None or wake_s > self.now_s
        self.check()

    def _draining(self) -> set[str]:
        residents = self.planner.state.residents.values()
        return {each.name for each in residents if each.state is EngineState.DRAINING}

    # --- decisions, checked against the books ---

    def _carry_out(self, action: Action) -> None:
        match action:
            case Start(step=step):
                self._start(step)
            case Ready(step=step):
                assert self.waiting.pop(step.id) == step
                assert step.load_only
                assert self.processes[step.engine].state is EngineState.READY
                self._end(step, "ready")
            case Refuse():
                self._refused(action)
            case Preempt(step=step, by=by):
                assert step.preemptible
                assert step.id in self.processes[step.engine].running
                assert step.id not in self.preempting
                assert by.id in self.waiting
                self.preempting.add(step.id)
            case Load(engine=name):
                self._load(name)
            case Unload(engine=name, why=why):
                self._unload(name, why)
            case Kill(engine=name):
                self._kill(name)
            case DropCache(engine=name):
                self._drop_cache(name)

    def _start(self, step: QueuedStep) -> None:
        assert self.waiting.pop(step.id) == step
        assert not step.load_only
        process = self.processes[step.engine]
        assert process.state is EngineState.READY
        if step.engine in self.closed:  # a victim goes on only for whoever has his turn sooner
            victim = self.planner.state.residents[step.engine]
            head = self.planner.state.queue.head(victim.why)
            assert head is not None
            assert victim.running[step.id].key < head[0]
        cool = step.priority is Priority.URGENT or self.seen.heat is Heat.NOMINAL
        quarters = 4 if cool else 2 if self.seen.heat is Heat.THROTTLED else 3
        places = max(1, -(-process.facts.slots * quarters // 4))
        assert len(process.running) < places
        used = sum(each.need_tokens for each in process.running.values())
        assert not process.running or used + step.need_tokens <= process.facts.kv_tokens
        process.running[step.id] = step

    def _load(self, name: str) -> None:
        assert name not in self.processes
        self._nothing_else_moves(name)
        by = [step for step in self.waiting.values() if step.engine == name and not step.probe]
        assert by
        assert len(self.processes) < self.rules.max_resident_engines
        facts, available = self.facts[name], self.seen.memory.available_bytes
        assert facts.refusal is None
        assert available is None or available >= self.rules.soft_floor_bytes
        assert facts.footprint.load_peak_bytes <= self.allowed_bytes()
        lease = self.planner.state.residents[name].lease
        assert lease is None or lease in {step.id for step in by}
        assert lease is not None or any(step.load_only for step in by)
        self.processes[name] = Process(
            facts, claim_bytes=facts.footprint.load_peak_bytes, lease=lease
        )

    def allowed_bytes(self) -> int:
        """What one more engine may take by the rules, as memory was last seen."""
        rules, available = self.rules, self.seen.memory.available_bytes
        held = sum(each.held_bytes for each in self.processes.values())
        leaked = sum(leak.missing_bytes for leak in self.planner.state.leaks.values())
        claimed = sum(each.claim_bytes for each in self.processes.values()) + leaked
        others = 0
        if available is not None:
            others = max(0, self.total_bytes - available - self.dropped_bytes - held - leaked)
        kept = max(rules.reserve_bytes, others + rules.soft_floor_bytes)
        allowed = self.total_bytes - kept - claimed
        if rules.budget_bytes is not None:
            allowed = min(allowed, rules.budget_bytes - claimed)
        return allowed

    def _unload(self, name: str, why: str) -> None:
        process = self.processes[name]
        self._nothing_else_moves(name)
        assert process.state is EngineState.READY
        assert not process.running
        assert name not in self.planner.state.pins
        assert process.lease is None
        assert why in ("ROOM", "SOFT_FLOOR")
        if why == "SOFT_FLOOR":
            assert not any(step.engine == name for step in self.waiting.values())
            assert self.planner.state.level.name == "SOFT"
        process.state = EngineState.STOPPING

    def _kill(self, name: str) -> None:
        available = self.seen.memory.available_bytes
        assert available is not None
        assert available < self.rules.hard_floor_bytes * 1.25
        assert self.seen_exits
        stopping = [each for each in self.processes.values() if each.state is EngineState.STOPPING]
        assert not stopping
        if name in self.planner.state.pins:
            assert self.processes.keys() <= self.planner.state.pins
        self.processes[name].state = EngineState.STOPPING

    def _drop_cache(self, name: str) -> None:
        process = self.processes[name]
        assert process.cache_bytes
        assert not process.running
        self.dropped_bytes += process.held_bytes - max(0, process.held_bytes - process.cache_bytes)
        process.claim_bytes -= process.cache_bytes
        process.real_bytes -= process.cache_bytes
        process.held_bytes = max(0, process.held_bytes - process.cache_bytes)
        process.cache_bytes = 0

    def _nothing_else_moves(self, name: str) -> None:
        moving = (EngineState.LOADING, EngineState.STOPPING)
        assert not [
            each.facts.name
            for each in self.processes.values()
            if each.state in moving and each.facts.name != name
        ]

    def _refused(self, refused: Refuse) -> None:
        assert self.waiting.pop(refused.step.id) == refused.step
        self._end_lease(refused.step)
        self._end(refused.step, "refused")
        self.errors[refused.step.id] = refused.error

    def _let_go(self, step: QueuedStep) -> None:
        self.preempting.discard(step.id)
        self._end_lease(step)
        del self.processes[step.engine].running[step.id]

    def _end_lease(self, step: QueuedStep) -> None:
        process = self.processes.get(step.engine)
        if process is not None and process.lease == step.id:
            process.lease = None

    def _end(self, step: QueuedStep, how: str) -> None:
        assert how in ENDINGS
        assert step.id not in self.outcomes
        self.outcomes[step.id] = how

    # --- what always holds ---

    def check(self) -> None:
        state = self.planner.state
        assert {step.id for step in state.queue.waiting()} == self.waiting.keys()
        assert state.residents.keys() == self.processes.keys()
        draining = set()
        for name, resident in state.residents.items():
            process = self.processes[name]
            assert resident.running.keys() == process.running.keys()
            assert resident.committed_bytes == process.claim_bytes
            assert resident.lease == process.lease
            if resident.state is EngineState.DRAINING:
                draining.add(resident.why)
            else:
                assert resident.state is process.state
        assert len(draining) <= 1
        in_queue = self.waiting.keys() & {step.id for step in self.running()}
        assert not in_queue

    # --- what happens when nobody interferes ---

    def let_time_pass(self, seconds: float) -> None:
        self.now_s += seconds
        self.turn()

    def move_on(self) -> bool:
        """Let whatever is under way come to its end, once; False when nothing is."""
        for name, process in list(self.processes.items()):
            resident = self.planner.state.residents[name]
            if process.state is EngineState.STOPPING and resident.ready_s == 0.0:
                self.load_fails(name, retry=True)  # killed while it was loaded
                return True
            if process.state is EngineState.STOPPING:
                self.process_ends(name)
                self.observe()
                return True
            if process.state is EngineState.LOADING:
                self.load_ends(name)
                return True
        for step in list(self.running()):
            if step.id in self.preempting:
                self.let_go(step)
                return True
            self.first_token(step)
            self.finish(step)
            return True
        wake_s = self.planner.wake_s()
        if wake_s is None:
            return False
        self.let_time_pass(wake_s - self.now_s)
        return True

    def come_to_rest(self) -> None:
        """Others are modest, leaks are back, nothing is pinned: nobody is left waiting."""
        self.planner.state.pins.clear()
        self.others_bytes, self.heat, self.blind = 0, Heat.NOMINAL, False
        self.leaked_bytes.clear()
        self.observe()
        for _ in range(40 + 20 * len(self.outcomes) + 40 * len(self.waiting)):
            if not self.move_on():
                self.observe()  # memory is read all the time: a leak is seen to be back
                if not self.move_on():
                    break
            if not self.seen_exits:
                self.observe()
        assert not self.waiting
        assert not list(self.running())
        assert self.outcomes.keys() == set(range(1, self._ids + 1))


def changed(rules: Rules, **values: object) -> Rules:
    """The same rules but for these."""
    return replace(rules, **values)  # type: ignore[arg-type]
