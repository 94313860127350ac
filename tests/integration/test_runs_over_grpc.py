"""Runs as callers see them: a real daemon, real sockets and the real embedded engine."""

import itertools
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import jsonschema_rs
import pytest

from edge_agent.v1 import engine_service_pb2 as engine_pb
from edge_agent.v1 import run_service_pb2 as run_pb
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
from tests.support.daemon import BASE_CONFIG, ENGINE, running_daemon

STORY = "Write a very long story about a robot."
CONTEXT_TOKENS = 2048
PRELOAD = f"preload: [{ENGINE}]\nengines: {{{ENGINE}: {{context_tokens: {CONTEXT_TOKENS}}}}}\n"
PLACES = ("kitchen", "dock", "door")
MOVE_TO = pb.Tool(
    name="move_to",
    description="Drive the robot to a place.",
    input_schema_json=json.dumps(
        {
            "type": "object",
            "properties": {
                "place": {"type": "string", "enum": PLACES},
                "speed": {"type": "integer", "minimum": 1, "maximum": 5},
            },
            "required": ["place", "speed"],
            "additionalProperties": False,
        }
    ),
    examples=[
        pb.ToolExample(goal="Go to the dock.", arguments_json='{"place": "dock", "speed": 2}')
    ],
)
LIGHT_ON = pb.Tool(
    name="light_on",
    description="Turn the light on.",
    examples=[pb.ToolExample(goal="Turn on the light.", arguments_json="{}")],
)
TURN_ON = goal("Turn on the light.", tools=[LIGHT_ON], max_tool_calls=1)
"""Calls light_on once and answers then."""

NARROW = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
"""A channel that takes in no more than its reader asks for, as of a client whose memory is full."""


# More bytes than any buffer on the way holds, and no more than 1,500 tokens: 64 of it are one.
BULKY = "#" * 90_000

VANISHING_CLIENT = """
import sys
from pathlib import Path
from edge_agent.v1 import run_service_pb2 as run_pb
from tests.support.connection import Connection, events, goal
with Connection(Path(sys.argv[1]), "vanishing") as client:
    spec = goal(sys.argv[2], max_output_tokens=int(sys.argv[4]))
    for event in events(client.execute(spec, on_disconnect=int(sys.argv[3]))):
        if event.WhichOneof("kind") == "text_delta":
            print(event.run_id, flush=True)
"""


@pytest.fixture(scope="module")
def daemon(engine_store):
    with running_daemon(engine_store, BASE_CONFIG + PRELOAD) as running:
        running.wait_for("engine_loaded")
        yield running


@pytest.fixture
def client(daemon):
    with Connection(daemon.api_socket) as connection:
        yield connection


@pytest.fixture
def other(daemon):
    """A second client, with a connection of its own."""
    with Connection(daemon.api_socket, "other") as connection:
        yield connection


def ended(found):
    """The run in a stream's last event, which must be its end."""
    last = list(found)[-1]
    assert last.WhichOneof("kind") == "run_finished"
    return last.run_finished.run


# --- text ---


def test_an_answer_streams_as_deltas_that_join_to_it(client):
    seen = list(events(client.execute(goal("What is the capital of France?"))))
    run = seen[-1].run_finished.run
    assert run.state == run_pb.RUN_STATE_SUCCEEDED
    assert "Paris" in run.answer
    assert text_of(seen) == run.answer
    assert kinds(seen)[0] == "snapshot"
    assert kinds(seen)[-2:] == ["step_finished", "run_finished"]
    assert kinds(seen).count("text_delta") > 1
    # The snapshot may know of the first events already; they come all the same.
    sequences = [event.sequence for event in seen[1:]]
    assert sequences == sorted(set(sequences))
    assert sequences[0] == 1
    assert {event.run_id for event in seen} == {run.id}
    assert run.sequence == sequences[-1]


def test_the_last_event_says_what_the_run_consumed(client):
    spec = goal("Count from one to ten.", max_output_tokens=20)
    seen = list(events(client.execute(spec)))
    usage = seen[-1].run_finished.run.usage
    assert 0 < usage.completion_tokens <= 20
    assert usage.prompt_tokens > usage.cached_tokens >= 0
    assert usage.ttft_ms > 0
    assert usage.tokens_per_second > 0
    # The token that ends the turn has no text.
    delta_tokens = sum(event.text_delta.tokens for event in seen)
    assert delta_tokens <= usage.completion_tokens


