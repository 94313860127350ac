"""Durable runs over real restarts: a daemon killed or stopped, and what the next one knows."""

import signal
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from edge_agent.v1 import run_service_pb2 as run_pb
from edge_agent.v1 import system_service_pb2 as system_pb
from edge_agent.v1 import types_pb2 as pb
from tests.support.connection import (
    CALL_TIMEOUT_S,
    Connection,
    Problem,
    events,
    first,
    goal,
    kinds,
    result,
    text_of,
)
from tests.support.daemon import BASE_CONFIG, ENGINE, DaemonProcess, running_daemon

STORY = "Write a very long story about a robot."
CONFIG = f"{BASE_CONFIG}preload: [{ENGINE}]\n"
SUSPENDED = run_pb.RUN_STATE_SUSPENDED


def light_on(side_effect: int = pb.SIDE_EFFECT_NON_IDEMPOTENT, **fields: Any) -> pb.Tool:
    return pb.Tool(
        name="light_on",
        description="Turn the light on.",
        examples=[pb.ToolExample(goal="Turn on the light.", arguments_json="{}")],
        side_effect=side_effect,  # type: ignore[arg-type]
        **fields,
    )


def turn_on(**fields: Any) -> run_pb.RunSpec:
    tool = light_on(**fields)
    return goal(
        "Turn on the light.", tools=[tool], max_tool_calls=1, max_output_tokens=40, durable=True
    )


@pytest.fixture
def daemon(engine_store):
    with running_daemon(engine_store, CONFIG) as running:
        yield running


def connect(daemon: DaemonProcess, client: str = "robot") -> Connection:
    return Connection(daemon.api_socket, client)


def restart(daemon: DaemonProcess, signal_number: int = signal.SIGKILL) -> None:
    daemon.stop(signal_number)
    daemon.restart()


def resume(client: Connection, run_id: str, said: str = "") -> run_pb.Run:
    messages = [pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=said)])] if said else []
    request = run_pb.ResumeRunRequest(run_id=run_id, messages=messages)
    return client.runs.ResumeRun(request, timeout=CALL_TIMEOUT_S).run


def results(client: Connection, cursor: int = 0, wait_s: int = 0) -> run_pb.WaitResultsResponse:
    request = run_pb.WaitResultsRequest(cursor=cursor)
    if wait_s:
        request.wait.FromSeconds(wait_s)
    return client.runs.WaitResults(request, timeout=CALL_TIMEOUT_S)


def refused(call: Callable[[], object]) -> Problem:
    with pytest.raises(grpc.RpcError) as error:
        call()
    return Problem(error.value)


