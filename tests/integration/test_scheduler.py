"""The scheduler with real workers: loads on demand, makes room, and survives what breaks."""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent.core import EngineInfo, EngineState, RunState, StepOrigin, StepResult
from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.manifest import MANIFEST_NAME
from edge_agent.errors import (
    FailedPrecondition,
    LoadFailed,
    NotFound,
    Overloaded,
    StepFailed,
    WorkerError,
)
from edge_agent.scheduling.loading import LoadingSettings
from edge_agent.scheduling.scheduler import Scheduler, SchedulerSettings
from edge_agent.scheduling.values import Rules
from tests.support.engines import OPTIONS, WORKER, long_request, make_store, request
from tests.support.machine import SetMachine
from tests.support.processes import is_gone, wait_gone

WAIT_S = 45.0
FAST = msgspec.structs.replace(OPTIONS, context_tokens=256)
SHORT = {"max_output_tokens": 2}


@pytest.fixture
def store(engine_store: Path, tmp_path: Path) -> Catalogue:
    return make_store(engine_store, tmp_path / "store", "alpha", "beta", "gamma")


def settings(**changes: Any) -> SchedulerSettings:
    slots = changes.pop("slots", 2)
    loading = LoadingSettings(
        load_timeout_s=changes.pop("load_timeout_s", 30.0),
        unload_timeout_s=10.0,
        memory_back_s=1.0,
        worker=lambda _manifest: WORKER,
        options=lambda _manifest: msgspec.structs.replace(FAST, slots=slots),
    )
    rules: dict[str, Any] = {
        "reserve_bytes": 0,
        "soft_floor_bytes": 0,
        "hard_floor_bytes": 0,
        "max_resident_engines": 1,
        "max_waiting_steps": 16,
        "min_residency_s": 0.0,
        "residency_per_load": 0.0,
    }
    return SchedulerSettings(Rules(**(rules | changes)), loading)


@pytest.fixture
def play(store: Catalogue):
    """Run a scenario with a scheduler; it is stopped, and no process of it is left."""

    def run(scenario: Callable[[Scheduler], Coroutine[Any, Any, Any]], **changes: Any) -> Any:
        async def bounded() -> Any:
            scheduler = Scheduler(store, settings(**changes), SetMachine())
            seen: set[int] = set()
            try:
                async with asyncio.timeout(WAIT_S):
                    return await scenario(scheduler)
            finally:
                seen |= {info.worker.pid for info in scheduler.engines() if info.worker}
                await scheduler.stop()
                assert all(is_gone(pid) for pid in seen)
                assert scheduler.loaded_count() == 0

        return asyncio.run(bounded())

    return run


class Asked:
    """One step that a caller waits for."""

    def __init__(self, scheduler: Scheduler, engine: str, **wanted: Any) -> None:
        self.states: list[RunState] = []
        self.progress: list[float] = []
        self.begun = asyncio.Event()
        self.reached: dict[RunState, asyncio.Event] = {s: asyncio.Event() for s in RunState}
        endless = wanted.pop("endless", False)
        step = long_request(**wanted) if endless else request(**(SHORT | wanted))
        self.task: asyncio.Task[StepResult] = asyncio.create_task(
            scheduler.decide(
                engine, step, StepOrigin("test"), on_text=self._text, on_state=self._state
            )
        )

    def _text(self, _text: str, _tokens: int) -> None:
        self.begun.set()

    def _state(self, state: RunState, progress: float | None) -> None:
        if progress is not None:
            self.progress.append(progress)
        elif not self.states or self.states[-1] is not state:
            self.states.append(state)
        self.reached[state].set()

    async def give_up(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


@contextlib.contextmanager
def frozen(worker: int) -> Iterator[None]:
    """Its steps stay where they are, and it takes no processor time from the others."""
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker, signal.SIGCONT)


def pid(scheduler: Scheduler, name: str) -> int:
    worker = scheduler.engine(name).worker
    assert worker is not None
    return worker.pid


async def until(
    scheduler: Scheduler, name: str, wanted: Callable[[EngineInfo], bool]
) -> EngineInfo:
    """Wait for an engine to be so."""
    async for info in scheduler.watch():
        if info.name == name and wanted(info):
            return info
    raise AssertionError("the watch ended")


