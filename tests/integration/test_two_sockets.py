"""What each socket serves, and engines through their loads and unloads."""

import json
import os
import signal

import grpc
import pytest

from edge_agent.v1 import engine_service_pb2 as engine_pb
from edge_agent.v1 import run_service_pb2 as run_pb
from edge_agent.v1 import system_service_pb2 as system_pb
from tests.support.connection import Connection, Problem, events, first, goal
from tests.support.daemon import BASE_CONFIG, ENGINE, running_daemon
from tests.support.processes import is_gone

STORY = "Write a very long story about a robot."
ADMIN_CALLS = {
    "LoadEngine": lambda c: c.engines.LoadEngine(engine_pb.LoadEngineRequest(name=ENGINE)),
    "UnloadEngine": lambda c: c.engines.UnloadEngine(engine_pb.UnloadEngineRequest(name=ENGINE)),
    "PinEngine": lambda c: c.engines.PinEngine(engine_pb.PinEngineRequest(name=ENGINE)),
    "ReleaseEngine": lambda c: c.engines.ReleaseEngine(engine_pb.ReleaseEngineRequest(name=ENGINE)),
    "ReloadConfig": lambda c: c.system.ReloadConfig(system_pb.ReloadConfigRequest()),
    "Drain": lambda c: c.system.Drain(system_pb.DrainRequest()),
}


@pytest.fixture
def daemon(engine_store):
    with running_daemon(engine_store) as running:
        yield running


@pytest.fixture
def client(daemon):
    with Connection(daemon.api_socket) as connection:
        yield connection


@pytest.fixture
def admin(daemon):
    with Connection(daemon.admin_socket, "operator") as connection:
        yield connection


def load(admin, name=ENGINE):
    return admin.engines.LoadEngine(engine_pb.LoadEngineRequest(name=name), timeout=30).engine


def unload(admin, name=ENGINE):
    return admin.engines.UnloadEngine(engine_pb.UnloadEngineRequest(name=name), timeout=30).engine


def test_what_changes_the_daemon_is_refused_on_the_api_socket(client):
    for name, call in ADMIN_CALLS.items():
        with pytest.raises(grpc.RpcError) as refused:
            call(client)
        problem = Problem(refused.value)
        assert problem.code is grpc.StatusCode.PERMISSION_DENIED
        assert problem.reason == "ADMIN_SOCKET_REQUIRED"
        assert problem.metadata["method"].endswith(f"/{name}")
    told = client.system.GetStatus(system_pb.GetStatusRequest(), timeout=20)
    assert (told.state, told.engines_loaded) == (system_pb.DAEMON_STATE_READY, 0)


def test_whoever_may_start_runs_may_ask_why_they_wait(client):
    assert list(client.engines.Explain(engine_pb.ExplainRequest(), timeout=20).waits) == []


def test_the_admin_socket_serves_runs_too(admin):
    made = admin.create(goal("Hello?", max_output_tokens=2))
    assert made.client == "operator"
    assert admin.end_of(made.id).state == run_pb.RUN_STATE_SUCCEEDED