def test_emoji_are_never_split(client):
    spec = goal("List five animals as emoji: 🐶🐱🐭", max_output_tokens=60)
    seen = list(events(client.execute(spec)))
    answer = seen[-1].run_finished.run.answer
    assert any(ord(character) > 0xFFFF for character in answer)
    # A character cut in two would have come as U+FFFD, or not at all.
    assert "\ufffd" not in answer
    assert text_of(seen) == answer


def test_an_answer_cut_by_the_token_limit_says_so(client):
    seen = list(events(client.execute(goal(STORY, max_output_tokens=8))))
    assert first(seen, "step_finished").step_finished.finish_reason == "TRUNCATED"
    assert seen[-1].run_finished.run.usage.completion_tokens == 8


def test_an_output_schema_shapes_the_answer(client):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    spec = goal("Name a city.", output_schema_json=json.dumps(schema))
    run = ended(events(client.execute(spec)))
    assert run.state == run_pb.RUN_STATE_SUCCEEDED
    jsonschema_rs.validate(schema, json.loads(run.answer))


def test_the_same_seed_gives_the_same_text(client):
    spec = goal("Tell me a joke.", max_output_tokens=24)
    spec.sampling.CopyFrom(pb.Sampling(temperature=1.0, seed=7))
    answers = {ended(events(client.execute(spec))).answer for _ in range(2)}
    spec.sampling.seed = 8
    assert len(answers) == 1
    assert ended(events(client.execute(spec))).answer not in answers


# --- tools ---


def test_a_conversation_calls_a_tool_and_answers(client):
    requests: queue.SimpleQueue[run_pb.ConverseRequest | None] = queue.SimpleQueue()
    spec = goal("Go to the door at speed 3.", tools=[MOVE_TO, LIGHT_ON], max_tool_calls=1)
    requests.put(run_pb.ConverseRequest(start=run_pb.ExecuteRunRequest(spec=spec)))
    stream = client.runs.Converse(iter(requests.get, None), timeout=CALL_TIMEOUT_S)
    seen = []
    for event in events(stream):
        seen.append(event)
        if event.WhichOneof("kind") == "tool_calls_issued":
            (call,) = event.tool_calls_issued.tool_calls
            assert (call.id, call.name) == ("call-1", "move_to")
            jsonschema_rs.validate(
                json.loads(MOVE_TO.input_schema_json), json.loads(call.arguments_json)
            )
            assert call.valid_for.seconds == 30
            results = run_pb.ToolResults(results=[result(call.id, "The robot is at the door.")])
            requests.put(run_pb.ConverseRequest(tool_results=results))
    requests.put(None)
    run = seen[-1].run_finished.run
    assert run.state == run_pb.RUN_STATE_SUCCEEDED
    assert run.steps == 2
    assert text_of(seen, step=2) == run.answer
    assert [message.role for message in run.transcript] == [
        pb.ROLE_ASSISTANT,
        pb.ROLE_TOOL,
        pb.ROLE_ASSISTANT,
    ]
    order = kinds(seen)
    assert order.index("tool_calls_issued") < order.index("tool_result_accepted")


def test_a_result_may_come_from_another_connection(client, other):
    stream = events(client.execute(TURN_ON))
    issued = first(stream, "tool_calls_issued")
    waiting = other.get(issued.run_id)
    assert waiting.state == run_pb.RUN_STATE_WAITING_TOOL
    assert [call.id for call in waiting.open_tool_calls] == ["call-1"]
    after = other.submit(issued.run_id, result("call-1", "The light is on."))
    assert after.open_tool_calls == []
    assert ended(stream).state == run_pb.RUN_STATE_SUCCEEDED


def test_a_result_is_taken_once(client, other):
    stream = events(client.execute(TURN_ON))
    run_id = first(stream, "tool_calls_issued").run_id
    other.submit(run_id, result("call-1"))
    for call_id, reason in (("call-1", "TOOL_CALL_CLOSED"), ("call-9", "TOOL_CALL_NOT_FOUND")):
        with pytest.raises(grpc.RpcError) as refused:
            other.submit(run_id, result(call_id))
        assert Problem(refused.value).reason == reason
    list(stream)
    with pytest.raises(grpc.RpcError) as refused:
        other.submit(run_id, result("call-1"))
    assert Problem(refused.value).reason == "RUN_ENDED"


