"""Heartbeats in virtual time: who counts as silent, when, and what befalls a silent one's runs."""

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from edge_agent.core import Run, RunError, RunState, SessionUse, SideEffect, Tool, ToolResult
from edge_agent.errors import FailedPrecondition, Overloaded, Unavailable
from edge_agent.events import CancelTool
from edge_agent.heartbeat import Heartbeat, Lapse
from edge_agent.runs.heartbeats import HELD_UP_S, MAX_WATCHED, Heartbeats
from edge_agent.runs.runs import Runs
from tests.support.scripted_engine import ScriptedEngines, new_runs, settle, spec
from tests.support.virtual_time import run_in_virtual_time

GRIP = Tool("grip", "Grip.", '{"type":"object"}', side_effect=SideEffect.NON_IDEMPOTENT)
ASKED = Heartbeat(window_s=1.0, suspend_after_s=2.0, cancel_after_s=5.0)
CONFIRM_S = 60.0
delays_s = st.none() | st.floats(0.001, 10)


@st.composite
def heartbeats(draw: st.DrawFn) -> Heartbeat:
    suspend_s, cancel_s = draw(delays_s), draw(delays_s)
    if suspend_s is not None and cancel_s is not None:
        suspend_s, cancel_s = min(suspend_s, cancel_s), max(suspend_s, cancel_s) + 0.001
    return Heartbeat(draw(st.floats(0.1, 10)), suspend_s, cancel_s)


class TestSilence:
    @given(heartbeats(), st.floats(0, 40), st.floats(0, 40))
    def test_the_longer_it_is_the_further_it_has_come(self, heartbeat, one_s, other_s):
        shorter_s, longer_s = sorted((one_s, other_s))
        assert heartbeat.reached(shorter_s) <= heartbeat.reached(longer_s)

    @given(heartbeats(), st.floats(0, 40))
    def test_within_the_window_it_is_none(self, heartbeat, silent_s):
        assert (heartbeat.reached(silent_s) is Lapse.NONE) == (silent_s < heartbeat.window_s)

    @given(heartbeats(), st.floats(0, 40))
    def test_what_comes_after_a_lapse_is_all_that_it_has_not_reached(self, heartbeat, silent_s):
        coming = heartbeat.after(heartbeat.reached(silent_s))
        assert all(at_s > silent_s for _lapse, at_s in coming)
        assert [lapse for lapse, _at_s in coming] == sorted(lapse for lapse, _at_s in coming)

    @given(heartbeats())
    def test_what_was_not_asked_for_never_comes(self, heartbeat):
        coming = {lapse for lapse, _at_s in heartbeat.lapses()}
        assert (Lapse.SUSPENDED in coming) == (heartbeat.suspend_after_s is not None)
        assert (Lapse.CANCELLED in coming) == (heartbeat.cancel_after_s is not None)


class Watching:
    """An owner of heartbeats, and what it stopped when: client, state, seconds from the start."""

    def __init__(self) -> None:
        self._began_s = self._now_s()
        self.stopped: list[tuple[str, RunState, float]] = []
        self.owner = Heartbeats(self._stop)

    def begin(self, client: str = "robot", asked: Heartbeat = ASKED, *, session: str = "") -> int:
        return self.owner.beat(client, session, 0, asked, stop=False)

    def beat(self, nonce: int, *, session: str = "", stop: bool = False) -> int:
        return self.owner.beat("robot", session, nonce, None, stop=stop)

    def refused(self, nonce: int, *, stop: bool = False) -> FailedPrecondition:
        with pytest.raises(FailedPrecondition) as error:
            self.beat(nonce, stop=stop)
        return error.value

    def _stop(self, client: str, session: str, state: RunState, error: RunError) -> int:
        assert error.reason == "HEARTBEAT_LAPSED"
        client = f"{client}/{session}" if session else client
        self.stopped.append((client, state, round(self._now_s() - self._began_s, 3)))
        return 1

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()


def watch(scenario: Callable[[Watching], Coroutine[Any, Any, Any]]) -> Any:
    async def play() -> Any:
        return await scenario(Watching())

    return run_in_virtual_time(play())


SUSPENDED, CANCELLED = RunState.SUSPENDED, RunState.CANCELLED


