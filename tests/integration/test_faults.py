"""What breaks stays where it broke: killed, hung and broken workers, and a killed daemon."""

import os
import signal

import grpc
import pytest

from edge_agent.v1 import engine_service_pb2 as engine_pb
from edge_agent.v1 import run_service_pb2 as run_pb
from edge_agent.v1 import system_service_pb2 as system_pb
from tests.support.connection import Connection, Problem, events, first, goal, text_of
from tests.support.daemon import BASE_CONFIG, ENGINE, running_daemon
from tests.support.engine_files import copy_engine
from tests.support.processes import is_gone, wait_gone

STORY = "Write a very long story about a robot."
TWO = (
    "runs: {default_engine: left}\npreload: [left, right]\n"
    "scheduling: {max_resident_engines: 2}\nworker: {threads: 1}\n"
)


@pytest.fixture(scope="module")
def two_engines(tmp_path_factory, engine_store):
    """A store with the same engine under two names."""
    store = tmp_path_factory.mktemp("engines")
    for name in ("left", "right"):
        copy_engine(engine_store / ENGINE, store, name)
    return store


def engine_of(client, name):
    request = engine_pb.GetEngineRequest(name=name)
    return client.engines.GetEngine(request, timeout=20).engine


def test_a_killed_worker_takes_only_its_own_runs_with_it(two_engines):
    with (
        running_daemon(two_engines, TWO) as daemon,
        Connection(daemon.api_socket) as client,
        Connection(daemon.api_socket) as other,
    ):
        daemon.wait_for("engine_loaded", count=2)
        left = events(client.execute(goal(STORY, engine="left", max_output_tokens=1000)))
        right = events(other.execute(goal(STORY, engine="right", max_output_tokens=50)))
        first(left, "text_delta")
        begun = first(right, "text_delta")
        worker, untouched = (engine_of(client, name).worker.pid for name in ("left", "right"))

        os.kill(worker, signal.SIGKILL)

        run = list(left)[-1].run_finished.run
        assert (run.state, run.error.reason) == (run_pb.RUN_STATE_FAILED, "WORKER_LOST")
        assert run.error.retryable
        assert run.error.metadata == {"engine": "left", "pid": str(worker)}
        rest = list(right)
        assert rest[-1].run_finished.run.state == run_pb.RUN_STATE_SUCCEEDED
        assert text_of([begun, *rest]) == rest[-1].run_finished.run.answer
        assert daemon.wait_for("worker_lost")["pid"] == worker
        assert wait_gone(worker)
        assert daemon.process.poll() is None

        again = client.end_of(client.create(goal("Hello?", engine="left", max_output_tokens=2)).id)
        assert again.state == run_pb.RUN_STATE_SUCCEEDED
        assert engine_of(client, "left").worker.pid not in {0, worker}
        assert engine_of(client, "right").worker.pid == untouched


def test_an_idle_worker_that_is_killed_is_reported_and_loaded_anew(engine_store):
    with (
        running_daemon(engine_store, BASE_CONFIG + f"preload: [{ENGINE}]\n") as daemon,
        Connection(daemon.api_socket) as client,
    ):
        daemon.wait_for("engine_loaded")
        worker = engine_of(client, ENGINE).worker.pid
        watching = client.engines.WatchEngines(engine_pb.WatchEnginesRequest(), timeout=20)
        assert next(watching).engine.state == engine_pb.ENGINE_STATE_READY
        os.kill(worker, signal.SIGKILL)
        lost = next(watching).engine
        assert lost.state == engine_pb.ENGINE_STATE_FAILED
        assert lost.error.reason == "WORKER_LOST"
        run = client.end_of(client.create(goal("Hello?", max_output_tokens=2)).id)
        assert run.state == run_pb.RUN_STATE_SUCCEEDED
        ready = engine_of(client, ENGINE)
        assert (ready.state, ready.HasField("error")) == (engine_pb.ENGINE_STATE_READY, False)


def test_a_hung_worker_is_killed_and_its_runs_fail(engine_store):
    config = (
        f"runs: {{default_engine: {ENGINE}}}\npreload: [{ENGINE}]\n"
        "worker: {threads: 1, heartbeat_interval: 200ms, heartbeat_timeout: 2s}\n"
    )
    with (
        running_daemon(engine_store, config) as daemon,
        Connection(daemon.api_socket) as client,
    ):
        daemon.wait_for("engine_loaded")
        stream = events(client.execute(goal(STORY, max_output_tokens=1000)))
        first(stream, "text_delta")
        worker = engine_of(client, ENGINE).worker.pid
        os.kill(worker, signal.SIGSTOP)
        run = list(stream)[-1].run_finished.run
        assert (run.state, run.error.reason) == (run_pb.RUN_STATE_FAILED, "WORKER_HUNG")
        assert run.error.retryable
        assert wait_gone(worker)