class TestLoading:
    def test_a_step_loads_the_engine_it_needs_and_the_next_finds_it_loaded(self, play):
        async def scenario(scheduler: Scheduler) -> tuple[Asked, Asked]:
            first = Asked(scheduler, "alpha")
            first_result = await first.task
            info = scheduler.engine("alpha")
            assert (info.state, info.worker.slots) == (EngineState.READY, 2)  # type: ignore[union-attr]
            assert info.load_progress is None
            second = Asked(scheduler, "alpha")
            second_result = await second.task
            assert first_result.usage.load_s > 0
            assert second_result.usage.load_s == 0
            assert first_result.usage.queue_s >= 0
            return first, second

        first, second = play(scenario)
        assert first.states == [RunState.LOADING, RunState.RUNNING]
        assert first.progress == sorted(first.progress)
        assert first.progress
        assert second.states == [RunState.RUNNING]

    def test_many_that_want_it_at_once_load_it_once(self, play):
        async def scenario(scheduler: Scheduler) -> int:
            asked = [Asked(scheduler, "alpha") for _ in range(4)]
            await asyncio.gather(*(each.task for each in asked))
            assert all(each.states[0] is RunState.LOADING for each in asked)
            return scheduler.loaded_count()

        assert play(scenario, max_resident_engines=3) == 1

    def test_a_step_that_finds_no_place_is_queued_and_then_runs(self, play):
        async def scenario(scheduler: Scheduler) -> Asked:
            busy = Asked(scheduler, "alpha", endless=True)
            await busy.begun.wait()
            waits = Asked(scheduler, "alpha")
            await waits.reached[RunState.QUEUED].wait()
            worker = scheduler.engine("alpha").worker
            assert worker is not None
            assert (worker.active_steps, worker.waiting_steps) == (1, 1)
            await busy.give_up()
            await waits.task
            return waits

        assert play(scenario, slots=1).states == [RunState.QUEUED, RunState.RUNNING]

    def test_a_cancelled_steps_place_is_free_only_when_the_worker_let_go(self, play):
        async def scenario(scheduler: Scheduler) -> None:
            busy = Asked(scheduler, "alpha", endless=True)
            await busy.begun.wait()
            await busy.give_up()
            worker = scheduler.engine("alpha").worker
            assert worker is not None
            assert worker.active_steps == 1
            await until(
                scheduler, "alpha", lambda info: not (info.worker and info.worker.active_steps)
            )

        play(scenario, slots=1)

    def test_an_unknown_engine_is_named(self, play):
        async def scenario(scheduler: Scheduler) -> None:
            for work in (
                scheduler.load("nobody"),
                scheduler.unload("nobody"),
                Asked(scheduler, "nobody").task,
            ):
                with pytest.raises(NotFound, match="'nobody'"):
                    await work

        play(scenario)

    def test_a_refused_step_leaves_its_place(self, play):
        async def scenario(scheduler: Scheduler) -> None:
            for _ in range(2):
                with pytest.raises(StepFailed, match="2000"):
                    await Asked(scheduler, "alpha", max_output_tokens=2000).task
            await Asked(scheduler, "alpha").task

        play(scenario, slots=1)

    def test_preloading_is_in_the_background_and_a_failure_stays_on_the_engine(
        self, play, store: Catalogue
    ):
        async def scenario(scheduler: Scheduler) -> EngineInfo:
            scheduler.preload(("alpha", "beta"))
            assert scheduler.loaded_count() == 0
            await until(scheduler, "alpha", lambda info: info.state is EngineState.READY)
            return await until(scheduler, "beta", lambda info: info.error is not None)

        truncate(store, "beta")
        failed = play(scenario, max_resident_engines=2)
        assert failed.state is EngineState.FAILED


def truncate(store: Catalogue, name: str) -> None:
    """Cut the engine's file; the others keep theirs."""
    manifest = store.get(name)
    path = store.directory(name) / manifest.model
    path.unlink()
    path.write_bytes(b"GGUF")


def corrupt(store: Catalogue, name: str) -> None:
    """A file that is what the manifest says, and no model."""
    content = b"GGUF" + bytes(4096)
    directory = store.directory(name)
    manifest = json.loads((directory / MANIFEST_NAME).read_text())
    (spec,) = manifest["files"]
    spec |= {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest))
    (directory / spec["path"]).unlink()
    (directory / spec["path"]).write_bytes(content)


