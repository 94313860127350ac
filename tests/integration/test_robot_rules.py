"""Robots that share their limbs: holds, background tools, expiry and outcomes, over real sockets.

The model's output is scripted below the worker protocol; the tools are those of the examples.
"""

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from edge_agent.core import Message, Role, RunState, TextPart
from edge_agent.errors import FailedPrecondition
from edge_agent.events import StepFinished, ToolCallsIssued, ToolResultAccepted
from edge_agent.heartbeat import Heartbeat
from edge_agent.records import Effect
from examples.robots.jobs import Jobs
from examples.robots.show import make_robot
from tests.support.daemon import running_daemon
from tests.support.driving import Caller, robot_tools
from tests.support.scripted_worker import install, script

WALK = ("walk_to", {"waypoint": "gate"})
TURN = ("turn_by", {"degrees": 90})
PATROL = script([("stand_up", {})], [("start_patrol", {"route": "plant"})], "Patrolling.")
PICK = ("pick", {"thing": "cup"})
PLACE = ("place", {"x": 400, "y": 0})
WAIT_S = 20.0
UNSURE = {"timeout_s": 0.2, "verify": ""}
"""Of a tool whose caller has no time to answer, and of which nobody can tell whether it acted."""


@pytest.fixture
def daemon(tmp_path):
    store = tmp_path / "engines"
    with running_daemon(store, install(store, "cancel_confirm: 300ms")) as running:
        running.wait_for("engine_loaded")
        yield running


@pytest.fixture
def alice(daemon):
    with Caller(daemon, "alice") as client:
        yield client


@pytest.fixture
def bob(daemon):
    with Caller(daemon, "bob") as client:
        yield client


@pytest.fixture
def carol(daemon):
    with Caller(daemon, "carol") as client:
        yield client


def holds(client):
    """What is held, by which tool, and how."""
    return {each.resource: (each.tool, each.holding) for each in client.status().holds}


def watching(jobs, begun):
    """Take note of a run's events, and set `begun` once something goes on."""

    def see(event):
        jobs.see(event)
        if isinstance(event.body, ToolResultAccepted) and event.body.goes_on:
            begun.set()

    return see


def said(text):
    return (Message(Role.USER, (TextPart(text),)),)


class TestTwoAgentsThatWantToDrive:
    def test_a_walk_is_waited_for_and_the_second_call_has_the_higher_fence(self, alice, bob):
        first = alice.begin([WALK])
        walk = alice.issued(first, "walk_to")
        second = bob.begin([TURN])
        bob.until(second, StepFinished, lambda _step: True)
        waiting = bob.get(second)
        alice.done(first, walk.id)
        turn = bob.issued(second, "turn_by")
        assert waiting.open_tool_calls == ()
        assert turn.fence.epoch == walk.fence.epoch
        assert turn.fence > walk.fence

    def test_a_patrol_refuses_a_walk_by_name_until_it_is_done(self, alice, bob):
        first, patrol = alice.background()
        second = bob.begin([WALK], "I wait.")
        refused = bob.refused(second).error
        alice.update_tool(first, patrol, done=True)
        third = bob.begin([WALK])
        fence = bob.issued(third, "walk_to").fence
        assert refused.reason == "RESOURCE_HELD"
        held = {key: refused.metadata[key] for key in ("resource", "holder_client", "holder_tool")}
        assert held == {
            "resource": "movement",
            "holder_client": "alice",
            "holder_tool": "start_patrol",
        }
        assert (refused.metadata["holder_run_id"], refused.metadata["holding"]) == (
            first,
            "BACKGROUND",
        )
        assert fence > alice.issued(first, "start_patrol").fence
        assert alice.ended(first).answer == "It goes on."

    def test_to_stop_is_possible_while_the_other_one_drives(self, alice, bob):
        alice.background()
        run_id = bob.begin([("stop_moving", {})])
        assert bob.issued(run_id, "stop_moving").fence is None

    def test_the_quadrupeds_patrol_goes_on_until_another_run_stops_it(self, alice):
        robot = make_robot("quadruped")
        jobs = Jobs(alice, robot)
        begun = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            going = pool.submit(alice.run, PATROL, robot.tools, watching(jobs, begun))
            assert begun.wait(WAIT_S)
            stopped = alice.run(script([("stop_patrol", {})], "Stopped."), robot.tools, jobs.see)
            run = going.result()
        assert "patrol plant" in stopped.transcript[1].text
        assert (run.state, run.answer) == (RunState.SUCCEEDED, "Patrolling.")
        assert holds(alice) == {}

    def test_a_patrol_whose_run_is_cancelled_is_stopped_and_confirmed(self, alice):
        robot = make_robot("quadruped")
        jobs = Jobs(alice, robot)
        begun = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            going = pool.submit(alice.run, PATROL, robot.tools, watching(jobs, begun))
            assert begun.wait(WAIT_S)
            jobs.cancel_all()
            run = going.result()
        assert run.state is RunState.CANCELLED
        assert holds(alice) == {}
        assert robot.tools["walk_to"][1](waypoint="gate")  # its legs are free


