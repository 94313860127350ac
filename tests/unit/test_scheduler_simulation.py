"""The real scheduler through seeded hours of everything that happens to it, in virtual time.

Scripted workers take the place of processes (`tests.support.scripted_host`); the queue, the books,
loads, unloads, preemption and their errors are the real ones. The last tests plant bugs and see
that the invariants catch them.
"""

import asyncio
import contextlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from edge_agent.core import (
    EngineState,
    Message,
    Priority,
    Role,
    RunState,
    Sampling,
    StepOrigin,
    StepRequest,
    StepResult,
    TextPart,
)
from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.host import WorkerSettings
from edge_agent.engines.manifest import MANIFEST_NAME, decode_manifest
from edge_agent.engines.protocol import Options
from edge_agent.errors import EdgeAgentError, NotFound
from edge_agent.scheduling.loading import LoadingSettings
from edge_agent.scheduling.pending import PendingStep
from edge_agent.scheduling.planner import Planner
from edge_agent.scheduling.residency import Residency
from edge_agent.scheduling.scheduler import Scheduler, SchedulerSettings
from edge_agent.scheduling.state import State
from edge_agent.scheduling.steps import Steps
from edge_agent.scheduling.values import Rules
from tests.support.chaos import TIMES
from tests.support.engine_files import recipe_data
from tests.support.scripted_host import GIB, World, quiet, rough
from tests.support.virtual_time import run_in_virtual_time