class TestWatching:
    @given(st.lists(st.floats(0, 0.999), max_size=20))
    def test_who_beats_within_the_window_is_left_alone_and_lapses_a_window_later(self, gaps_s):
        async def scenario(watching):
            nonce = watching.begin()
            for gap_s in gaps_s:
                await asyncio.sleep(gap_s)
                nonce = watching.beat(nonce)
            assert watching.stopped == []
            await asyncio.sleep(100)
            return watching.stopped

        last_s = sum(gaps_s)
        assert watch(scenario) == [
            ("robot", SUSPENDED, pytest.approx(last_s + 3, abs=0.002)),
            ("robot", CANCELLED, pytest.approx(last_s + 6, abs=0.002)),
        ]

    def test_a_beat_of_another_nonce_keeps_nobody_alive_and_is_told_what_was_expected(self):
        async def scenario(watching):
            first = watching.begin()
            await asyncio.sleep(0.6)
            second = watching.beat(first)
            for _ in range(4):
                await asyncio.sleep(0.7)
                assert watching.refused(first).metadata["expected"] == str(second)
            assert watching.refused(second + 1).reason == "BEAT_OUT_OF_TURN"
            await asyncio.sleep(1)
            return watching.stopped

        assert watch(scenario) == [("robot", SUSPENDED, 3.6)]

    def test_nobody_is_watched_before_the_first_beat(self):
        async def scenario(watching):
            return watching.refused(7).metadata["expected"]

        assert watch(scenario) == "0"

    def test_after_a_lost_answer_nonce_0_begins_anew(self):
        async def scenario(watching):
            lost = watching.begin()
            await asyncio.sleep(0.9)
            nonce = watching.begin()
            watching.refused(lost)
            await asyncio.sleep(0.9)
            watching.beat(nonce)
            return watching.stopped

        assert watch(scenario) == []

    @pytest.mark.parametrize("lost", [False, True])
    def test_who_stops_is_not_watched_any_more(self, lost):
        async def scenario(watching):
            nonce = watching.begin()
            assert watching.beat(0 if lost else nonce, stop=True) == 0
            await asyncio.sleep(100)
            watching.refused(nonce)
            return watching.stopped

        assert watch(scenario) == []

    def test_a_stop_out_of_turn_stops_nothing(self):
        async def scenario(watching):
            nonce = watching.begin()
            watching.refused(nonce + 1, stop=True)
            await asyncio.sleep(3.5)
            return watching.stopped

        assert watch(scenario) == [("robot", SUSPENDED, 3.0)]

    @pytest.mark.parametrize("anew", [False, True])
    def test_a_beat_that_comes_back_ends_the_lapse_and_the_next_one_is_whole(self, anew):
        async def scenario(watching):
            nonce = watching.begin()
            await asyncio.sleep(4)
            watching.begin() if anew else watching.beat(nonce)
            await asyncio.sleep(100)
            return watching.stopped

        assert watch(scenario) == [
            ("robot", SUSPENDED, 3.0),
            ("robot", SUSPENDED, 7.0),
            ("robot", CANCELLED, 10.0),
        ]

    def test_a_beat_after_all_of_the_lapse_is_taken_and_watched_again(self):
        async def scenario(watching):
            nonce = watching.begin()
            await asyncio.sleep(50)
            watching.beat(nonce)
            await asyncio.sleep(50)
            return watching.stopped

        assert [at_s for _, _, at_s in watch(scenario)] == [3.0, 6.0, 53.0, 56.0]

    def test_clients_lapse_each_by_its_own(self):
        async def scenario(watching):
            watching.begin("arm", Heartbeat(0.5, cancel_after_s=1.0))
            watching.begin("legs", Heartbeat(2.0, suspend_after_s=0.1))
            await asyncio.sleep(100)
            return watching.stopped

        assert watch(scenario) == [("arm", CANCELLED, 1.5), ("legs", SUSPENDED, 2.1)]

    def test_a_session_is_watched_by_itself_beside_its_client_and_other_sessions(self):
        async def scenario(watching):
            watching.begin("robot", Heartbeat(5.0, cancel_after_s=1.0))
            watching.begin("robot", Heartbeat(0.5, cancel_after_s=1.0), session="tour")
            nonce = watching.begin("robot", Heartbeat(2.0, suspend_after_s=0.1), session="patrol")
            assert watching.beat(nonce, session="patrol", stop=True) == 0
            await asyncio.sleep(100)
            return watching.stopped

        assert watch(scenario) == [("robot/tour", CANCELLED, 1.5), ("robot", CANCELLED, 6.0)]

    def test_a_session_s_nonce_is_no_other_s(self):
        async def scenario(watching):
            nonce = watching.begin(session="tour")
            error = watching.refused(nonce)
            assert watching.beat(nonce, session="tour") != 0
            return error.reason, error.metadata["session_id"]

        assert watch(scenario) == ("BEAT_OUT_OF_TURN", "")

    def test_no_more_are_watched_than_there_is_room_for_and_what_has_lapsed_makes_room(self):
        async def scenario(watching):
            for number in range(MAX_WATCHED):
                watching.begin(f"client-{number}")
            with pytest.raises(Overloaded) as full:
                watching.begin()
            assert full.value.reason == "TOO_MANY_WATCHED_CLIENTS"
            watching.begin("client-0")
            await asyncio.sleep(100)
            watching.begin()
            return len(watching.stopped)

        assert watch(scenario) == 2 * MAX_WATCHED

    def test_beats_that_lay_unread_while_the_loop_was_held_up_come_first(self):
        async def scenario(watching):
            nonce = watching.begin()
            asyncio.get_running_loop().jump(10.0)  # type: ignore[attr-defined]
            await asyncio.sleep(HELD_UP_S / 2)
            watching.beat(nonce)
            await asyncio.sleep(0.9)
            return watching.stopped

        assert watch(scenario) == []

    def test_a_client_that_is_silent_all_the_same_has_lapsed(self):
        async def scenario(watching):
            watching.begin()
            asyncio.get_running_loop().jump(10.0)  # type: ignore[attr-defined]
            await asyncio.sleep(2 * HELD_UP_S)
            return watching.stopped

        at_s = 10.0 + HELD_UP_S
        assert watch(scenario) == [("robot", SUSPENDED, at_s), ("robot", CANCELLED, at_s)]

    def test_a_loop_that_is_held_up_again_and_again_hides_no_lapse(self):
        async def scenario(watching):
            watching.begin()
            for _ in range(2):
                asyncio.get_running_loop().jump(4.0)  # type: ignore[attr-defined]
                await asyncio.sleep(0.01)
            return watching.stopped

        assert watch(scenario) == [("robot", SUSPENDED, 8.01), ("robot", CANCELLED, 8.01)]

    @pytest.mark.parametrize("anew", [False, True])
    def test_the_log_tells_of_a_lapse_and_of_its_end(self, anew):
        async def scenario(watching):
            nonce = watching.begin()
            await asyncio.sleep(3.5)
            watching.begin() if anew else watching.beat(nonce)

        with capture_logs() as lines:
            watch(scenario)
        assert [(line["event"], line.get("lapse")) for line in lines] == [
            ("client_watched", None),
            ("client_lapsed", "NOTICED"),
            ("client_lapsed", "SUSPENDED"),
            ("client_back", "SUSPENDED"),
        ]

    def test_a_daemon_that_stops_watches_nobody(self):
        async def scenario(watching):
            nonce = watching.begin()
            watching.owner.close()
            await asyncio.sleep(100)
            with pytest.raises(Unavailable):
                watching.beat(nonce)
            return watching.stopped

        assert watch(scenario) == []