class TestTheArm:
    @pytest.fixture
    def arm(self, daemon):
        with Caller(daemon, "arm", "arm") as client:
            yield client

    def test_what_acts_once_is_issued_one_by_one_and_only_once(self, arm):
        run_id = arm.begin([PICK, PLACE])
        pick = arm.issued(run_id, "pick")
        alone = [call.id for call in arm.get(run_id).open_tool_calls]
        arm.done(run_id, pick.id)
        place = arm.issued(run_id, "place")
        arm.done(run_id, place.id)
        arm.ended(run_id)
        bodies = [event.body for event in arm.watch(run_id, 0)]
        issued = [c.id for b in bodies if isinstance(b, ToolCallsIssued) for c in b.tool_calls]
        assert alone == [pick.id]
        assert issued == [pick.id, place.id]
        assert place.fence > pick.fence
        with pytest.raises(FailedPrecondition) as again:
            arm.done(run_id, pick.id)
        assert again.value.reason == "RUN_ENDED"

    def test_a_call_that_could_not_begin_in_time_is_never_issued(self, arm, hand):
        first = arm.begin([PICK])
        arm.issued(first, "pick")
        brief = robot_tools("arm", place={"valid_for_s": 0.2})
        second = hand.begin([PLACE], "It was too late.", tools=brief)
        expired = hand.refused(second)
        run = hand.ended(second)
        assert expired.error.reason == "CALL_EXPIRED"
        assert run.answer == "It was too late."
        assert [call.effect for call in arm.trace(second)[1]] == [Effect.FAILED]

    @pytest.fixture
    def hand(self, daemon):
        with Caller(daemon, "hand", "arm") as client:
            yield client

    def test_each_call_says_how_long_it_holds(self, arm):
        run_id = arm.begin([PICK])
        call = arm.issued(run_id, "pick")
        assert call.valid_for_s == 5.0
        assert call.observed_ago_s >= 0

    @pytest.mark.parametrize("holding", ["cup", None])
    def test_a_pick_without_a_result_is_looked_at_and_the_run_goes_on(self, arm, holding):
        world = make_robot("arm").tools
        if holding:
            world["pick"][1](thing=holding)
        slow = robot_tools("arm", pick={"timeout_s": 0.2})
        run_id = arm.begin([PICK], "I know now.", tools=slow)
        look = arm.issued(run_id, "find_thing")
        found = world["find_thing"][1](**json.loads(look.arguments_json))
        arm.done(run_id, look.id, json.dumps(found))
        run = arm.ended(run_id)
        (record,) = (each for each in arm.trace(run_id)[1] if each.call_id == "call-1")
        assert (look.id, run.answer) == ("call-1-verify", "I know now.")
        assert ("it has acted" if holding else "it has not acted") in run.transcript[1].text
        assert record.effect is (Effect.DONE if holding else Effect.FAILED)
        assert json.loads(record.resolution.evidence) == json.loads(json.dumps(found))
        assert holds(arm) == {}

    def test_what_nobody_knows_keeps_the_arm_until_somebody_says_what_came_of_it(self, arm):
        first = arm.begin([PICK], tools=robot_tools("arm", pick=UNSURE))
        unknown = arm.ended(first)
        held = holds(arm)
        refused = arm.refused(arm.begin([PLACE])).error
        resolved = arm.resolve(first, "call-1", acted=True, evidence="the cup is in the gripper")
        (record,) = arm.trace(first)[1]
        third = arm.begin([PLACE])
        assert unknown.state is RunState.OUTCOME_UNKNOWN
        assert held == {"arm": ("pick", "UNKNOWN")}
        assert (refused.reason, refused.metadata["holding"]) == ("RESOURCE_HELD", "UNKNOWN")
        assert resolved == record
        assert (record.effect, record.resolution.evidence) == (
            Effect.DONE,
            "the cup is in the gripper",
        )
        assert record.resolution.client == "arm"
        assert arm.issued(third, "place").fence is not None