class TestMakingRoom:
    def test_the_engine_unused_longest_goes(self, play):
        async def scenario(scheduler: Scheduler) -> dict[str, EngineState]:
            await Asked(scheduler, "alpha").task
            await Asked(scheduler, "beta").task
            await Asked(scheduler, "alpha").task
            gone = pid(scheduler, "beta")
            await Asked(scheduler, "gamma").task
            assert is_gone(gone)
            return {info.name: info.state for info in scheduler.engines()}

        assert play(scenario, max_resident_engines=2) == {
            "alpha": EngineState.READY,
            "beta": EngineState.INSTALLED,
            "gamma": EngineState.READY,
        }

    def test_a_busy_engine_is_drained_and_never_killed(self, play):
        async def scenario(scheduler: Scheduler) -> StepResult:
            busy = Asked(scheduler, "alpha", text="Count.", max_output_tokens=40)
            await busy.begun.wait()
            other = Asked(scheduler, "beta")
            await until(scheduler, "alpha", lambda info: info.state is EngineState.DRAINING)
            assert not other.reached[RunState.RUNNING].is_set()
            late = Asked(scheduler, "alpha")  # wants what is on its way out
            result = await busy.task
            await other.task
            await late.task
            assert late.states[:2] == [RunState.QUEUED, RunState.LOADING]
            return result

        assert play(scenario).usage.completion_tokens > 2

    def test_an_idle_engine_goes_before_a_busy_one(self, play):
        async def scenario(scheduler: Scheduler) -> dict[str, EngineState]:
            busy = Asked(scheduler, "alpha", endless=True)
            await busy.begun.wait()
            with frozen(pid(scheduler, "alpha")):
                await Asked(scheduler, "beta").task  # used later, but idle
                await Asked(scheduler, "gamma").task
                states = {info.name: info.state for info in scheduler.engines()}
            await busy.give_up()
            return states

        states = play(scenario, max_resident_engines=2)
        assert states["alpha"] is EngineState.READY
        assert states["beta"] is EngineState.INSTALLED


class TestUnloading:
    def test_an_idle_engines_process_is_gone_afterwards(self, play):
        async def scenario(scheduler: Scheduler) -> EngineInfo:
            await scheduler.load("alpha")
            gone = pid(scheduler, "alpha")
            info = await scheduler.unload("alpha")
            assert is_gone(gone)
            assert await scheduler.unload("alpha") == info  # once more changes nothing
            return info

        info = play(scenario)
        assert (info.state, info.worker, info.error) == (EngineState.INSTALLED, None, None)

    def test_a_busy_engine_is_refused(self, play):
        async def scenario(scheduler: Scheduler) -> FailedPrecondition:
            busy = Asked(scheduler, "alpha", endless=True)
            await busy.begun.wait()
            with pytest.raises(FailedPrecondition) as caught:
                await scheduler.unload("alpha")
            assert not busy.task.done()
            await busy.give_up()
            return caught.value

        error = play(scenario)
        assert (error.reason, error.metadata["active_steps"]) == ("ENGINE_BUSY", "1")


