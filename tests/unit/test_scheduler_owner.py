"""What the scheduler's owner does with single events, in virtual time with scripted workers."""

import asyncio
import json
import random
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from edge_agent import durable
from edge_agent.core import (
    EngineState,
    Message,
    Role,
    StepOrigin,
    StepRequest,
    StepResult,
    TextPart,
)
from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.manifest import MANIFEST_NAME
from edge_agent.errors import EdgeAgentError, LoadFailed, NotFound, WorkerError
from edge_agent.scheduling.footprints import Footprints
from edge_agent.scheduling.loading import LoadingSettings
from edge_agent.scheduling.quarantine import MARKER, Quarantine
from edge_agent.scheduling.scheduler import Scheduler, SchedulerSettings
from edge_agent.scheduling.values import Rules
from tests.support.engine_files import recipe_data
from tests.support.engines import OPTIONS, WORKER
from tests.support.scripted_host import GIB, MIB, World
from tests.support.virtual_time import run_in_virtual_time

STEADY = 2 * GIB
PEAK = 3 * GIB


@pytest.fixture
def store(tmp_path: Path) -> Catalogue:
    root = tmp_path / "store"
    for name in ("alpha", "beta"):
        data = recipe_data({"model.bin": b"weights"}, name)
        del data["obtain"]
        data["source"] = {"kind": "path", "location": "files"}
        data["memory"] = {"load_peak_bytes": PEAK, "steady_bytes": STEADY}
        (root / name).mkdir(parents=True)
        (root / name / "model.bin").write_bytes(b"weights")
        (root / name / MANIFEST_NAME).write_text(json.dumps(data))
    return Catalogue(root)


def settings(**rules: Any) -> SchedulerSettings:
    given: dict[str, Any] = {
        "reserve_bytes": 0,
        "soft_floor_bytes": GIB,
        "hard_floor_bytes": GIB // 2,
        "min_residency_s": 0.0,
        "residency_per_load": 0.0,
    }
    loading = LoadingSettings(
        load_timeout_s=10.0,
        unload_timeout_s=2.0,
        memory_back_s=2.0,
        worker=lambda _manifest: WORKER,
        options=lambda _manifest: msgspec.structs.replace(OPTIONS, slots=2),
    )
    return SchedulerSettings(Rules(**(given | rules)), loading)


class Play:
    """A scheduler in a quiet world, whose state lies in a directory."""

    def __init__(self, store: Catalogue, state_dir: Path) -> None:
        self.store, self.state_dir = store, state_dir
        self.world = World(random.Random(1))  # noqa: S311 - reproducible, no secret
        self.footprints = Footprints(state_dir / "footprints.json", "test")
        self.scheduler = Scheduler(
            store,
            settings(),
            self.world.machine,
            footprints=self.footprints,
            quarantine=Quarantine(state_dir, "this boot"),
            new_host=self.world.new_host,  # type: ignore[arg-type]
        )

    async def ask(self, engine: str = "alpha", text: str = "Go", **more: Any) -> StepResult:
        request = StepRequest((Message(Role.USER, (TextPart(text),)),), **more)
        return await self.scheduler.decide(
            engine,
            request,
            StepOrigin("test"),
            on_text=lambda _text, _tokens: None,
            on_state=lambda _state, _progress: None,
        )

    async def refusal(self, engine: str = "alpha") -> EdgeAgentError:
        """The error that a step ends with."""
        with pytest.raises(EdgeAgentError) as caught:
            await self.ask(engine)
        return caught.value

    def observe(self) -> None:
        """Telemetry looks."""
        available = self.world.available_bytes
        self.scheduler.observe(self.world.machine.set(available_bytes=available))

    async def pass_time(self, seconds: float) -> None:
        """With telemetry looking as it does."""
        for _ in range(round(seconds / 0.25)):
            await asyncio.sleep(0.25)
            self.observe()

    def loads(self) -> int:
        """Processes that were begun."""
        return sum(host.pid != 0 for host in self.world.hosts)

    def steady_bytes(self, name: str = "alpha") -> int:
        """What is reserved for an engine in memory."""
        return self.scheduler.planner.state.residents[name].committed_bytes


Scenario = Callable[[Play], Coroutine[Any, Any, None]]


