"""Runs whose tools the daemon executes itself: named by the request, defined by the operator."""

import grpc
import pytest

from edge_agent.v1 import run_service_pb2 as run_pb
from edge_agent.v1 import types_pb2 as pb
from tests.support.connection import Connection, Problem, goal, kinds
from tests.support.daemon import BASE_CONFIG, ENGINE, running_daemon

CONFIG = f"""{BASE_CONFIG}preload: [{ENGINE}]
tools:
  allow:
    clock: {{builtin: clock, side_effect: NONE}}
    device_status: {{builtin: device_status, side_effect: NONE, needs_approval: true}}
"""


def own(name: str) -> pb.Tool:
    return pb.Tool(name=name, executor=pb.EXECUTOR_DAEMON)


BOTH = [own("clock"), own("device_status")]


@pytest.fixture(scope="module")
def daemon(engine_store):
    with running_daemon(engine_store, CONFIG) as running:
        yield running


@pytest.fixture
def client(daemon):
    with Connection(daemon.api_socket) as connection:
        yield connection


def test_the_daemon_executes_its_own_tool_and_the_model_reads_the_result(client):
    spec = goal("Call the tool clock.", tools=BOTH, max_tool_calls=1, max_output_tokens=40)
    run_id = client.create(spec).id
    seen = list(client.watch(run_id, 0))
    assert "daemon_tool_started" in kinds(seen)
    assert "tool_calls_issued" not in kinds(seen)
    run = seen[-1].run_finished.run
    assert run.state == run_pb.RUN_STATE_SUCCEEDED
    assert '"utc":"' in run.transcript[1].parts[0].text


def test_what_needs_approval_by_the_allow_list_waits_for_it(client):
    spec = goal(
        "Use device_status to check the memory.",
        tools=BOTH,
        max_tool_calls=1,
        max_output_tokens=40,
    )
    run_id = client.create(spec).id
    asked = client.until(run_id, "approval_requested").approval_requested.tool_calls[0]
    assert client.get(run_id).state == run_pb.RUN_STATE_WAITING_APPROVAL
    client.runs.DecideToolCall(
        run_pb.DecideToolCallRequest(run_id=run_id, tool_call_id=asked.id, approved=True),
        timeout=20,
    )
    run = client.end_of(run_id)
    assert '"memory_available_bytes":' in run.transcript[1].parts[0].text


@pytest.mark.parametrize(
    ("tool", "field", "says"),
    [
        (own("rm"), "spec.tools[0].name", "clock, device_status"),
        (
            pb.Tool(name="clock", description="mine", executor=pb.EXECUTOR_DAEMON),
            "spec.tools[0].description",
            "the daemon has its own",
        ),
        (pb.Tool(name="a", executor=9), "spec.tools[0].executor", "9 is no executor"),  # type: ignore[arg-type]
        (pb.Tool(name="a", side_effect=9), "spec.tools[0].side_effect", "9 is no side effect"),  # type: ignore[arg-type]
    ],
)
def test_a_request_names_only_what_is_allowed(client, tool, field, says):
    with pytest.raises(grpc.RpcError) as refused:
        client.create(goal("Hello?", tools=[tool]))
    assert says in Problem(refused.value).fields[field]