class TestKilled:
    def test_a_run_that_waits_for_its_tool_goes_on_when_it_is_resumed(self, daemon):
        with connect(daemon) as client:
            run_id = client.create(turn_on()).id
            issued = client.until(run_id, "tool_calls_issued")
            call_id = issued.tool_calls_issued.tool_calls[0].id
        restart(daemon)
        with connect(daemon) as client:
            run = client.get(run_id)
            assert (run.state, run.error.reason) == (SUSPENDED, "DAEMON_RESTARTED")
            assert [call.id for call in run.open_tool_calls] == [call_id]
            assert refused(lambda: resume(client, run_id)).reason == "TOOL_CALLS_OPEN"
            client.submit(run_id, result(call_id, "the light is on"))
            resume(client, run_id, "It is dark outside.")
            ended = client.end_of(run_id)
            trace = client.runs.GetTrace(run_pb.GetTraceRequest(run_id=run_id), timeout=20)
        assert ended.state == run_pb.RUN_STATE_SUCCEEDED
        assert [call.effect for call in trace.tool_calls] == ["DONE"]
        roles = [turn.role for turn in ended.transcript]
        assert roles == [pb.ROLE_ASSISTANT, pb.ROLE_TOOL, pb.ROLE_USER, pb.ROLE_ASSISTANT]

    def test_a_run_that_leaves_nothing_behind_goes_on_by_itself(self, daemon):
        with connect(daemon) as client:
            run_id = client.create(turn_on(side_effect=pb.SIDE_EFFECT_NONE)).id
            client.until(run_id, "tool_calls_issued")
        restart(daemon)
        with connect(daemon) as client:
            client.submit(run_id, result(client.get(run_id).open_tool_calls[0].id))
            assert client.end_of(run_id).state == run_pb.RUN_STATE_SUCCEEDED

    def test_an_interrupted_stream_goes_on_without_a_gap_or_a_repeat(self, daemon):
        with connect(daemon) as client:
            run_id = client.create(goal("Count to five.", durable=True, max_output_tokens=40)).id
            whole = list(client.watch(run_id, 0))[1:]
            cut = next(event.sequence for event in whole if event.HasField("text_delta"))
        restart(daemon)
        with connect(daemon) as client:
            snapshot, *rest = client.watch(run_id, cut)
        assert snapshot.snapshot == whole[-1].run_finished.run
        assert [event.sequence for event in rest] == [
            event.sequence for event in whole if event.sequence > cut
        ] or text_of(rest) == text_of([event for event in whole if event.sequence > cut])
        assert all(event.sequence > cut for event in rest)
        assert text_of([event for event in whole if event.sequence <= cut]) + text_of(
            rest
        ) == text_of(whole)
        assert rest[-1] == whole[-1]

    def test_what_a_reader_has_seen_of_an_unfinished_step_is_never_numbered_again(self, daemon):
        with connect(daemon) as client:
            run_id = client.create(goal(STORY, durable=True, max_output_tokens=1000)).id
            stream = client.watch(run_id)
            seen = [first(stream, "text_delta").sequence for _ in range(10)][-1]
        restart(daemon)
        with connect(daemon) as client:
            following = client.watch(run_id, seen)
            next(following)
            event = first(following, "text_delta")
            assert event.sequence > seen
            assert event.text_delta.step == 1
            client.runs.CancelRun(run_pb.CancelRunRequest(run_id=run_id), timeout=CALL_TIMEOUT_S)

    def test_a_request_makes_one_run_over_restarts(self, daemon):
        spec = goal("What is 2 + 2?", durable=True, max_output_tokens=20)
        with connect(daemon) as client:
            made = client.create(spec, request_id="once")
            client.end_of(made.id)
        restart(daemon)
        with connect(daemon) as client:
            assert client.create(spec, request_id="once").id == made.id
            other = goal("What is 3 + 3?", durable=True, max_output_tokens=20)
            problem = refused(lambda: client.create(other, request_id="once"))
            assert (problem.code, problem.reason) == (
                grpc.StatusCode.ALREADY_EXISTS,
                "REQUEST_ID_REUSED",
            )
            assert problem.metadata["run_id"] == made.id
            with connect(daemon, "another") as another:
                assert another.create(spec, request_id="once").id != made.id

    def test_a_step_that_two_daemons_died_in_fails(self, daemon):
        with connect(daemon) as client:
            run_id = client.create(goal(STORY, durable=True, max_output_tokens=1000)).id
            client.until(run_id, "text_delta")
        restart(daemon)
        with connect(daemon) as client:
            first(client.watch(run_id), "text_delta")
        restart(daemon)
        with connect(daemon) as client:
            run = client.get(run_id)
        assert (run.state, run.error.reason) == (run_pb.RUN_STATE_FAILED, "STEP_ENDS_DAEMON")

    def test_an_ephemeral_run_is_gone(self, daemon):
        with connect(daemon) as client:
            run_id = client.create(goal("What is 2 + 2?", max_output_tokens=20)).id
            client.end_of(run_id)
        restart(daemon)
        with connect(daemon) as client:
            assert refused(lambda: client.get(run_id)).code is grpc.StatusCode.NOT_FOUND