@dataclasses.dataclass
class World:
    """An owner of runs whose engine is played; `robot` is watched from the start."""

    runs: Runs
    engines: ScriptedEngines

    def start(self, *tools: Tool, client: str = "robot", **more: Any) -> str:
        wanted = spec(tools=tools, **{"timeout_s": 1000.0, "durable": True, **more})
        return self.runs.create(wanted, client=client, request_id="").id

    async def begun(self, *tools: Tool, **more: Any) -> str:
        run_id = self.start(*tools, **more)
        step = await self.engines.next()
        if tools:
            step.call((tools[0].name, "{}"))
        await settle()
        return run_id

    def how(self, run_id: str) -> tuple[RunState, str | None]:
        run: Run = self.runs.get(run_id)
        return run.state, run.error.reason if run.error else None


LAPSED = "HEARTBEAT_LAPSED"


@pytest.fixture
def play(tmp_path: Path):
    def run(scenario: Callable[[World], Coroutine[Any, Any, Any]]) -> Any:
        async def begin() -> Any:
            runs, engines = new_runs(tmp_path, cancel_confirm_s=CONFIRM_S)
            runs.beat("robot", "", 0, ASKED, stop=False)
            return await scenario(World(runs, engines))

        return run_in_virtual_time(begin())

    return run