def test_a_worker_killed_twice_during_its_load_fails_its_runs_for_want_of_memory(
    engine_store, tmp_path
):
    gate, python = tmp_path / "gate", tmp_path / "python"
    os.mkfifo(gate)
    python.write_text(f'#!/bin/sh\necho $$ >"{gate}"\nexec sleep 60\n')
    python.chmod(0o755)
    config = f"runs: {{default_engine: {ENGINE}}}\nworker: {{python: {{llama_cpp: {python}}}}}\n"
    with running_daemon(engine_store, config) as daemon, Connection(daemon.api_socket) as client:
        made = client.create(goal("Hello?"))
        os.kill(int(gate.read_text()), signal.SIGKILL)  # as the kernel does when memory is short
        os.kill(int(gate.read_text()), signal.SIGKILL)
        run = client.end_of(made.id)
        assert run.state == run_pb.RUN_STATE_FAILED
        assert run.error.reason == "OUT_OF_MEMORY"
        assert int(run.error.metadata["needed_bytes"]) >= 630_000_000
        assert int(run.error.metadata["available_bytes"]) > 0
        assert engine_of(client, ENGINE).state == engine_pb.ENGINE_STATE_FAILED


def test_a_worker_python_that_is_not_there_is_named(engine_store):
    config = (
        f"runs: {{default_engine: {ENGINE}}}\nworker: {{python: {{llama_cpp: /nowhere/python}}}}\n"
    )
    with running_daemon(engine_store, config) as daemon, Connection(daemon.api_socket) as client:
        run = client.end_of(client.create(goal("Hello?")).id)
        assert run.error.reason == "ENGINE_LOAD_FAILED"
        assert run.error.metadata["python"] == "/nowhere/python"


def test_files_that_changed_size_are_refused_before_a_load(tmp_path, engine_store):
    copy_engine(engine_store / ENGINE, tmp_path, ENGINE)
    model = next((tmp_path / ENGINE).glob("*.gguf"))
    model.unlink()
    model.write_bytes(b"GGUF, but not much of it")
    with running_daemon(tmp_path) as daemon, Connection(daemon.api_socket) as client:
        run = client.end_of(client.create(goal("Hello?")).id)
        assert (run.state, run.error.reason) == (run_pb.RUN_STATE_FAILED, "ENGINE_FILES_WRONG")
        assert not run.error.retryable


def test_the_engine_used_longest_ago_makes_room(two_engines):
    config = BASE_CONFIG.replace(ENGINE, "left") + (
        "scheduling: {max_resident_engines: 1, min_residency: 100ms}\n"
    )
    with running_daemon(two_engines, config) as daemon, Connection(daemon.api_socket) as client:
        pids: dict[str, int] = {}
        for name in ("left", "right", "left"):
            spec = goal("Hello?", engine=name, max_output_tokens=2)
            assert client.end_of(client.create(spec).id).state == run_pb.RUN_STATE_SUCCEEDED
            pid = engine_of(client, name).worker.pid
            assert all(is_gone(earlier) for earlier in pids.values())
            pids[name] = pid
        told = client.system.GetStatus(system_pb.GetStatusRequest(), timeout=20)
        assert (told.engines_loaded, told.engines_installed) == (1, 2)


def test_a_killed_daemon_forgets_runs_and_keeps_halts(engine_store):
    with running_daemon(engine_store, BASE_CONFIG + f"preload: [{ENGINE}]\n") as daemon:
        daemon.wait_for("engine_loaded")
        with Connection(daemon.api_socket) as client:
            stream = events(client.execute(goal(STORY, max_output_tokens=1000)))
            run_id = first(stream, "text_delta").run_id
            halt = client.halt(run_pb.HALT_SCOPE_AGENT, "patrol", "a person in the way").halt
            daemon.stop(signal.SIGKILL)
            with pytest.raises(grpc.RpcError) as broken:
                list(stream)
            assert Problem(broken.value).code is grpc.StatusCode.UNAVAILABLE
        daemon.restart()
        with Connection(daemon.api_socket) as client:
            told = client.system.GetStatus(system_pb.GetStatusRequest(), timeout=20)
            assert list(told.halts) == [halt]
            with pytest.raises(grpc.RpcError) as refused:
                client.create(goal("Hello?", agent="patrol"))
            assert Problem(refused.value).metadata["halt_id"] == halt.halt_id
            with pytest.raises(grpc.RpcError) as refused:
                client.get(run_id)
            assert Problem(refused.value).reason == "RUN_NOT_FOUND"