class TestStopped:
    def test_a_stopping_daemon_suspends_and_cancels_no_call(self, engine_store):
        config = f"{CONFIG}shutdown: {{grace: 100ms}}\n"
        with running_daemon(engine_store, config) as daemon:
            with connect(daemon) as client:
                run_id = client.create(turn_on()).id
                client.until(run_id, "tool_calls_issued")
                daemon.stop()
            daemon.restart()
            with connect(daemon) as client:
                seen = []
                for event in client.watch(run_id, 0):
                    seen.append(event)
                    if event.state_changed.state == SUSPENDED:
                        break
                run = client.get(run_id)
        assert "cancel_tool" not in kinds(seen)
        assert seen[-1].state_changed.cause.reason == "DAEMON_STOPPING"
        assert (run.state, len(run.open_tool_calls)) == (SUSPENDED, 1)

    def test_a_stream_that_the_daemon_breaks_does_not_cancel_its_durable_run(self, engine_store):
        config = f"{CONFIG}shutdown: {{grace: 100ms}}\n"
        with running_daemon(engine_store, config) as daemon:
            with connect(daemon) as client:
                stream = events(client.execute(turn_on()))
                run_id = first(stream, "tool_calls_issued").run_id
                daemon.stop()
            daemon.restart()
            with connect(daemon) as client:
                assert client.get(run_id).state == SUSPENDED


class TestHalted:
    def test_after_a_halt_and_a_restart_nothing_moves_until_it_is_cleared_and_resumed(self, daemon):
        with connect(daemon) as client:
            run_id = client.create(goal(STORY, durable=True, max_output_tokens=1000)).id
            client.until(run_id, "text_delta")
            halt_id = client.halt(run_pb.HALT_SCOPE_CLIENT, "robot").halt.halt_id
        restart(daemon)
        with connect(daemon) as client:
            run = client.get(run_id)
            assert (run.state, run.error.reason) == (SUSPENDED, "HALTED")
            assert refused(lambda: resume(client, run_id)).reason == "HALTED"
            client.clear_halt(halt_id)
            assert client.get(run_id).state == SUSPENDED
            resume(client, run_id)
            first(client.watch(run_id), "text_delta")


class TestResults:
    def test_what_ended_while_the_caller_was_away_is_delivered_until_it_is_acknowledged(
        self, daemon
    ):
        spec = goal("What is 2 + 2?", durable=True, max_output_tokens=20)
        with connect(daemon) as client:
            made = [client.create(spec).id for _ in range(3)]
            for run_id in made:
                client.end_of(run_id)
            ended = results(client)
            assert sorted(run.id for run in ended.runs) == sorted(made)
            assert all(run.transcript for run in ended.runs)
            assert results(client, ended.cursor).runs == []
        restart(daemon)
        with connect(daemon) as client:
            again = results(client)
            assert [run.id for run in again.runs] == [run.id for run in ended.runs]
            client.runs.AckResults(
                run_pb.AckResultsRequest(cursor=again.cursor), timeout=CALL_TIMEOUT_S
            )
            assert results(client).runs == []
            assert client.get(made[0]).state == run_pb.RUN_STATE_SUCCEEDED

    def test_a_caller_may_wait_for_the_next_and_gets_only_its_own(self, daemon):
        spec = goal("What is 2 + 2?", durable=True, max_output_tokens=20)
        with connect(daemon) as client, connect(daemon, "other") as other:
            other.end_of(other.create(spec).id)
            made = client.create(spec)
            assert [run.id for run in results(client, wait_s=20).runs] == [made.id]


class TestLists:
    def test_memory_and_ledger_make_one_list(self, daemon):
        spec = goal("What is 2 + 2?", durable=True, max_output_tokens=20)
        with connect(daemon) as client:
            made = [client.create(spec).id for _ in range(3)]
            for run_id in made:
                client.end_of(run_id)
        restart(daemon)
        with connect(daemon) as client:
            made.append(client.create(goal("What is 3 + 3?", max_output_tokens=20)).id)
            made.append(client.create(spec).id)
            found: list[str] = []
            token = ""
            while not found or token:
                request = run_pb.ListRunsRequest(page_size=2, page_token=token)
                page = client.runs.ListRuns(request, timeout=CALL_TIMEOUT_S)
                found += [run.id for run in page.runs]
                token = page.next_page_token
            problem = refused(lambda: client.runs.ListRuns(run_pb.ListRunsRequest(page_token="x")))
        assert found == made[::-1]
        assert "page_token" in problem.fields