def test_an_engine_is_watched_through_load_and_unload(engine_store, client, admin):
    manifest = json.loads((engine_store / ENGINE / "manifest.json").read_bytes())
    watching = client.engines.WatchEngines(engine_pb.WatchEnginesRequest(), timeout=30)
    installed = next(watching).engine
    assert (installed.name, installed.state) == (ENGINE, engine_pb.ENGINE_STATE_INSTALLED)
    assert not installed.HasField("worker")
    assert installed.context_tokens == manifest["context_tokens"]
    assert installed.backend == manifest["backend"]["name"]

    ready = load(admin)
    assert ready.state == engine_pb.ENGINE_STATE_READY
    assert ready.worker.slots == manifest["slots"]
    assert ready.worker.load_time.ToTimedelta().total_seconds() > 0
    pid = ready.worker.pid
    assert not is_gone(pid)
    assert load(admin) == ready  # once is enough

    gone = unload(admin)
    assert is_gone(pid)  # not merely asked to go
    assert gone.state == engine_pb.ENGINE_STATE_INSTALLED
    assert unload(admin) == gone

    states = [installed.state]
    for response in watching:
        if response.engine.state != states[-1]:
            states.append(response.engine.state)
        if response.engine.state == engine_pb.ENGINE_STATE_INSTALLED:
            break
    assert states[:3] == [
        engine_pb.ENGINE_STATE_INSTALLED,
        engine_pb.ENGINE_STATE_LOADING,
        engine_pb.ENGINE_STATE_READY,
    ]
    assert client.engines.GetEngine(engine_pb.GetEngineRequest(name=ENGINE)).engine == gone
    assert list(client.engines.ListEngines(engine_pb.ListEnginesRequest()).engines) == [gone]


def test_a_worker_that_does_not_go_is_killed_before_an_unload_is_told(daemon, admin):
    daemon.configure(f"{BASE_CONFIG}scheduling: {{unload_timeout: 1s}}\n")
    admin.system.ReloadConfig(system_pb.ReloadConfigRequest(), timeout=20)
    pid = load(admin).worker.pid
    os.kill(pid, signal.SIGSTOP)
    assert unload(admin).state == engine_pb.ENGINE_STATE_INSTALLED
    assert is_gone(pid)


def test_a_busy_engine_is_not_unloaded(client, admin):
    stream = events(client.execute(goal(STORY, max_output_tokens=1000)))
    run_id = first(stream, "text_delta").run_id
    with pytest.raises(grpc.RpcError) as refused:
        unload(admin)
    problem = Problem(refused.value)
    assert problem.code is grpc.StatusCode.FAILED_PRECONDITION
    assert problem.reason == "ENGINE_BUSY"
    assert problem.metadata == {"engine": ENGINE, "active_steps": "1", "waiting_steps": "0"}
    assert client.get(run_id).state == run_pb.RUN_STATE_RUNNING


def test_an_unknown_engine_is_neither_loaded_nor_unloaded(admin):
    for call in (load, unload):
        with pytest.raises(grpc.RpcError) as refused:
            call(admin, "nobody")
        assert Problem(refused.value).reason == "ENGINE_NOT_FOUND"


def test_a_reload_says_what_needs_a_restart(daemon, client, admin):
    daemon.configure(f"{BASE_CONFIG}preload: [{ENGINE}]\nshutdown: {{grace: 1s}}\n")
    answer = admin.system.ReloadConfig(system_pb.ReloadConfigRequest(), timeout=20)
    assert answer.needs_restart == ["preload"]
    daemon.configure("runs: {max_stepz: 1}\n")
    with pytest.raises(grpc.RpcError) as refused:
        admin.system.ReloadConfig(system_pb.ReloadConfigRequest(), timeout=20)
    problem = Problem(refused.value)
    assert problem.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(problem.fields) == ["runs.max_stepz"]
    told = client.system.GetStatus(system_pb.GetStatusRequest(), timeout=20)
    assert told.state == system_pb.DAEMON_STATE_DEGRADED


def test_drain_refuses_new_runs_and_lets_the_others_finish(client, admin):
    stream = events(client.execute(goal(STORY, max_output_tokens=20)))
    first(stream, "text_delta")
    admin.system.Drain(system_pb.DrainRequest(), timeout=20)
    with pytest.raises(grpc.RpcError) as refused:
        client.create(goal("Hello?"))
    assert Problem(refused.value).reason == "DAEMON_DRAINING"
    assert list(stream)[-1].run_finished.run.state == run_pb.RUN_STATE_SUCCEEDED
    told = client.system.GetStatus(system_pb.GetStatusRequest(), timeout=20)
    assert told.state == system_pb.DAEMON_STATE_DRAINING