def test_a_tool_that_gives_no_result_ends_the_run(client):
    impatient = pb.Tool()
    impatient.CopyFrom(LIGHT_ON)
    impatient.timeout.FromMilliseconds(100)
    stream = events(client.execute(goal("Turn on the light.", tools=[impatient])))
    issued = first(stream, "tool_calls_issued")
    asked = first(stream, "cancel_tool").cancel_tool
    assert (asked.tool_call_id, asked.reason.reason) == ("call-1", "TOOL_TIMEOUT")
    client.submit(issued.run_id, result("call-1", cancelled=True))
    run = ended(stream)
    assert (run.state, run.error.reason) == (run_pb.RUN_STATE_FAILED, "TOOL_TIMEOUT")


# --- made once, followed by many ---


def test_a_created_run_goes_on_alone_and_is_followed_from_anywhere(client, other):
    made = client.create(goal(STORY, max_output_tokens=40))
    assert made.state == run_pb.RUN_STATE_QUEUED
    whole = list(client.watch(made.id, 0))
    run = whole[-1].run_finished.run
    answer = run.answer
    assert text_of(whole) == answer
    assert client.get(made.id) == run

    # Resumed in the middle, after the end: the rest, as one delta.
    middle = [event.sequence for event in whole if event.WhichOneof("kind") == "text_delta"][10]
    known = text_of([event for event in whole if event.sequence <= middle])
    snapshot, *rest = other.watch(made.id, middle)
    assert snapshot.snapshot.state == run_pb.RUN_STATE_SUCCEEDED
    assert known + text_of(rest) == answer
    assert kinds(rest) == ["text_delta", "step_finished", "run_finished"]
    assert [event.sequence for event in rest][-2:] == [e.sequence for e in whole][-2:]

    # With everything known, and with nothing asked for: the snapshot alone.
    for after in (run.sequence, None):
        (only,) = other.watch(made.id, after)
        assert only.snapshot == run


def test_a_watch_is_resumed_while_the_run_goes_on(client, other):
    made = client.create(goal(STORY, max_output_tokens=120))
    watched = client.watch(made.id)
    early = list(itertools.islice((e for e in watched if e.WhichOneof("kind") == "text_delta"), 5))
    snapshot, *rest = other.watch(made.id, early[-1].sequence)
    assert snapshot.snapshot.state == run_pb.RUN_STATE_RUNNING
    assert snapshot.snapshot.partial_text.startswith(text_of(early))
    assert text_of(early) + text_of(rest) == rest[-1].run_finished.run.answer


def test_runs_are_listed_newest_first_in_pages(client):
    made = [client.create(goal(f"Say {word}.", max_output_tokens=2)).id for word in ("a", "b", "c")]
    for run_id in made:
        client.end_of(run_id)
    page = client.runs.ListRuns(run_pb.ListRunsRequest(page_size=2))
    assert [run.id for run in page.runs] == [made[2], made[1]]
    assert all(not run.transcript for run in page.runs)
    request = run_pb.ListRunsRequest(page_size=2, page_token=page.next_page_token)
    assert client.runs.ListRuns(request).runs[0].id == made[0]
    request = run_pb.ListRunsRequest(states=[run_pb.RUN_STATE_RUNNING])
    assert client.runs.ListRuns(request).runs == []


def test_cancelling_ends_a_run_and_frees_its_place(client, other):
    stream = events(client.execute(goal(STORY, max_output_tokens=1000)))
    run_id = first(stream, "text_delta").run_id
    other.runs.CancelRun(run_pb.CancelRunRequest(run_id=run_id))
    run = ended(stream)
    assert run.state == run_pb.RUN_STATE_CANCELLED
    assert run.error.reason == "CANCELLED_BY_CALLER"
    assert run.error.metadata["client"] == "other"
    places_free(other)


def places_free(client):
    """Return once no step is left in the engine."""
    request = engine_pb.WatchEnginesRequest()
    for response in client.engines.WatchEngines(request, timeout=CALL_TIMEOUT_S):
        if response.engine.worker.active_steps == 0:
            return


def test_a_request_id_makes_one_run(client, other):
    spec = goal("Say hello.", max_output_tokens=2)
    made = client.create(spec, "request-1")
    assert client.create(spec, "request-1").id == made.id
    client.end_of(made.id)
    again = client.create(spec, "request-1")
    assert (again.id, again.state) == (made.id, run_pb.RUN_STATE_SUCCEEDED)
    assert other.create(spec, "request-1").id != made.id  # ids are a client's own
    with pytest.raises(grpc.RpcError) as refused:
        client.create(goal("Say goodbye.", max_output_tokens=2), "request-1")
    problem = Problem(refused.value)
    assert problem.code is grpc.StatusCode.ALREADY_EXISTS
    assert problem.reason == "REQUEST_ID_REUSED"
    assert problem.metadata == {"request_id": "request-1", "run_id": made.id}