class TestFailures:
    def test_a_lost_worker_fails_its_steps_and_the_next_loads_it_anew(self, play):
        async def scenario(scheduler: Scheduler) -> tuple[EngineInfo, int, int]:
            await scheduler.load("beta")
            busy = [Asked(scheduler, "alpha", endless=True) for _ in range(2)]
            other = Asked(scheduler, "beta", endless=True)
            for each in (*busy, other):
                await each.begun.wait()
            killed = pid(scheduler, "alpha")
            with frozen(pid(scheduler, "beta")):
                os.kill(killed, signal.SIGKILL)
                for each in busy:
                    with pytest.raises(WorkerError) as caught:
                        await each.task
                    assert (caught.value.reason, caught.value.retryable) == ("WORKER_LOST", True)
                failed = await until(
                    scheduler, "alpha", lambda info: info.state is EngineState.FAILED
                )
                await Asked(scheduler, "alpha").task
            assert not other.task.done()
            await other.give_up()
            return failed, killed, pid(scheduler, "alpha")

        failed, killed, anew = play(scenario, max_resident_engines=2)
        assert failed.error is not None
        assert failed.error.reason == "WORKER_LOST"
        assert killed != anew

    def test_one_lost_while_it_drains_does_not_hold_up_who_needs_the_room(self, play):
        async def scenario(scheduler: Scheduler) -> None:
            busy = Asked(scheduler, "alpha", endless=True)
            await busy.begun.wait()
            other = Asked(scheduler, "beta")
            await until(scheduler, "alpha", lambda info: info.state is EngineState.DRAINING)
            os.kill(pid(scheduler, "alpha"), signal.SIGKILL)
            with pytest.raises(WorkerError):
                await busy.task
            await other.task
            assert scheduler.engine("beta").state is EngineState.READY

        play(scenario)

    def test_a_missing_byte_is_a_typed_failure_before_any_process(self, play, store: Catalogue):
        async def scenario(scheduler: Scheduler) -> tuple[LoadFailed, EngineInfo]:
            with pytest.raises(LoadFailed) as caught:
                await Asked(scheduler, "alpha").task
            assert scheduler.loaded_count() == 0
            await Asked(scheduler, "beta").task
            return caught.value, scheduler.engine("alpha")

        truncate(store, "alpha")
        error, info = play(scenario)
        assert error.reason == "ENGINE_FILES_WRONG"
        assert "found 4" in error.message
        assert not error.retryable
        assert info.error == error.as_run_error()
        assert info.state is EngineState.FAILED

    def test_a_file_that_is_no_model_is_a_typed_failure_and_leaves_no_process(
        self, play, store: Catalogue
    ):
        async def scenario(scheduler: Scheduler) -> tuple[LoadFailed, EngineInfo]:
            with pytest.raises(LoadFailed) as caught:
                await scheduler.load("alpha")
            assert scheduler.loaded_count() == 0
            return caught.value, scheduler.engine("alpha")

        corrupt(store, "alpha")
        error, info = play(scenario)
        assert error.reason == "ENGINE_LOAD_FAILED"
        assert info.state is EngineState.FAILED
        assert info.error is not None
        assert info.error.reason == "ENGINE_LOAD_FAILED"

    def test_a_load_that_takes_too_long_is_given_up_with_its_process(self, play):
        async def scenario(scheduler: Scheduler) -> LoadFailed:
            with pytest.raises(LoadFailed) as caught:
                await scheduler.load("alpha")
            assert scheduler.loaded_count() == 0
            scheduler.settings = settings()
            await scheduler.load("alpha")
            assert scheduler.engine("alpha").error is None
            return caught.value

        error = play(scenario, load_timeout_s=0.05)
        assert (error.reason, error.retryable) == ("LOAD_TIMEOUT", False)


class TestOverload:
    def test_no_more_steps_wait_than_the_settings_say(self, play):
        async def scenario(scheduler: Scheduler) -> Overloaded:
            busy = Asked(scheduler, "alpha", endless=True)
            await busy.begun.wait()
            waiting = [Asked(scheduler, "alpha") for _ in range(2)]
            for each in waiting:
                await each.reached[RunState.QUEUED].wait()
            with pytest.raises(Overloaded) as caught:
                await Asked(scheduler, "alpha").task
            await waiting[0].give_up()  # makes room for another
            another = Asked(scheduler, "alpha")
            await another.reached[RunState.QUEUED].wait()
            await busy.give_up()
            await asyncio.gather(waiting[1].task, another.task)
            return caught.value

        error = play(scenario, slots=1, max_waiting_steps=2)
        assert error.metadata == {"waiting_steps": "2", "limit": "2"}
        assert error.retry_after_s


class TestWatching:
    def test_all_engines_first_then_each_change(self, play):
        async def scenario(scheduler: Scheduler) -> list[tuple[str, EngineState]]:
            watching = scheduler.watch()
            seen = [await anext(watching) for _ in range(3)]
            assert [info.name for info in seen] == ["alpha", "beta", "gamma"]
            loading = asyncio.create_task(scheduler.load("beta"))
            states = [("beta", EngineState.INSTALLED)]
            async for info in watching:
                if states[-1] != (info.name, info.state):
                    states.append((info.name, info.state))
                if info.state is EngineState.READY:
                    break
            await loading
            await watching.aclose()  # type: ignore[attr-defined]
            return states

        assert play(scenario) == [
            ("beta", EngineState.INSTALLED),
            ("beta", EngineState.LOADING),
            ("beta", EngineState.READY),
        ]


class TestStopping:
    def test_ends_busy_workers_and_loads_on_their_way(self, store: Catalogue):
        async def scenario() -> None:
            scheduler = Scheduler(store, settings(max_resident_engines=3), SetMachine())
            busy = Asked(scheduler, "alpha", endless=True)
            await busy.begun.wait()
            loading = Asked(scheduler, "beta")
            await until(scheduler, "beta", lambda info: bool(info.worker and info.worker.pid))
            pids = [pid(scheduler, "alpha"), pid(scheduler, "beta")]
            await scheduler.stop()
            with pytest.raises(WorkerError):
                await busy.task
            await asyncio.wait([loading.task])
            assert all(wait_gone(each) for each in pids)
            assert scheduler.loaded_count() == 0

        asyncio.run(scenario())