class TestRuns:
    def test_durable_runs_are_suspended_others_cancelled_and_other_clients_left_alone(self, play):
        async def scenario(world):
            mine = await world.begun(), await world.begun(durable=False)
            other = await world.begun(client="app")
            await asyncio.sleep(2.9)
            states = [world.how(run_id)[0] for run_id in mine]
            await asyncio.sleep(0.2)
            return states, [world.how(run_id) for run_id in (*mine, other)]

        before, after = play(scenario)
        assert before == [RunState.RUNNING, RunState.RUNNING]
        assert after == [(SUSPENDED, LAPSED), (CANCELLED, LAPSED), (RunState.RUNNING, None)]

    def test_the_lapse_of_a_session_stops_its_runs_alone(self, play):
        async def scenario(world):
            world.runs.beat("robot", "", 0, None, stop=True)
            mine = await world.begun(session=SessionUse("tour"))
            others = await world.begun(session=SessionUse("patrol")), await world.begun()
            world.runs.beat("robot", "tour", 0, Heartbeat(1.0, 1.0), stop=False)
            await asyncio.sleep(100)
            error = world.runs.get(mine).error
            return error.metadata["session_id"], [world.how(each) for each in (mine, *others)]

        session, after = play(scenario)
        assert session == "tour"
        assert after == [(SUSPENDED, LAPSED), (RunState.RUNNING, None), (RunState.RUNNING, None)]

    def test_open_calls_are_told_to_stop_before_the_run_is_suspended(self, play):
        async def scenario(world):
            run_id = await world.begun(GRIP)
            await asyncio.sleep(3.1)
            state = world.how(run_id)[0]
            world.runs.submit(run_id, [ToolResult("call-1", (), cancelled=True)])
            await settle()
            bodies = []
            async with asyncio.timeout(1):
                async for event in world.runs.watch(run_id, 0):
                    bodies.append(event.body)
                    if len(bodies) > 1 and getattr(event.body, "state", None) is SUSPENDED:
                        break
            return state, world.how(run_id), bodies

        state, how, bodies = play(scenario)
        assert (state, how) == (RunState.CANCELLING, (SUSPENDED, LAPSED))
        (told,) = [body for body in bodies if isinstance(body, CancelTool)]
        assert told.reason.reason == LAPSED

    def test_what_was_suspended_stays_so_when_beats_come_back_until_it_is_resumed(self, play):
        async def scenario(world):
            run_id = await world.begun()
            await asyncio.sleep(3.5)
            world.runs.beat("robot", "", 0, Heartbeat(1000.0, 1.0), stop=False)
            await asyncio.sleep(100)
            assert world.how(run_id) == (SUSPENDED, LAPSED)
            world.runs.resume(run_id, (), "robot")
            (await world.engines.next()).answer("Done")
            await settle()
            return world.how(run_id)

        assert play(scenario) == (RunState.SUCCEEDED, None)

    def test_a_second_lapse_leaves_alone_what_the_first_has_suspended(self, play):
        async def scenario(world):
            run_id = await world.begun()
            await asyncio.sleep(3.5)
            world.runs.beat("robot", "", 0, ASKED, stop=False)
            await asyncio.sleep(3.5)
            world.runs.resume(run_id, (), "robot")
            (await world.engines.next()).answer("Done")
            await settle()
            return world.how(run_id)

        assert play(scenario) == (RunState.SUCCEEDED, None)

    def test_a_silence_that_goes_on_cancels_what_it_has_suspended(self, play):
        async def scenario(world):
            run_id = await world.begun()
            await asyncio.sleep(6.1)
            return world.how(run_id)

        assert play(scenario) == (CANCELLED, LAPSED)

    def test_a_run_whose_open_call_never_confirms_ends_once_it_was_to_be_cancelled(self, play):
        async def scenario(world):
            run_id = await world.begun(GRIP)
            await asyncio.sleep(6.1)
            assert world.how(run_id)[0] is RunState.CANCELLING
            world.runs.submit(run_id, [ToolResult("call-1", (), cancelled=True)])
            await settle()
            return world.how(run_id)

        assert play(scenario) == (CANCELLED, LAPSED)

    @pytest.mark.parametrize(("silent_s", "state"), [(3.5, SUSPENDED), (6.5, CANCELLED)])
    def test_a_run_that_was_being_written_to_disk_does_not_begin(self, play, silent_s, state):
        async def scenario(world):
            wanted = dataclasses.replace(spec(), durable=True)
            live, _new = world.runs.accept(wanted, client="robot", request_id="")
            await asyncio.sleep(silent_s)
            world.runs.begin(live.id)
            await settle()
            return world.how(live.id), world.engines.steps

        assert play(scenario) == ((state, LAPSED), [])

    def test_a_run_that_begins_after_a_lapse_is_not_its_concern(self, play):
        async def scenario(world):
            world.runs.beat("robot", "", 0, Heartbeat(1.0, 1.0), stop=False)
            await asyncio.sleep(3)
            run_id = await world.begun()
            await asyncio.sleep(3)
            return world.how(run_id)[0]

        assert play(scenario) is RunState.RUNNING

    def test_a_daemon_that_drains_leaves_suspended_runs_to_the_next_one(self, play):
        async def scenario(world):
            run_id = await world.begun()
            await world.runs.drain(0)
            await asyncio.sleep(100)
            return world.how(run_id)

        assert play(scenario) == (SUSPENDED, "DAEMON_STOPPING")