# --- refusals ---


def test_an_unknown_engine_is_not_found_and_the_known_ones_are_named(client):
    with pytest.raises(grpc.RpcError) as refused:
        client.create(goal("Hello?", engine="gpt-9"))
    problem = Problem(refused.value)
    assert problem.code is grpc.StatusCode.NOT_FOUND
    assert problem.metadata["installed"] == ENGINE
    assert ENGINE in problem.message


def test_an_unknown_run_is_not_found(client):
    for call in (client.get, client.end_of, lambda run_id: client.submit(run_id, result("call-1"))):
        with pytest.raises(grpc.RpcError) as refused:
            call("nobody")
        assert Problem(refused.value).reason == "RUN_NOT_FOUND"


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(client):
    run = ended(events(client.execute(goal("word " * 3000))))
    assert (run.state, run.error.reason) == (run_pb.RUN_STATE_FAILED, "PROMPT_TOO_LONG")
    assert not run.error.retryable
    assert 3000 < int(run.error.metadata["prompt_tokens"]) < 3100
    assert run.error.metadata["context_tokens"] == str(CONTEXT_TOKENS)
    assert run.error.metadata["prompt_tokens"] in run.error.message
    assert run.usage.prompt_tokens == 0  # nothing was decoded


def test_a_prompt_that_leaves_no_room_for_the_wanted_output_is_refused(client):
    run = ended(events(client.execute(goal("word " * 1500, max_output_tokens=1000))))
    assert run.error.reason == "PROMPT_TOO_LONG"
    assert run.error.metadata["max_output_tokens"] == "1000"


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ('{"type": "object", "properties": {"a": {"type": "wrong"}}}', "SCHEMA_INVALID"),
        ('{"type": "object", "if": {"required": ["a"]}}', "SCHEMA_UNSUPPORTED"),
    ],
)
def test_a_schema_that_can_not_be_enforced_is_refused(client, schema, reason):
    for fields in (
        {"tools": [pb.Tool(name="t", input_schema_json=schema)]},
        {"output_schema_json": schema},
    ):
        run = ended(events(client.execute(goal("Hello?", **fields))))
        assert (run.state, run.error.reason) == (run_pb.RUN_STATE_FAILED, reason)


def test_everything_wrong_with_a_request_is_said_at_once(client):
    spec = goal(
        "", tools=[pb.Tool(name="bad name", input_schema_json="[]")], output_schema_json="{"
    )
    with pytest.raises(grpc.RpcError) as refused:
        client.create(spec)
    problem = Problem(refused.value)
    assert problem.code is grpc.StatusCode.INVALID_ARGUMENT
    assert set(problem.fields) == {
        "spec.messages[0].parts",
        "spec.tools[0].name",
        "spec.tools[0].input_schema_json",
        "spec.output_schema_json",
    }


# --- time ---


def test_a_timeout_holds_during_the_load(engine_store):
    with running_daemon(engine_store) as daemon, Connection(daemon.api_socket) as client:
        run = ended(events(client.execute(goal("Hello?", timeout_s=0.05))))
        assert (run.state, run.error.reason) == (run_pb.RUN_STATE_EXPIRED, "RUN_TIMEOUT")
        assert run.error.retryable
        assert run.error.metadata == {"state": "LOADING", "timeout_s": "0.05"}
        daemon.wait_for("engine_loaded")  # whom else the load is for is not this run's to say
        run = ended(events(client.execute(goal("Hello?", max_output_tokens=2))))
        assert run.state == run_pb.RUN_STATE_SUCCEEDED


def test_a_timeout_holds_during_the_prefill(engine_store):
    config = f"{BASE_CONFIG}preload: [{ENGINE}]\n"  # nobody knows its pace: nothing is refused
    with running_daemon(engine_store, config) as daemon, Connection(daemon.api_socket) as client:
        daemon.wait_for("engine_loaded")
        began_s = time.monotonic()
        seen = list(events(client.execute(goal("word " * 1900, timeout_s=0.3))))
        took_s = time.monotonic() - began_s
        run = seen[-1].run_finished.run
        assert (run.state, run.error.reason) == (run_pb.RUN_STATE_EXPIRED, "RUN_TIMEOUT")
        assert "text_delta" not in kinds(seen)
        assert took_s < 3  # the prefill itself takes longer
        places_free(client)
        assert time.monotonic() - began_s < 6  # it was stopped, not merely left


