"""Halt: acts at once, latches, survives, and is lifted by name."""

import json
import signal
import time

import grpc
import pytest

from edge_agent.v1 import run_service_pb2 as run_pb
from edge_agent.v1 import system_service_pb2 as system_pb
from edge_agent.v1 import types_pb2 as pb
from tests.support.connection import Connection, Problem, events, first, goal, result
from tests.support.daemon import BASE_CONFIG, ENGINE, running_daemon

STORY = "Write a very long story about a robot."
RUNS_AT_ONCE = 64
ALL, CLIENT, AGENT, TOOL = (
    run_pb.HALT_SCOPE_ALL,
    run_pb.HALT_SCOPE_CLIENT,
    run_pb.HALT_SCOPE_AGENT,
    run_pb.HALT_SCOPE_TOOL,
)
LIGHT_ON = pb.Tool(
    name="light_on",
    description="Turn the light on.",
    examples=[pb.ToolExample(goal="Turn on the light.", arguments_json="{}")],
)
TURN_ON = goal("Turn on the light.", tools=[LIGHT_ON], max_tool_calls=1)
CONFIG = f"{BASE_CONFIG}preload: [{ENGINE}]\n"


@pytest.fixture(scope="module")
def daemon(engine_store):
    with running_daemon(engine_store, CONFIG) as running:
        running.wait_for("engine_loaded")
        yield running


@pytest.fixture
def client(daemon):
    """Whoever runs something; leaves no Halt behind."""
    with Connection(daemon.api_socket, "robot") as connection:
        yield connection
    with Connection(daemon.admin_socket, "operator") as admin:
        for halt in halts(admin):
            admin.clear_halt(halt.halt_id)


@pytest.fixture
def bystander(daemon):
    """Any other client: everybody may call Halt."""
    with Connection(daemon.api_socket, "bystander") as connection:
        yield connection


def halts(client):
    return client.system.GetStatus(system_pb.GetStatusRequest(), timeout=20).halts


def talking(client, **fields):
    """The stream of a run whose answer is being written."""
    stream = events(client.execute(goal(STORY, max_output_tokens=1000, **fields)))
    return first(stream, "text_delta").run_id, stream


def end_of(stream):
    run = list(stream)[-1].run_finished.run
    return run.state, run.error.reason, run.error.metadata["halt_id"]


def refusal(client, **fields):
    with pytest.raises(grpc.RpcError) as refused:
        client.create(goal("Hello?", **fields))
    problem = Problem(refused.value)
    assert problem.code is grpc.StatusCode.FAILED_PRECONDITION
    assert problem.reason == "HALTED"
    return problem


def accepted(client, **fields):
    """A run that is not refused, cancelled at once."""
    run_id = client.create(goal("Hello?", **fields)).id
    client.runs.CancelRun(run_pb.CancelRunRequest(run_id=run_id))
    return run_id


def test_halt_all_stops_every_run_and_refuses_new_ones(client, bystander):
    _, stream = talking(client)
    _, others = talking(bystander, agent="other")
    answer = bystander.halt(ALL, reason="smoke in the hall")
    halt_id = answer.halt.halt_id
    assert answer.recorded
    assert answer.runs_stopped == 2
    assert answer.halt.client == "bystander"
    assert end_of(stream) == (run_pb.RUN_STATE_CANCELLED, "HALTED", halt_id)
    assert end_of(others) == (run_pb.RUN_STATE_CANCELLED, "HALTED", halt_id)
    for each in (client, bystander):
        problem = refusal(each)
        assert problem.metadata["halt_id"] == halt_id
        assert "smoke in the hall" in problem.message


def test_halt_all_is_lifted_on_the_admin_socket_only(daemon, client):
    halt_id = client.halt(ALL).halt.halt_id
    with pytest.raises(grpc.RpcError) as refused:
        client.clear_halt(halt_id)
    problem = Problem(refused.value)
    assert problem.code is grpc.StatusCode.PERMISSION_DENIED
    assert problem.reason == "ADMIN_SOCKET_REQUIRED"
    refusal(client)
    with Connection(daemon.admin_socket) as admin:
        admin.clear_halt(halt_id)
    accepted(client)


@pytest.mark.parametrize(
    ("scope", "target"), [(CLIENT, "robot"), (AGENT, "patrol")], ids=["client", "agent"]
)
def test_halt_of_one_client_or_agent_leaves_the_others_alone(client, bystander, scope, target):
    _, stream = talking(client, agent="patrol")
    other_id, _others = talking(bystander, agent="sweep")
    answer = bystander.halt(scope, target)
    assert answer.runs_stopped == 1
    assert end_of(stream) == (run_pb.RUN_STATE_CANCELLED, "HALTED", answer.halt.halt_id)
    assert bystander.get(other_id).state == run_pb.RUN_STATE_RUNNING
    assert refusal(client, agent="patrol").metadata["target"] == target
    accepted(bystander, agent="sweep")
    client.clear_halt(answer.halt.halt_id)
    accepted(client, agent="patrol")