class TestACallerThatHangs:
    """Its socket stays open, and it beats no more."""

    LAPSE = Heartbeat(0.2, suspend_after_s=0.05)

    def test_its_patrol_is_told_to_stop_and_the_driver_frees_the_legs(self, alice, bob):
        run_id, call_id = alice.background(durable=True)
        alice.beat(0, self.LAPSE)
        reason = alice.told_to_stop(run_id, call_id).reason
        alice.update_tool(run_id, call_id, done=True)
        run = alice.reached(run_id, RunState.SUSPENDED)
        assert reason.reason == "HEARTBEAT_LAPSED"
        assert run.background_tool_calls == ()
        assert holds(bob) == {}

    def test_its_driver_hangs_too_and_what_it_held_stays_held(self, alice, bob):
        run_id, _call = alice.background(durable=True)
        alice.beat(0, self.LAPSE)
        run = alice.ended(run_id)
        assert (run.state, run.error.metadata["cause"]) == (
            RunState.OUTCOME_UNKNOWN,
            "HEARTBEAT_LAPSED",
        )
        assert holds(bob) == {"movement": ("start_patrol", "UNKNOWN")}
        assert bob.refused(bob.begin([WALK])).error.metadata["holder_client"] == "alice"

    def test_its_wait_for_the_legs_ends_and_lets_the_next_one_pass(self, alice, bob, carol):
        first = carol.begin([WALK])
        walk = carol.issued(first, "walk_to")
        second = alice.begin([TURN])
        alice.until(second, StepFinished, lambda _step: True)
        third = bob.begin([TURN])
        bob.until(third, StepFinished, lambda _step: True)
        alice.beat(0, self.LAPSE)
        lapsed = alice.ended(second)
        carol.done(first, walk.id)
        turn = bob.issued(third, "turn_by")
        assert (lapsed.state, lapsed.error.reason) == (RunState.CANCELLED, "HEARTBEAT_LAPSED")
        assert turn.fence.sequence == walk.fence.sequence + 1


class TestAfterAKill:
    """SIGKILL of the daemon, and another one on the same directories."""

    def restart(self, daemon):
        daemon.stop(signal.SIGKILL)
        daemon.restart()
        daemon.wait_for("engine_loaded")

    def test_a_patrol_still_has_the_legs_until_it_is_done(self, daemon, alice, bob):
        run_id, call_id = alice.background(durable=True)
        before = alice.issued(run_id, "start_patrol").fence
        self.restart(daemon)
        held = holds(bob)
        refused = bob.refused(bob.begin([WALK])).error
        state = alice.get(run_id).state
        alice.update_tool(run_id, call_id, done=True)
        after = bob.issued(bob.begin([WALK]), "walk_to").fence
        assert held == {"movement": ("start_patrol", "BACKGROUND")}
        assert (refused.reason, refused.metadata["holder_run_id"]) == ("RESOURCE_HELD", run_id)
        assert state is RunState.SUSPENDED
        assert after.epoch > before.epoch
        assert after > before

    def test_what_was_said_and_told_is_there(self, daemon, alice):
        run_id, call_id = alice.background(durable=True)
        alice.append(run_id, said("Be quick."))
        alice.update_tool(run_id, call_id, "a leak at the gate", done=False)
        alice.update_tool(run_id, call_id, done=True)
        self.restart(daemon)
        run = alice.get(run_id)
        told = [turn.text for turn in (*run.transcript, *run.pending_messages)]
        assert told.count("Be quick.") == 1
        assert told.count("a leak at the gate") == 1
        assert run.background_tool_calls == ()
        assert holds(alice) == {}

    def test_a_call_of_which_nobody_knew_is_still_resolved_over_the_restart(self, daemon, alice):
        slow = robot_tools("quadruped", turn_by=UNSURE)
        run_id = alice.begin([TURN], tools=slow, durable=True)
        assert alice.ended(run_id).state is RunState.OUTCOME_UNKNOWN
        self.restart(daemon)
        held = holds(alice)
        alice.resolve(run_id, "call-1", acted=False, evidence="it stands as it stood")
        (record,) = alice.trace(run_id)[1]
        assert held == {"movement": ("turn_by", "UNKNOWN")}
        assert record.resolution.evidence == "it stands as it stood"
        assert alice.issued(alice.begin([TURN]), "turn_by").fence.sequence == 1
