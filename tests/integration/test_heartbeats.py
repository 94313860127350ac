"""Heartbeats over gRPC: a client that hangs with its socket open, and both clients' own beats."""

import asyncio
import signal
from typing import Any

import grpc
import pytest

from edge_agent.client import AsyncClient, Client
from edge_agent.core import RunState
from edge_agent.errors import FailedPrecondition, Unavailable
from edge_agent.heartbeat import Heartbeat
from edge_agent.v1 import run_service_pb2 as run_pb
from tests.support.api_ports import EdgeThread
from tests.support.connection import CALL_TIMEOUT_S, Connection, Problem, duration, goal
from tests.support.daemon import BASE_CONFIG, ENGINE, running_daemon

CONFIG = f"{BASE_CONFIG}preload: [{ENGINE}]\n"
STORY = "Write a very long story about a robot."
ASKED = Heartbeat(0.3, suspend_after_s=5.0, cancel_after_s=20.0)


@pytest.fixture(scope="module")
def daemon(engine_store):
    with running_daemon(engine_store, CONFIG) as running:
        yield running


@pytest.fixture
def edge(tmp_path):
    with EdgeThread(tmp_path) as running:
        yield running


def beat(client: Connection, nonce: int = 0, **fields: Any) -> int:
    request = run_pb.BeatRequest(nonce=nonce, **fields)
    return client.runs.Beat(request, timeout=CALL_TIMEOUT_S).nonce


def test_a_client_that_hangs_with_its_socket_open_has_its_durable_run_suspended(daemon):
    with Connection(daemon.api_socket, "hangs") as client:
        run_id = client.create(goal(STORY, durable=True, max_output_tokens=1000)).id
        stream = client.watch(run_id)
        nonce = beat(client, window=duration(1.0), suspend_after=duration(0.05))
        beat(client, nonce)
        suspended = next(
            event.state_changed
            for event in stream
            if event.state_changed.state == run_pb.RUN_STATE_SUSPENDED
        )
        assert suspended.cause.reason == "HEARTBEAT_LAPSED"
        run = client.get(run_id)
    assert (run.state, run.error.reason) == (run_pb.RUN_STATE_SUSPENDED, "HEARTBEAT_LAPSED")
    assert run.error.metadata["client"] == "hangs"
    lines = [line for line in daemon.lines("client_lapsed") if line["client"] == "hangs"]
    assert [(line["lapse"], line["runs"]) for line in lines] == [
        ("NOTICED", None),
        ("SUSPENDED", 1),
    ]


def test_a_beat_that_is_repeated_is_refused_with_what_was_expected(daemon):
    with Connection(daemon.api_socket, "repeats") as client:
        first = beat(client, window=duration(60), cancel_after=duration(60))
        second = beat(client, first)
        with pytest.raises(grpc.RpcError) as error:
            beat(client, first)
        problem = Problem(error.value)
        assert problem.code is grpc.StatusCode.FAILED_PRECONDITION
        assert (problem.reason, problem.metadata["expected"]) == ("BEAT_OUT_OF_TURN", str(second))
        assert client.runs.Beat(run_pb.BeatRequest(nonce=second, stop=True)).nonce == 0


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({}, ["window", "suspend_after"]),
        ({"window": 1.0}, ["suspend_after"]),
        ({"suspend_after": 1.0}, ["window"]),
        ({"window": 0.05, "suspend_after": 1.0}, ["window"]),
        ({"window": 3601.0, "suspend_after": 1.0}, ["window"]),
        ({"window": 1.0, "suspend_after": 0.0}, ["suspend_after"]),
        ({"window": 1.0, "cancel_after": 86401.0}, ["cancel_after"]),
        ({"window": 1.0, "suspend_after": 2.0, "cancel_after": 2.0}, ["cancel_after"]),
        ({"nonce": 1, "window": 1.0}, ["window"]),
        ({"stop": True, "cancel_after": 1.0}, ["cancel_after"]),
    ],
)
def test_what_is_wrong_with_a_beat_is_named(edge, fields, wrong):
    durations = {key: duration(s) for key, s in fields.items() if isinstance(s, float)}
    request = run_pb.BeatRequest(**{**fields, **durations})
    with Connection(edge.api) as client, pytest.raises(grpc.RpcError) as error:
        client.runs.Beat(request, timeout=CALL_TIMEOUT_S)
    problem = Problem(error.value)
    assert (problem.reason, list(problem.fields)) == ("INVALID_REQUEST", wrong)
    assert edge.runs.beats == []