SEEDS = 150 * TIMES
SOFT_FLOOR, HARD_FLOOR = 1 * GIB, GIB // 2
ENDLESS = 2000
SAMPLE_S = 0.25
LASTS_S = 25.0
PATIENCE_S = 900.0
"""Virtual: after this everybody must have got an answer."""
SIZES = {"small": GIB, "middle": 3 * GIB, "large": 6 * GIB, "cached": 2 * GIB, "huge": 11 * GIB}
OPTIONS = Options(
    slots=2,
    context_tokens=2048,
    threads=1,
    prefill_batch_tokens=64,
    backlog_tokens=4096,
    backlog_s=30.0,
)
WORKER = WorkerSettings(
    python=None, heartbeat_interval_s=5.0, heartbeat_timeout_s=60.0, oom_score_adj=500
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """Engines of several sizes, whose files are a few bytes."""
    root = tmp_path_factory.mktemp("store")
    for name, steady in SIZES.items():
        data = recipe_data({"model.bin": name.encode()}, name)
        del data["obtain"]
        data["source"] = {"kind": "path", "location": "files"}
        cache = steady // 4 if name == "cached" else 0
        data["memory"] = {
            "load_peak_bytes": steady + steady // 8,
            "steady_bytes": steady,
            "cache_bytes": cache,
        }
        (root / name).mkdir()
        (root / name / "model.bin").write_bytes(name.encode())
        (root / name / MANIFEST_NAME).write_text(json.dumps(data))
    return Catalogue(root)


def settings(chance: random.Random) -> SchedulerSettings:
    """As an operator may have them."""
    slots = chance.choice([1, 2, 4])
    loading = LoadingSettings(
        load_timeout_s=10.0,
        unload_timeout_s=2.0,
        memory_back_s=2.0,
        worker=lambda _manifest: WORKER,
        options=lambda _manifest: msgspec.structs.replace(OPTIONS, slots=slots),
    )
    rules = Rules(
        reserve_bytes=2 * GIB,
        soft_floor_bytes=SOFT_FLOOR,
        hard_floor_bytes=HARD_FLOOR,
        max_resident_engines=chance.choice([1, 2, 3, 8]),
        max_waiting_steps=chance.choice([3, 64]),
        min_residency_s=chance.choice([0.0, 2.0]),
        residency_per_load=chance.choice([0.0, 1.0]),
    )
    return SchedulerSettings(
        rules, loading, frozenset(chance.sample(["small"], chance.choice([0, 1])))
    )


@dataclass(eq=False)
class Caller:
    """One step that somebody waits for: what it was told, and how it ended."""

    engine: str
    request: StepRequest
    told: list[str] = field(default_factory=list)
    tokens: int = 0
    states: list[RunState] = field(default_factory=list)
    task: "asyncio.Task[StepResult] | None" = None
    ended: bool = False

    def text(self, text: str, tokens: int) -> None:
        assert not self.ended, "text after the end"
        assert text, "an empty piece of text"
        self.told.append(text)
        self.tokens += tokens

    def state(self, state: RunState, progress: float | None) -> None:
        assert not self.ended, "a state after the end"
        assert progress is None or state is RunState.LOADING
        self.states.append(state)

    async def ask(self, scheduler: Scheduler, origin: StepOrigin) -> StepResult:
        try:
            return await scheduler.decide(
                self.engine, self.request, origin, on_text=self.text, on_state=self.state
            )
        finally:
            self.ended = True

    def check(self) -> None:
        """Its end, once: a result that holds what was told, or a typed error."""
        task = self.task
        assert task is not None
        assert task.done(), f"no end of a step for {self.engine}; told: {self.states[-3:]}"
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            assert isinstance(error, EdgeAgentError), repr(error)
            return
        result = task.result()
        told = "".join(self.told)
        if self.request.sampling.temperature == 0.0 or not self.request.output_schema_json:
            assert told == result.text, (
                f"what was told is not what was decided {told} {result} {self.request}"
            )
        usage = result.usage
        assert usage.completion_tokens >= self.tokens, "tokens that were told are in the usage"
        words = len(result.text.split())
        assert usage.completion_tokens >= words
        assert self.request.output_schema_json or usage.completion_tokens == words
        assert min(usage.queue_s, usage.load_s) >= 0
        assert RunState.RUNNING in self.states


class Simulation:
    """One seeded history."""

    def __init__(self, seed: int, store: Catalogue) -> None:
        self.chance = random.Random(seed)  # noqa: S311 - reproducible, no secret
        self.world = World(self.chance)
        self.world.chances = rough(self.chance)
        self.store = store
        self.scheduler = Scheduler(
            store,
            settings(self.chance),
            self.world.machine,
            new_host=self.world.new_host,  # type: ignore[arg-type]
        )
        self.world.machine.tells_of_processes = self.chance.random() < 0.5
        self.lost_before: set[str] = set()
        self.broken: list[dict[str, Any]] = []
        self.callers: list[Caller] = []
        self.others: list[asyncio.Task[Any]] = []
        self.favourites = self.chance.sample(list(SIZES), 2)
        self.busy_s = self.chance.choice([0.05, 0.5, 2.0])

    async def play(self) -> None:
        self._watch_for_endless_decisions()
        asyncio.get_running_loop().set_exception_handler(
            lambda _loop, context: self.broken.append(context)
        )
        sampling = asyncio.create_task(self._sample())
        try:
            await self._live()
            self._put_back()
            if self.chance.random() < 0.3:
                await self._stop_in_the_middle()
            else:
                await self._calm_down()
                await self._use_every_engine()
                await asyncio.wait_for(self.scheduler.stop(), PATIENCE_S)
        finally:
            sampling.cancel()
            await asyncio.wait([sampling])
            self._put_back()
        if not sampling.cancelled():
            sampling.result()
        self._check_the_end()

    def _watch_for_endless_decisions(self) -> None:
        loop, planner = asyncio.get_running_loop(), self.scheduler.planner
        decide, at_s, count = planner.decide, 0.0, 0

        def counted(now_s: float) -> Any:
            nonlocal at_s, count
            at_s, count = loop.time(), count + 1 if loop.time() == at_s else 0
            assert count < ENDLESS, "decisions without end at one moment"
            return decide(now_s)

        planner.decide = counted  # type: ignore[method-assign]

    async def _live(self) -> None:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + LASTS_S
        while loop.time() < until_s:
            await asyncio.sleep(self.chance.expovariate(1 / self.busy_s))
            self._something()

    def _something(self) -> None:
        acts: list[tuple[Callable[[], Any], int]] = [
            (self._ask, 20),
            (self._cancel, 6),
            (self._hog, 2),
            (self._kill, 1),
            (self._reload, 1),
            (self._pin, 1),
            (self._operate, 3),
            (self._remove, 1),
            (self._look, 2),
        ]
        act = self.chance.choices([act for act, _ in acts], [weight for _, weight in acts])[0]
        act()

    def _ask(self, engine: str = "") -> "asyncio.Task[StepResult]":
        """A step of anybody for anything; `engine`: one without a deadline for this engine."""
        chance, loop = self.chance, asyncio.get_running_loop()
        request = StepRequest(
            (Message(Role.USER, (TextPart(f"q{chance.randrange(100)}"),)),),
            output_schema_json=chance.choice(["", "{}"]),
            sampling=Sampling(temperature=chance.choice([0.0, 0.0, 1.0])),
            max_output_tokens=chance.choice([None, 5]),
        )
        longest_s = chance.choice([10.0, 100.0, PATIENCE_S / 2])
        deadline_s = None if engine else loop.time() + chance.uniform(0.0, longest_s)
        origin = StepOrigin(
            chance.choice(["robot", "app", "cron"]),
            chance.choice([*Priority, Priority.BATCH, Priority.BATCH]),
            deadline_s,
            "run",
        )
        among = self.favourites if chance.random() < 0.5 else list(SIZES)
        caller = Caller(engine or chance.choice(among), request)
        caller.task = asyncio.create_task(caller.ask(self.scheduler, origin))
        self.callers.append(caller)
        return caller.task

    def _cancel(self) -> None:
        waiting = [caller.task for caller in self.callers if caller.task and not caller.ended]
        if waiting:
            self.chance.choice(waiting).cancel()

    def _hog(self) -> None:
        self.world.hog_bytes = self.chance.choice([0, 0, 4 * GIB, 10 * GIB, 13 * GIB, 14 * GIB])

    def _kill(self) -> None:
        alive = [host for host in self.world.hosts if host.process_alive]
        if alive:
            self.chance.choice(alive).die()

    def _reload(self) -> None:
        self.scheduler.settings = settings(self.chance)

    def _pin(self) -> None:
        name, pinned = self.chance.choice(list(SIZES)), self.chance.random() < 0.3
        with contextlib.suppress(NotFound):  # while it is removed
            self.scheduler.pin(name, pinned=pinned)

    def _operate(self) -> None:
        name, scheduler = self.chance.choice(list(SIZES)), self.scheduler
        call = self.chance.choice([scheduler.load, scheduler.unload, scheduler.release])
        self.others.append(asyncio.create_task(call(name)))

    def _remove(self) -> None:
        """An engine is not installed for a while, whoever waits for it."""
        installed = self.store.root / self.chance.choice(list(SIZES))
        away = installed.with_name(".removed")
        if not away.exists() and installed.exists():
            installed.rename(away)
            back_s = self.chance.uniform(0.1, 5.0)
            asyncio.get_running_loop().call_later(back_s, self._put_back)

    def _put_back(self) -> None:
        away = self.store.root / ".removed"
        if away.exists():
            away.rename(self.store.root / decode_manifest((away / MANIFEST_NAME).read_bytes()).name)

    def _look(self) -> None:
        waits = self.scheduler.explain()
        assert len(waits) == self.scheduler.step_counts()[0]
        assert all(wait.starts_in_s is None or wait.starts_in_s >= 0 for wait in waits)
        self.scheduler.memory()
        self.scheduler.engines()

    async def _sample(self) -> None:
        """Telemetry: tells what is, and looks whether the books agree."""
        while True:
            await asyncio.sleep(SAMPLE_S)
            self.scheduler.observe(
                self.world.machine.set(available_bytes=self.world.available_bytes)
            )
            self.check_books()

    async def _calm_down(self) -> None:
        """Nothing goes wrong any more: everybody gets an end, and nothing is left waiting."""
        quiet(self.world)
        tasks = [caller.task for caller in self.callers if caller.task] + self.others
        if tasks:
            _, waiting = await asyncio.wait(tasks, timeout=PATIENCE_S)
            assert not waiting, [self.scheduler.explain(), waiting]
        self._check_ends()
        await asyncio.sleep(60.0)  # what is cancelled lets go, and a leak is found to be back
        assert self.scheduler.step_counts() == (0, 0)
        self.check_books()
        assert not self.scheduler._steps._pending

    async def _use_every_engine(self) -> None:
        for name in SIZES:
            self.scheduler.pin(name, pinned=False)
        for name in SIZES:
            await self.scheduler.release(name)
            for other in [] if self.world.machine.tells_of_processes else SIZES:
                await self.scheduler.unload(other)  # what it holds may be taken for others'
            await asyncio.wait_for(self.scheduler.load(name), PATIENCE_S)
            slots = self.scheduler.engine(name).worker.slots  # type: ignore[union-attr]
            used = [self._ask(name) for _ in range(min(slots, 3))]
            await asyncio.wait_for(asyncio.gather(*used), PATIENCE_S)

    async def _stop_in_the_middle(self) -> None:
        await asyncio.wait_for(self.scheduler.stop(), PATIENCE_S)
        tasks = [caller.task for caller in self.callers if caller.task] + self.others
        if tasks:
            _, waiting = await asyncio.wait(tasks, timeout=1.0)
            assert not waiting, f"after the stop: {waiting}"

    def _check_ends(self) -> None:
        for caller in self.callers:
            caller.check()
        for task in self.others:
            error = None if task.cancelled() else task.exception()
            assert error is None or isinstance(error, EdgeAgentError), repr(error)

    def _check_the_end(self) -> None:
        self._check_ends()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks that are left: {left}"
        alive = [host for host in self.world.hosts if host.process_alive]
        assert not alive or self.world.chances.never_ends, "processes that are left"
        assert self.scheduler.loaded_count() == 0
        assert not self.scheduler._steps._pending

    def check_books(self) -> None:
        """The planner's records are what really is."""
        assert not self.broken, self.broken
        if self.scheduler._stopping:
            return
        state, residency = self.scheduler.planner.state, self.scheduler._residency
        assert state.residents.keys() == residency._hosted.keys()
        lost = {
            name
            for name, hosted in residency._hosted.items()
            if hosted.ready and hosted.unloading is None and hosted.host.lost.done()
        }
        assert not lost & self.lost_before, f"nobody notices that {lost} are gone"
        self.lost_before = lost
        running: set[int] = set()
        for name, resident in state.residents.items():
            running |= resident.running.keys()
            host = self.world.alive(name)
            if resident.state in (EngineState.READY, EngineState.DRAINING) and host is not None:
                open_steps = {
                    pending.step.id
                    for pending in self.scheduler._steps._pending.values()
                    if pending.step.engine == name
                    and pending.sequence is not None
                    and not pending.sequence.ended.done()
                }
                assert open_steps <= resident.running.keys()
                assert len(host.open_sequences) == len(open_steps)
        for pending in self.scheduler._steps._pending.values():
            queued = pending.step.id in state.queue
            assert queued or pending.step.id in running or pending.done.done()
            assert not (queued and pending.step.id in running)
        assert len(state.queue) == sum(
            step.id in self.scheduler._steps._pending for step in state.queue.waiting()
        )


def play(seed: int, store: Catalogue) -> None:
    async def run() -> None:
        await Simulation(seed, store).play()

    run_in_virtual_time(run())


@pytest.mark.parametrize("seed", range(SEEDS))
def test_everybody_gets_one_end_and_no_place_is_lost(seed: int, store: Catalogue):
    play(seed, store)


def test_everything_that_can_happen_does(store: Catalogue):
    with capture_logs() as logs:
        for seed in range(30):
            play(seed, store)
    seen = {entry["event"] for entry in logs} | {
        "second attempt" for entry in logs if entry.get("attempt") == 2
    }
    assert seen >= {
        "engine_evicted",
        "engine_killed",
        "engine_load_failed",
        "engine_loaded",
        "engine_memory_leaked",
        "engine_unload_unproven",
        "engine_unloaded",
        "memory_pressure",
        "second attempt",
        "step_preempted",
        "worker_lost",
    }


# --- each planted bug is found by one of the same seeds ---


def keep_the_place(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(State, "give_place", lambda _self, _step, _now_s: True)


def forget_who_ran(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Planner, "preempted", lambda self, step, now_s: self.state.give_place(step, now_s)
    )


def tell_everything_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PendingStep, "_new_part", lambda _self, text: text)


def count_the_last_attempt_only(patch: pytest.MonkeyPatch) -> None:
    def stopped(self: PendingStep, now_s: float) -> None:
        real(self, now_s)
        self._tokens_before = 0

    real = PendingStep.stopped
    patch.setattr(PendingStep, "stopped", stopped)


def leave_the_caller_waiting(patch: pytest.MonkeyPatch) -> None:
    def fail(self: Steps, pending: PendingStep, error: BaseException) -> None:
        if "ended" not in str(error):
            real(self, pending, error)

    real = Steps._fail
    patch.setattr(Steps, "_fail", fail)


def move_two_at_once(patch: pytest.MonkeyPatch) -> None:
    def begin(self: Residency, name: str, attempt: int) -> None:
        """Another load begins that nobody has decided."""
        real(self, name, attempt)
        for other in SIZES:
            if (
                other not in self._planner.state.residents
                and self._catalogue.root.joinpath(other).exists()
            ):
                host = self._loader.new_host(self._catalogue.get(other), self._settings())
                self._spawn(self._loader._start(host, OPTIONS, self._settings(), lambda _f: None))
                return

    real = Residency.begin_load
    patch.setattr(Residency, "begin_load", begin)


def lose_an_engine_in_its_load(patch: pytest.MonkeyPatch) -> None:
    def kill(self: Residency, name: str) -> None:
        hosted = self._hosted[name]
        if hosted.ready:
            real(self, name)
        else:
            hosted.host.kill()
            assert hosted.loading is not None
            hosted.loading.cancel()
            self._stopping = True

    real = Residency.kill
    patch.setattr(Residency, "kill", kill)


def forget_a_lost_worker(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Residency, "_lost", lambda *_: None)


def stop_without_the_loads(patch: pytest.MonkeyPatch) -> None:
    async def stop(self: Residency) -> None:
        self._background.clear()
        await real(self)

    real = Residency.stop
    patch.setattr(Residency, "stop", stop)


def stop_without_an_answer(patch: pytest.MonkeyPatch) -> None:
    async def stop(self: Scheduler) -> None:
        self._steps._pending.clear()
        await real(self)

    real = Scheduler.stop
    patch.setattr(Scheduler, "stop", stop)


@pytest.mark.parametrize(
    "plant",
    [
        keep_the_place,
        forget_who_ran,
        tell_everything_again,
        count_the_last_attempt_only,
        leave_the_caller_waiting,
        move_two_at_once,
        lose_an_engine_in_its_load,
        forget_a_lost_worker,
        stop_without_the_loads,
        stop_without_an_answer,
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], store: Catalogue, monkeypatch: pytest.MonkeyPatch
):
    plant(monkeypatch)
    for seed in range(SEEDS):
        try:
            play(seed, store)
        except (AssertionError, TimeoutError, EdgeAgentError, KeyError):
            return
    pytest.fail(f"{plant.__name__}: nobody noticed")