@pytest.fixture
def play(store: Catalogue, tmp_path: Path) -> Callable[[Scenario], Play]:
    def run(scenario: Scenario) -> Play:
        async def bounded() -> Play:
            (tmp_path / "state").mkdir(exist_ok=True)
            game = Play(store, tmp_path / "state")
            try:
                async with asyncio.timeout(3600):
                    await scenario(game)
            finally:
                await game.scheduler.stop()
            return game

        result = run_in_virtual_time(bounded())
        assert isinstance(result, Play)
        return result

    return run


class TestFailingLoads:
    def test_the_third_step_in_a_row_is_refused_without_a_load_until_the_pause_is_over(self, play):
        async def scenario(game: Play) -> None:
            game.world.chances.load_hangs = 1.0
            first, second = await game.refusal(), await game.refusal()
            assert first.reason == second.reason == "LOAD_TIMEOUT"
            assert game.loads() == 2
            third = await game.refusal()
            assert (third.reason, third.code) == ("LOAD_TIMEOUT", "FAILED_PRECONDITION")
            assert third.retry_after_s == pytest.approx(4.0)
            assert game.loads() == 2
            assert game.scheduler.engine("alpha").state is EngineState.FAILED
            game.world.chances.load_hangs = 0.0
            await game.ask("beta")  # another engine is not meant
            game.world.chances.load_hangs = 1.0
            await asyncio.sleep(4.0)
            await game.refusal()
            assert game.loads() == 4
            assert (await game.refusal()).retry_after_s == pytest.approx(8.0)

        play(scenario)

    @pytest.mark.parametrize("how", ["load", "release", "reload", "files"])
    def test_an_operator_or_other_files_begin_afresh(self, play, how: str):
        async def scenario(game: Play) -> None:
            game.world.chances.load_hangs = 1.0
            for _ in range(2):
                await game.refusal()
            game.world.chances.load_hangs = 0.0
            assert (await game.refusal()).metadata["failures"] == "2"
            if how == "load":
                await game.scheduler.load("alpha")
            elif how == "release":
                await game.scheduler.release("alpha")
            elif how == "reload":
                game.scheduler.settings = settings()
            else:
                model = game.store.root / "alpha" / "model.bin"
                model.unlink()
                model.write_bytes(b"WEIGHTS")
            await game.ask()

        play(scenario)

    def test_a_success_begins_afresh(self, play):
        async def scenario(game: Play) -> None:
            game.world.chances.load_hangs = 1.0
            await game.refusal()
            game.world.chances.load_hangs = 0.0
            await game.ask()
            await game.scheduler.unload("alpha")
            game.world.chances.load_hangs = 1.0
            await game.refusal()
            assert (await game.refusal()).message.endswith("within 10 s")

        play(scenario)

    def test_an_engine_that_is_removed_while_its_step_waits_is_an_error_and_no_wedge(self, play):
        async def scenario(game: Play) -> None:
            beta = asyncio.create_task(game.ask("beta"))
            await asyncio.sleep(0)
            alpha = asyncio.create_task(game.ask("alpha"))  # waits for beta's load
            await asyncio.sleep(0)
            (game.store.root / "alpha").rename(game.store.root / ".alpha")
            await beta
            with pytest.raises(NotFound):
                await alpha
            (game.store.root / ".alpha").rename(game.store.root / "alpha")
            await game.ask("alpha")

        play(scenario)

    def test_what_nobody_thought_of_in_a_load_is_a_failed_load(self, play, monkeypatch):
        async def scenario(game: Play) -> None:
            def broken(_name: str) -> tuple[()]:
                raise ValueError("nobody thought of that")

            with monkeypatch.context() as patch:
                patch.setattr(game.store, "quick_check", broken)
                error = await game.refusal()
            assert isinstance(error, LoadFailed)
            assert "nobody thought of that" in error.message
            await game.ask()

        play(scenario)