# --- clients that vanish or do not read ---


def vanish(daemon, on_disconnect, tokens):
    """The id of a run whose client was killed while it read."""
    command = [
        sys.executable, "-c", VANISHING_CLIENT,
        str(daemon.api_socket), STORY, str(on_disconnect), str(tokens),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        run_id = process.stdout.readline().strip()
        process.send_signal(signal.SIGKILL)
    return run_id


def test_a_vanished_client_cancels_its_run(daemon, client):
    run = client.end_of(vanish(daemon, run_pb.ON_DISCONNECT_UNSPECIFIED, 1000))
    assert (run.state, run.error.reason) == (run_pb.RUN_STATE_CANCELLED, "CLIENT_DISCONNECTED")
    places_free(client)


def test_a_vanished_client_that_asked_for_it_leaves_its_run(daemon, client):
    run = client.end_of(vanish(daemon, run_pb.ON_DISCONNECT_CONTINUE, 60))
    assert run.state == run_pb.RUN_STATE_SUCCEEDED
    assert run.usage.completion_tokens > 20


def test_a_watcher_that_leaves_changes_nothing(daemon, client):
    made = client.create(goal(STORY, max_output_tokens=30))
    with Connection(daemon.api_socket) as watcher:
        first(watcher.watch(made.id), "text_delta")
    assert client.end_of(made.id).state == run_pb.RUN_STATE_SUCCEEDED


def test_a_reader_that_reads_nothing_loses_its_run_and_hurts_nobody(engine_store):
    config = f"runs: {{default_engine: {ENGINE}, slow_reader: 500ms}}\nworker: {{threads: 1}}\n"
    with (
        running_daemon(engine_store, config + PRELOAD) as daemon,
        Connection(daemon.api_socket, "stuck", NARROW) as stuck,
        Connection(daemon.api_socket, "other") as other,
        ThreadPoolExecutor(1) as pool,
    ):
        stream = stuck.execute(goal("Turn on the light.", tools=[LIGHT_ON], max_tool_calls=4))
        run_id = first(events(stream), "tool_calls_issued").run_id
        theirs = pool.submit(lambda: list(events(other.execute(goal(STORY, max_output_tokens=60)))))
        # Its prefill takes longer than a reader may take.
        other.submit(run_id, result("call-1", BULKY))
        line = next(
            line
            for count in itertools.count(1)
            if (line := daemon.wait_for("rpc_finished", count=count))["client"] == "stuck"
        )
        assert (line["code"], line["reason"]) == ("RESOURCE_EXHAUSTED", "SLOW_READER")
        with pytest.raises(grpc.RpcError) as broken:
            list(stream)
        problem = Problem(broken.value)
        assert (problem.code, problem.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "SLOW_READER",
        )
        run = other.end_of(run_id)
        assert (run.state, run.error.reason) == (run_pb.RUN_STATE_CANCELLED, "SLOW_READER")
        seen = theirs.result(CALL_TIMEOUT_S)
        assert text_of(seen) == seen[-1].run_finished.run.answer
        assert kinds(seen).count("text_delta") > 10


# --- many at once ---


def test_four_runs_are_decided_at_the_same_time(daemon):
    started = threading.Barrier(4)

    def follow(subject):
        with Connection(daemon.api_socket, subject) as client:
            started.wait(20)
            spec = goal(f"Write a very long story about {subject}.", max_output_tokens=40)
            stream = events(client.execute(spec))
            began = first(stream, "text_delta")
            began_s = time.monotonic()
            rest = list(stream)
            return began_s, time.monotonic(), [began, *rest]

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(follow, ("cats", "bread", "castles", "winter")))
    assert max(began_s for began_s, _, _ in outcomes) < min(end_s for _, end_s, _ in outcomes)
    for _, _, seen in outcomes:
        run = seen[-1].run_finished.run
        assert run.state == run_pb.RUN_STATE_SUCCEEDED
        assert text_of(seen) == run.answer
    assert len({seen[-1].run_finished.run.answer for _, _, seen in outcomes}) == 4


def test_more_runs_than_places_wait_their_turn(daemon):
    with Connection(daemon.api_socket, "many") as client:
        made = [client.create(goal(f"Say {n}.", max_output_tokens=8)).id for n in range(10)]
        runs = [client.end_of(run_id) for run_id in made]
    assert {run.state for run in runs} == {run_pb.RUN_STATE_SUCCEEDED}
    assert sum(run.usage.queue_time.ToTimedelta().total_seconds() > 0.05 for run in runs) >= 4