def beat_sync(edge: EdgeThread, name: str = "robot") -> None:
    with (
        Client(edge.api, name=name) as client,
        client.heartbeat(
            ASKED.window_s,
            suspend_after_s=ASKED.suspend_after_s,
            cancel_after_s=ASKED.cancel_after_s,
            session="patrol",
        ),
    ):
        edge.until(lambda: len(edge.runs.beats) >= 3)


def beat_async(edge: EdgeThread, name: str = "robot") -> None:
    async def main() -> None:
        async with (
            AsyncClient(edge.api, name=name) as client,
            client.heartbeat(
                ASKED.window_s,
                suspend_after_s=ASKED.suspend_after_s,
                cancel_after_s=ASKED.cancel_after_s,
                session="patrol",
            ),
        ):
            await asyncio.to_thread(edge.until, lambda: len(edge.runs.beats) >= 3)

    asyncio.run(main())


BOTH = pytest.mark.parametrize("keep_beating", [beat_sync, beat_async])


@BOTH
def test_a_client_beats_with_the_nonce_of_the_last_answer_and_stops_at_the_end(edge, keep_beating):
    keep_beating(edge)
    client, session, nonces, asked, stops = zip(*edge.runs.beats, strict=True)
    assert (set(client), set(session)) == ({"robot"}, {"patrol"})
    assert nonces == tuple(range(len(nonces)))
    assert asked == (ASKED, *[None] * (len(asked) - 1))
    assert stops == (*[False] * (len(stops) - 1), True)


@BOTH
def test_a_client_whose_beat_is_out_of_turn_begins_anew(edge, keep_beating):
    refused: list[int] = []
    take = edge.runs.beat

    def lose_the_second(client, session, nonce, heartbeat, *, stop):
        if nonce and not refused:
            refused.append(nonce)
            raise FailedPrecondition("out of turn", reason="BEAT_OUT_OF_TURN")
        return take(client, session, nonce, heartbeat, stop=stop)

    edge.runs.beat = lose_the_second
    keep_beating(edge)
    assert [(nonce, asked) for _, _, nonce, asked, _ in edge.runs.beats][:2] == [
        (0, ASKED),
        (0, ASKED),
    ]
    assert refused == [1]


@BOTH
def test_a_first_beat_that_is_refused_is_raised(edge, keep_beating):
    def refuse(client, session, nonce, heartbeat, *, stop):
        raise Unavailable("the daemon is stopping", reason="DAEMON_DRAINING")

    edge.runs.beat = refuse
    with pytest.raises(Unavailable):
        keep_beating(edge)


def test_a_client_that_beats_is_left_alone(daemon):
    with Client(str(daemon.api_socket), name="beats") as client:
        run = client.create(STORY, durable=True, max_output_tokens=150)
        with client.heartbeat(1.0, suspend_after_s=0.01):
            assert list(client.watch(run.id))
        assert client.get(run.id).state is RunState.SUCCEEDED
        with pytest.raises(FailedPrecondition) as left:
            client.beat(1)
    assert left.value.metadata["expected"] == "0"


def test_a_heartbeat_outlives_its_daemon_and_the_next_one_watches_it_anew(engine_store):
    with (
        running_daemon(engine_store) as daemon,
        Client(str(daemon.api_socket), name="stays") as client,
        client.heartbeat(0.3, cancel_after_s=60.0),
    ):
        daemon.wait_for("client_watched")
        daemon.stop(signal.SIGKILL)
        daemon.restart()
        assert daemon.wait_for("client_watched")["client"] == "stays"