class TestApproval:
    def test_only_the_runs_own_client_or_the_operator_decides(self, daemon):
        spec = turn_on(needs_approval=True)
        with (
            connect(daemon) as client,
            connect(daemon, "other") as other,
            Connection(daemon.admin_socket, "operator") as admin,
        ):
            for decider, approved in ((client, True), (admin, False)):
                run_id = client.create(spec).id
                asked = client.until(run_id, "approval_requested").approval_requested
                request = run_pb.DecideToolCallRequest(
                    run_id=run_id, tool_call_id=asked.tool_calls[0].id, approved=approved
                )
                problem = refused(lambda: other.runs.DecideToolCall(request, timeout=20))  # noqa: B023
                assert problem.code is grpc.StatusCode.PERMISSION_DENIED
                decider.runs.DecideToolCall(request, timeout=CALL_TIMEOUT_S)
                if approved:
                    client.until(run_id, "tool_calls_issued")
                    client.submit(run_id, result(asked.tool_calls[0].id))
                told = client.end_of(run_id).transcript[1]
                assert (told.role, told.is_error) == (pb.ROLE_TOOL, not approved)


def test_a_full_ledger_refuses_durable_runs_and_no_others(engine_store):
    config = f"{CONFIG}ledger: {{max_size: 4MiB, ballast: null}}\n"
    long = "word " * 2000
    with running_daemon(engine_store, config) as daemon, connect(daemon) as client:
        problem = None
        for number in range(2000):
            spec = goal(f"{number} {long}", durable=True, timeout_s=0.001)
            try:
                client.create(spec)
            except grpc.RpcError as error:
                problem = Problem(error)
                break
        assert problem is not None
        assert (problem.code, problem.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "LEDGER_FULL",
        )
        assert problem.retry.retry_delay.ToTimedelta().total_seconds() > 0
        run = client.create(goal("What is 2 + 2?", max_output_tokens=20))
        assert client.end_of(run.id).state == run_pb.RUN_STATE_SUCCEEDED


def test_the_trace_of_a_run_survives_it(daemon):
    with connect(daemon) as client:
        run_id = client.create(turn_on()).id
        issued = client.until(run_id, "tool_calls_issued").tool_calls_issued
        client.submit(run_id, result(issued.tool_calls[0].id, "the light is on"))
        client.end_of(run_id)
    restart(daemon, signal.SIGTERM)
    with connect(daemon) as client:
        trace = client.runs.GetTrace(run_pb.GetTraceRequest(run_id=run_id), timeout=CALL_TIMEOUT_S)
    assert [(step.step, step.attempt, step.finish) for step in trace.steps] == [
        (1, 1, "TOOL_CALLS"),
        (2, 1, "STOP"),
    ]
    assert trace.steps[1].parent == 1
    assert len(trace.steps[0].engine_digest) == 64
    assert len(trace.steps[0].template_hash) == len(trace.steps[0].tools_hash) == 16
    assert trace.steps[0].available_before_bytes > 0
    (call,) = trace.tool_calls
    assert (call.tool, call.effect, call.result_class) == ("light_on", "DONE", "OK")
    assert call.result_bytes == len("the light is on")
    assert not call.HasField("body_json")


def test_without_a_ledger_the_daemon_comes_up_and_takes_no_durable_runs(engine_store):
    with running_daemon(engine_store, CONFIG, ready=False) as daemon:
        daemon.wait_for("daemon_ready")
        daemon.stop(signal.SIGKILL)
        for kept in daemon.state_dir.glob("ledger*"):
            kept.unlink()
        (daemon.state_dir / "ledger.db").mkdir()
        daemon.restart()
        with connect(daemon) as client:
            problem = refused(lambda: client.create(goal("What is 2 + 2?", durable=True)))
            assert (problem.code, problem.reason) == (
                grpc.StatusCode.UNAVAILABLE,
                "LEDGER_FAILED",
            )
            run = client.create(goal("What is 2 + 2?", max_output_tokens=20))
            assert client.end_of(run.id).state == run_pb.RUN_STATE_SUCCEEDED
            status = client.system.GetStatus(system_pb.GetStatusRequest(), timeout=20)
        assert any("no durable runs" in reason for reason in status.degraded_reasons)