def test_halt_of_a_tool_cancels_its_open_calls_and_refuses_new_ones(client, bystander):
    stream = events(client.execute(TURN_ON))
    run_id = first(stream, "tool_calls_issued").run_id
    talking_id, _talk = talking(bystander)
    answer = bystander.halt(TOOL, "light_on", "the lamp is hot")
    halt_id = answer.halt.halt_id
    assert answer.runs_stopped == 1
    cancel = first(stream, "cancel_tool").cancel_tool
    assert (cancel.tool_call_id, cancel.reason.reason) == ("call-1", "HALTED")
    assert client.get(run_id).state == run_pb.RUN_STATE_CANCELLING
    client.submit(run_id, result("call-1", cancelled=True))
    assert end_of(stream) == (run_pb.RUN_STATE_CANCELLED, "HALTED", halt_id)
    assert bystander.get(talking_id).state == run_pb.RUN_STATE_RUNNING

    # A run may begin, but not call the tool.
    seen = list(events(client.execute(TURN_ON)))
    run = seen[-1].run_finished.run
    assert (run.state, run.error.reason) == (run_pb.RUN_STATE_FAILED, "HALTED")
    assert run.error.metadata["halt_id"] == halt_id
    assert not any(event.HasField("tool_calls_issued") for event in seen)


def test_a_call_that_nobody_confirms_has_an_unknown_outcome(engine_store):
    config = f"runs: {{default_engine: {ENGINE}, cancel_confirm: 100ms}}\nworker: {{threads: 1}}\n"
    with running_daemon(engine_store, config) as daemon, Connection(daemon.api_socket) as client:
        stream = events(client.execute(TURN_ON))
        first(stream, "tool_calls_issued")
        halt_id = client.halt(ALL).halt.halt_id
        run = list(stream)[-1].run_finished.run
        assert run.state == run_pb.RUN_STATE_OUTCOME_UNKNOWN
        assert run.error.metadata["cause"] == "HALTED"
        assert run.error.metadata["halt_id"] == halt_id
        assert run.error.metadata["tool_call_ids"] == "call-1"


def test_an_unknown_halt_can_not_be_lifted(client):
    with pytest.raises(grpc.RpcError) as refused:
        client.clear_halt("nothing")
    assert Problem(refused.value).code is grpc.StatusCode.NOT_FOUND


def test_halts_survive_a_killed_daemon_and_cleared_ones_do_not(engine_store):
    with running_daemon(engine_store) as daemon:
        with Connection(daemon.api_socket) as client:
            kept = [client.halt(AGENT, f"agent-{n}").halt for n in range(3)]
            client.clear_halt(kept.pop(1).halt_id)
        daemon.stop(signal.SIGKILL)
        daemon.restart()
        with Connection(daemon.api_socket) as client:
            assert list(halts(client)) == kept
            assert refusal(client, agent="agent-2").metadata["halt_id"] == kept[1].halt_id
            accepted(client, agent="agent-1")


def test_an_unreadable_halt_record_means_all(engine_store):
    with running_daemon(engine_store) as daemon:
        daemon.stop(signal.SIGKILL)
        record = daemon.state_dir / "halts.json"
        record.write_text('[{"id": "torn')
        daemon.restart()
        with (
            Connection(daemon.api_socket) as client,
            Connection(daemon.admin_socket) as admin,
        ):
            (halt,) = halts(client)
            assert halt.scope == ALL
            assert "halts.json can't be read" in halt.reason
            assert refusal(client).metadata["halt_id"] == halt.halt_id
            with pytest.raises(grpc.RpcError):
                client.clear_halt(halt.halt_id)
            admin.clear_halt(halt.halt_id)
            accepted(client)
            assert json.loads(record.read_bytes()) == []


def test_a_halt_that_can_not_be_recorded_acts_and_says_so(engine_store):
    with running_daemon(engine_store) as daemon, Connection(daemon.api_socket) as client:
        (daemon.state_dir / "halts.json.partial").mkdir()  # in the way of the record
        answer = client.halt(AGENT, "patrol")
        assert not answer.recorded
        assert daemon.wait_for("halt_not_recorded")["halt"] == answer.halt.halt_id
        refusal(client, agent="patrol")
        with pytest.raises(grpc.RpcError) as refused:
            client.clear_halt(answer.halt.halt_id)
        assert Problem(refused.value).reason == "HALT_NOT_RECORDED"
        refusal(client, agent="patrol")


def test_halt_all_under_full_load_ends_every_run(client, bystander):
    """With every place in the engine taken, a queue behind it and a call open."""
    stream = events(client.execute(TURN_ON))
    waiting_id = first(stream, "tool_calls_issued").run_id
    made = [
        client.create(goal(f"{STORY} Part {n}.", max_output_tokens=1000)).id
        for n in range(RUNS_AT_ONCE - 1)
    ]
    client.until(made[0], "text_delta")
    began_s = time.monotonic()
    answer = bystander.halt(ALL)
    answered_ms = (time.monotonic() - began_s) * 1000
    assert first(stream, "cancel_tool").cancel_tool.tool_call_id == "call-1"
    ended = [client.end_of(run_id) for run_id in made]
    all_ended_ms = (time.monotonic() - began_s) * 1000
    client.submit(waiting_id, result("call-1", cancelled=True))
    ended.append(client.end_of(waiting_id))
    print(  # noqa: T201 - a measurement to read (pytest -rP), not to assert
        f"{RUNS_AT_ONCE} runs: Halt answered in {answered_ms:.1f} ms, all seen ended in "
        f"{all_ended_ms:.1f} ms"
    )
    assert answer.runs_stopped == RUNS_AT_ONCE
    assert {run.state for run in ended} == {run_pb.RUN_STATE_CANCELLED}
    assert {run.error.metadata["halt_id"] for run in ended} == {answer.halt.halt_id}