class TestFootprints:
    def test_a_larger_step_raises_what_is_reserved_at_once_and_counts_as_the_same_load(self, play):
        async def scenario(game: Play) -> None:
            game.world.machine.tells_of_processes = True
            await game.ask(text="small", max_output_tokens=1)
            assert game.steady_bytes() == STEADY + MIB
            game.world.alive("alpha").memory_bytes += GIB  # type: ignore[union-attr]
            await game.ask(text="small", max_output_tokens=1)
            await asyncio.sleep(0.01)
            assert game.steady_bytes() == STEADY + MIB  # no larger step than before
            await game.ask(text="one that is larger", max_output_tokens=20)
            await asyncio.sleep(0.01)
            assert game.steady_bytes() == STEADY + GIB + MIB
            await game.scheduler.unload("alpha")
            info = game.scheduler.engine("alpha")
            assert info.steady_bytes == STEADY + GIB + MIB
            assert len([m for m in info.measurements if m.source == "process"]) == 1

        game = play(scenario)
        kept = Footprints(game.state_dir / "footprints.json", "test")
        manifest = game.store.get("alpha")
        assert kept.of(manifest, 2, OPTIONS.context_tokens).steady_bytes == STEADY + GIB + MIB

    def test_the_last_moments_of_a_load_count_once_telemetry_has_seen_them(self, play):
        async def scenario(game: Play) -> None:
            await game.scheduler.load("alpha")
            resident = game.scheduler.planner.state.residents["alpha"]
            assert resident.held_bytes == 0  # telemetry has not looked since before the load
            game.observe()
            await asyncio.sleep(0.1)
            assert resident.held_bytes == STEADY

        play(scenario)

    def test_a_release_forgets_what_was_measured(self, play):
        async def scenario(game: Play) -> None:
            game.world.machine.tells_of_processes = True
            await game.ask()
            assert game.scheduler.engine("alpha").measurements
            info = await game.scheduler.release("alpha")
            assert info.measurements == ()

        play(scenario)


class TestLeaks:
    def test_memory_that_does_not_come_back_is_an_alarm_until_it_is_released(self, play):
        async def scenario(game: Play) -> None:
            await game.scheduler.load("alpha")
            await game.pass_time(1.0)
            game.world.chances.leaks = 1.0
            unloading = asyncio.create_task(game.scheduler.unload("alpha"))
            await game.pass_time(4.0)
            info = await unloading
            assert (info.state, info.leaked_bytes) == (EngineState.LEAKED, STEADY)
            (problem,) = game.scheduler.problems()
            assert f"alpha: {STEADY} bytes did not come back" in problem
            assert game.scheduler.memory().leaked_bytes == STEADY
            await game.scheduler.release("alpha")
            assert game.scheduler.problems() == ()

        play(scenario)

    def test_a_leak_that_comes_back_later_is_forgotten(self, play):
        async def scenario(game: Play) -> None:
            await game.scheduler.load("alpha")
            await game.pass_time(1.0)
            game.world.chances.leaks = 1.0
            unloading = asyncio.create_task(game.scheduler.unload("alpha"))
            await game.pass_time(4.0)
            await unloading
            game.world.leaked_bytes = 0
            game.observe()
            assert game.scheduler.problems() == ()

        play(scenario)

    def test_a_worker_that_died_and_gave_all_back_before_anybody_looked_has_not_leaked(self, play):
        async def scenario(game: Play) -> None:
            await game.scheduler.load("alpha")
            await game.pass_time(1.0)
            host = game.world.alive("alpha")
            assert host is not None
            host.memory_bytes = 0
            game.observe()  # its memory is back before its socket hangs up
            host.die()
            await game.pass_time(4.0)
            assert game.scheduler.engine("alpha").leaked_bytes == 0
            assert game.scheduler.problems() == ()

        play(scenario)


class TestQuarantine:
    def test_an_engine_in_quarantine_is_refused_and_shows_until_it_is_released(
        self, play, store: Catalogue, tmp_path: Path
    ):
        state_dir = tmp_path / "state"
        state_dir.mkdir()
        for boot in ("one", "two"):
            Quarantine(state_dir, boot).begin(store.get("alpha"))

        async def scenario(game: Play) -> None:
            assert (await game.refusal()).reason == "ENGINE_QUARANTINED"
            assert game.loads() == 0
            (problem,) = game.scheduler.problems()
            assert "alpha is in quarantine" in problem
            await game.ask("beta")
            await game.scheduler.release("alpha")
            assert game.scheduler.problems() == ()
            await game.ask()

        play(scenario)

    def test_the_marker_is_there_during_a_load_only(self, play):
        async def scenario(game: Play) -> None:
            marker = game.state_dir / MARKER
            loading = asyncio.create_task(game.scheduler.load("alpha"))
            await asyncio.sleep(0.1)
            assert b"alpha" in marker.read_bytes()
            await loading
            assert not marker.exists()

        play(scenario)

    @pytest.mark.parametrize("after_s", [0.0, 0.01, 0.1, 0.5])
    def test_a_stop_in_the_middle_of_a_load_leaves_no_marker(self, play, after_s: float):
        async def scenario(game: Play) -> None:
            loading = asyncio.create_task(game.scheduler.load("alpha"))
            await asyncio.sleep(after_s)
            await game.scheduler.stop()
            with pytest.raises(EdgeAgentError):
                await loading
            assert not (game.state_dir / MARKER).exists()

        play(scenario)

    def test_a_stop_waits_for_a_slow_disk_that_still_writes_the_marker(
        self, store: Catalogue, tmp_path: Path, monkeypatch
    ):
        begun, go_on = threading.Event(), threading.Event()
        replace = durable.replace

        def slow(path: Path, content: bytes) -> None:
            begun.set()
            go_on.wait()
            replace(path, content)

        async def scenario() -> None:
            game = Play(store, tmp_path)
            loading = asyncio.create_task(game.scheduler.load("alpha"))
            await asyncio.to_thread(begun.wait)
            stopping = asyncio.create_task(game.scheduler.stop())
            await asyncio.sleep(0)  # it is cancelled now
            go_on.set()
            await stopping
            assert not (tmp_path / MARKER).exists()
            await asyncio.wait([loading])
            assert loading.exception() is not None

        monkeypatch.setattr(durable, "replace", slow)
        asyncio.run(scenario())

    def test_without_a_marker_on_disk_nothing_is_loaded(self, play):
        async def scenario(game: Play) -> None:
            (game.state_dir / f"{MARKER}.partial").mkdir()
            error = await game.refusal()
            assert error.reason == "STATE_NOT_WRITABLE"
            assert game.loads() == 0
            (game.state_dir / f"{MARKER}.partial").rmdir()
            await game.ask()

        play(scenario)


class TestPressure:
    def test_a_load_that_is_killed_for_memory_is_tried_again_and_nothing_is_stuck(self, play):
        async def scenario(game: Play) -> None:
            asked = asyncio.create_task(game.ask())
            await asyncio.sleep(0.1)
            game.world.hog_bytes = 14 * GIB
            with capture_logs() as logs:
                game.observe()
                await game.pass_time(1.0)
            assert [e["event"] for e in logs if e["event"] == "engine_killed"] == ["engine_killed"]
            assert game.scheduler.loaded_count() == 0
            game.world.hog_bytes = 0
            await game.pass_time(10.0)
            await asked

        play(scenario)

    def test_a_load_that_is_killed_before_it_has_begun_is_tried_again_too(self, play):
        async def scenario(game: Play) -> None:
            asked = asyncio.create_task(game.ask())
            await asyncio.sleep(0)
            assert game.scheduler.engine("alpha").state is EngineState.LOADING
            assert game.loads() == 0
            game.world.hog_bytes = 14 * GIB
            game.observe()
            await game.pass_time(1.0)
            assert game.scheduler.loaded_count() == 0
            game.world.hog_bytes = 0
            await game.pass_time(10.0)
            await asked

        play(scenario)


class TestStop:
    def test_whoever_waits_for_an_unload_gets_an_answer(self, play):
        async def scenario(game: Play) -> None:
            await game.scheduler.load("alpha")
            game.world.chances.never_ends = 1.0
            unloading = asyncio.create_task(game.scheduler.unload("alpha"))
            await asyncio.sleep(0.5)
            await game.scheduler.stop()
            async with asyncio.timeout(5.0):
                await unloading

        play(scenario)

    def test_whoever_waits_for_a_step_gets_a_typed_error(self, play):
        async def scenario(game: Play) -> None:
            asked = [asyncio.create_task(game.ask(name)) for name in ("alpha", "beta", "alpha")]
            await asyncio.sleep(0.1)
            await game.scheduler.stop()
            for each in asked:
                with pytest.raises(WorkerError):
                    await each

        play(scenario)
