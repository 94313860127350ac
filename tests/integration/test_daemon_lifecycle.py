"""A daemon from its start to its end: readiness, signals, configuration, what it leaves behind."""

import itertools
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import (  # type: ignore[import-untyped]
    reflection_pb2,
    reflection_pb2_grpc,
)

from edge_agent.v1 import engine_service_pb2 as engine_pb
from edge_agent.v1 import run_service_pb2 as run_pb
from edge_agent.v1 import system_service_pb2 as system_pb
from edge_agent.v1 import types_pb2 as pb
from tests.support.connection import Connection, Problem, events, first, goal, kinds, result
from tests.support.daemon import BASE_CONFIG, ENGINE, running_daemon
from tests.support.notify import NotifySocket
from tests.support.processes import children, is_gone, wait_gone

PRELOAD = f"preload: [{ENGINE}]\n"
WATCHDOG_S = 1.5
LONG_STORY = "Write a very long story about a robot."
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LIGHT_ON = pb.Tool(
    name="light_on",
    description="Turn the light on.",
    examples=[pb.ToolExample(goal="Turn on the light.", arguments_json="{}")],
)
"""A tool without arguments: the model calls it when it is asked to."""


def status(client: Connection) -> system_pb.GetStatusResponse:
    return client.system.GetStatus(system_pb.GetStatusRequest(), timeout=10)


def worker_pid(client: Connection) -> int:
    engine = client.engines.GetEngine(engine_pb.GetEngineRequest(name=ENGINE), timeout=10).engine
    return engine.worker.pid


def waiting_for_a_tool(client: Connection) -> tuple[str, Iterator[run_pb.RunEvent]]:
    """A run that waits for `call-1` until somebody submits its result, and its stream."""
    stream = events(client.execute(goal("Turn on the light.", tools=[LIGHT_ON], max_tool_calls=1)))
    issued = first(stream, "tool_calls_issued")
    return issued.run_id, stream


# --- what the service manager is told ---


@contextmanager
def held_back_worker(directory: Path) -> Iterator[tuple[Path, Path]]:
    """A `worker.python` that starts its worker only once something is written into the gate."""
    gate, python = directory / "gate", directory / "python"
    os.mkfifo(gate)
    python.write_text(f'#!/bin/sh\nread line <"{gate}"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    yield python, gate


def test_ready_comes_before_any_engine_is_loaded(tmp_path, engine_store):
    with NotifySocket(tmp_path / "notify") as notify, held_back_worker(tmp_path) as (python, gate):
        config = f"{PRELOAD}worker: {{threads: 1, python: {{llama_cpp: {python}}}}}\n"
        environ = {"NOTIFY_SOCKET": str(notify.path)}
        with running_daemon(engine_store, config, environ) as daemon:
            ready = notify.next("READY")
            assert ready is not None
            assert ready.assignments == {"READY": "1", "STATUS": "ready: accepting runs"}
            with Connection(daemon.api_socket) as client:
                assert status(client).runs == {}  # it answers while the engine can't be loaded
                assert daemon.lines("engine_loaded") == []
                gate.write_text("go\n")
                daemon.wait_for("engine_loaded")


def test_an_abstract_notify_socket_is_told_too(tmp_path, engine_store):
    name = f"edge-agent-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0{name}")
        receiver.settimeout(20)
        with running_daemon(engine_store, environ={"NOTIFY_SOCKET": f"@{name}"}):
            assert b"READY=1" in receiver.recv(4096)


def test_stopping_is_announced_with_the_time_it_takes(tmp_path, engine_store):
    with NotifySocket(tmp_path / "notify") as notify:
        environ = {"NOTIFY_SOCKET": str(notify.path)}
        with running_daemon(engine_store, BASE_CONFIG, environ) as daemon:
            assert notify.next("READY") is not None
            assert daemon.stop() == 0
            stopping = notify.next("STOPPING")
            assert stopping is not None
            assert stopping.assignments["STATUS"] == "draining: no new runs"
            extended = notify.next("EXTEND_TIMEOUT_USEC")
            assert extended is not None
            assert int(extended.assignments["EXTEND_TIMEOUT_USEC"]) > 20e6  # the grace


def test_the_watchdog_is_fed_twice_an_interval_and_not_by_a_stopped_daemon(tmp_path, engine_store):
    with NotifySocket(tmp_path / "notify") as notify:
        environ = {
            "NOTIFY_SOCKET": str(notify.path),
            "WATCHDOG_USEC": str(round(WATCHDOG_S * 1e6)),
        }
        with running_daemon(engine_store, environ=environ) as daemon:
            fed = [notify.next("WATCHDOG") for _ in range(5)]
            times_s = [notice.at_s for notice in fed if notice is not None]
            assert len(times_s) == 5
            gaps_s = [later - earlier for earlier, later in itertools.pairwise(times_s)]
            assert max(gaps_s) < WATCHDOG_S / 2
            daemon.process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, daemon.process.pid, os.WSTOPPED | os.WNOWAIT)
            notify.drop_waiting()
            assert notify.next("WATCHDOG", timeout_s=WATCHDOG_S) is None
            daemon.process.send_signal(signal.SIGCONT)
            assert notify.next("WATCHDOG") is not None


def test_a_watchdog_of_another_process_is_not_fed(tmp_path, engine_store):
    with NotifySocket(tmp_path / "notify") as notify:
        environ = {
            "NOTIFY_SOCKET": str(notify.path),
            "WATCHDOG_USEC": "300000",
            "WATCHDOG_PID": str(os.getpid()),
        }
        with running_daemon(engine_store, environ=environ) as daemon:
            assert notify.next("READY") is not None
            assert daemon.stop() == 0
            assert notify.next("WATCHDOG", timeout_s=0.1) is None


# --- sockets ---


def test_the_sockets_admit_who_they_are_for(engine_store):
    with running_daemon(engine_store) as daemon:
        modes = {
            path.name: stat.S_IMODE(path.stat().st_mode)
            for path in (daemon.api_socket, daemon.admin_socket)
        }
        assert modes == {"api.sock": 0o660, "admin.sock": 0o600}
        assert stat.S_IMODE(daemon.state_dir.stat().st_mode) == 0o700


def test_a_second_daemon_on_the_same_runtime_directory_is_refused(engine_store):
    with running_daemon(engine_store) as daemon:
        second = subprocess.run(
            daemon.command, capture_output=True, text=True, timeout=30, check=False
        )
        assert second.returncode == 1
        assert f"another edge-agent daemon (pid {daemon.process.pid})" in second.stderr
        with Connection(daemon.api_socket) as client:
            assert status(client).pid == daemon.process.pid


def test_sockets_of_a_killed_daemon_are_replaced(engine_store):
    with running_daemon(engine_store) as daemon:
        daemon.stop(signal.SIGKILL)
        assert daemon.api_socket.exists()
        daemon.restart()
        with Connection(daemon.api_socket) as client, Connection(daemon.admin_socket) as admin:
            assert status(client).pid == status(admin).pid == daemon.process.pid


def test_what_is_no_socket_is_left_alone(engine_store):
    with running_daemon(engine_store) as daemon:
        assert daemon.stop() == 0
        daemon.api_socket.unlink(missing_ok=True)
        daemon.api_socket.write_text("somebody's file")
        refused = subprocess.run(
            daemon.command, capture_output=True, text=True, timeout=30, check=False
        )
        assert refused.returncode == 1
        assert "is in the way and is no socket" in refused.stderr
        assert daemon.api_socket.read_text() == "somebody's file"


def test_reflection_lists_every_service_on_both_sockets(engine_store):
    with running_daemon(engine_store) as daemon:
        for path in (daemon.api_socket, daemon.admin_socket):
            with Connection(path) as client:
                stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
                request = reflection_pb2.ServerReflectionRequest(list_services="")
                answer = next(stub.ServerReflectionInfo(iter([request]), timeout=10))
            assert {service.name for service in answer.list_services_response.service} == {
                "edge_agent.v1.EngineService",
                "edge_agent.v1.RunService",
                "edge_agent.v1.SystemService",
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
            }


# --- SIGTERM ---


def test_sigterm_lets_a_run_finish_and_refuses_new_ones(engine_store):
    with running_daemon(engine_store, BASE_CONFIG + PRELOAD) as daemon:
        daemon.wait_for("engine_loaded")
        with Connection(daemon.api_socket) as client:
            watching = client.health.Watch(health_pb2.HealthCheckRequest(), timeout=30)
            assert next(watching).status == SERVING
            run_id, stream = waiting_for_a_tool(client)
            pid = worker_pid(client)
            daemon.process.send_signal(signal.SIGTERM)
            daemon.wait_for("daemon_draining")
            assert next(watching).status == NOT_SERVING
            with Connection(daemon.api_socket) as late, pytest.raises(grpc.RpcError) as refused:
                late.create(goal("Hello?"))
            problem = Problem(refused.value)
            assert problem.code is grpc.StatusCode.UNAVAILABLE
            assert problem.reason == "DAEMON_DRAINING"
            assert problem.retry.retry_delay.seconds > 0
            assert status(client).state == system_pb.DAEMON_STATE_DRAINING
            client.submit(run_id, result("call-1", "The light is on."))
            last = list(stream)[-1]
            assert last.run_finished.run.state == run_pb.RUN_STATE_SUCCEEDED
            assert daemon.process.wait(20) == 0
        assert is_gone(pid)


def test_a_run_longer_than_the_grace_ends_with_a_final_event(engine_store):
    config = BASE_CONFIG + PRELOAD + "shutdown: {grace: 200ms}\n"
    with running_daemon(engine_store, config) as daemon:
        daemon.wait_for("engine_loaded")
        with Connection(daemon.api_socket) as client:
            stream = events(client.execute(goal(LONG_STORY, max_output_tokens=1000)))
            first(stream, "text_delta")
            workers = children(daemon.process.pid)
            daemon.process.send_signal(signal.SIGTERM)
            run = list(stream)[-1].run_finished.run
            assert (run.state, run.error.reason) == (run_pb.RUN_STATE_FAILED, "DAEMON_STOPPING")
            assert run.error.retryable
            assert daemon.process.wait(20) == 0
        assert len(workers) == 1
        assert is_gone(workers[0])
        assert daemon.lines("worker_lost") == []  # an unload is no loss


def test_a_second_sigterm_cuts_the_grace_short(engine_store):
    config = BASE_CONFIG + PRELOAD + "shutdown: {grace: 10m}\n"
    with running_daemon(engine_store, config) as daemon:
        daemon.wait_for("engine_loaded")
        with Connection(daemon.api_socket) as client:
            stream = events(client.execute(goal(LONG_STORY, max_output_tokens=1000)))
            first(stream, "text_delta")
            daemon.process.send_signal(signal.SIGTERM)
            daemon.wait_for("daemon_draining")
            daemon.process.send_signal(signal.SIGTERM)
            assert list(stream)[-1].run_finished.run.error.reason == "DAEMON_STOPPING"
            assert daemon.process.wait(20) == 0


def test_sigterm_during_a_load_ends_the_worker(tmp_path, engine_store):
    with held_back_worker(tmp_path) as (python, gate):
        config = (
            f"{PRELOAD}worker: {{threads: 1, python: {{llama_cpp: {python}}}}}\n"
            "scheduling: {unload_timeout: 1s}\n"
        )
        with running_daemon(engine_store, config) as daemon, gate.open("w"):
            # The gate opens on this side once the worker waits on the other.
            workers = children(daemon.process.pid)
            assert daemon.stop() == 0
            assert workers
            assert all(is_gone(pid) for pid in workers)


def test_kill_9_of_the_daemon_ends_its_workers(engine_store):
    with running_daemon(engine_store, BASE_CONFIG + PRELOAD) as daemon:
        daemon.wait_for("engine_loaded")
        with Connection(daemon.api_socket) as client:
            stream = client.execute(goal(LONG_STORY, max_output_tokens=1000))
            first(events(stream), "text_delta")
            pid = worker_pid(client)
            daemon.process.kill()
            assert wait_gone(pid)


# --- configuration ---


def test_sighup_applies_changed_values(tmp_path, engine_store):
    with NotifySocket(tmp_path / "notify") as notify:
        environ = {"NOTIFY_SOCKET": str(notify.path)}
        with (
            running_daemon(engine_store, environ=environ) as daemon,
            Connection(daemon.api_socket) as client,
        ):
            assert notify.next("READY") is not None
            daemon.configure(
                f"runs: {{default_engine: {ENGINE}, max_steps: 3}}\nlog: {{level: debug}}\n"
            )
            daemon.process.send_signal(signal.SIGHUP)
            daemon.wait_for("config_reloaded")
            reloading = notify.next("RELOADING")
            assert reloading is not None
            assert int(reloading.assignments["MONOTONIC_USEC"]) < reloading.at_s * 1e6
            assert notify.next("READY") is not None
            with pytest.raises(grpc.RpcError) as refused:
                client.create(goal("Hello?", max_steps=4))
            assert Problem(refused.value).fields == {"spec.limits.max_steps": "4 is not in 1 to 3"}
            client.health.Check(health_pb2.HealthCheckRequest(), timeout=10)
            line = daemon.wait_for("rpc_finished", count=2)  # health is logged at debug only
            assert (line["level"], line["method"]) == ("debug", "/grpc.health.v1.Health/Check")


def test_a_broken_file_changes_nothing_and_is_reported(engine_store):
    with running_daemon(engine_store) as daemon, Connection(daemon.api_socket) as client:
        daemon.configure("runs: {max_stepz: 3}\nlog: {level: loud}\n")
        daemon.process.send_signal(signal.SIGHUP)
        failed = daemon.wait_for("config_reload_failed")
        assert "did you mean runs.max_steps?" in failed["error"]
        told = status(client)
        assert told.state == system_pb.DAEMON_STATE_DEGRADED
        assert len(told.degraded_reasons) == 1
        assert "runs.max_stepz" in told.degraded_reasons[0]
        assert "log.level" in told.degraded_reasons[0]
        with pytest.raises(grpc.RpcError) as refused:
            client.create(goal("Hello?", max_steps=9))
        assert Problem(refused.value).fields == {"spec.limits.max_steps": "9 is not in 1 to 8"}
        daemon.configure(BASE_CONFIG)
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for("config_reloaded")
        assert status(client).state == system_pb.DAEMON_STATE_READY


def test_a_broken_configuration_at_the_first_start_is_reported_whole(engine_store):
    config = "runs: {max_steps: 0, timeout: soon}\nlog: {level: loud}\nspeed: fast\n"
    with running_daemon(engine_store, config, ready=False) as daemon:
        assert daemon.process.wait(20) == 1
        said = daemon.wait_for_output()
        for key in ("runs.max_steps", "runs.timeout", "log.level", "speed"):
            assert said.count(key) == 1, said
        assert not daemon.api_socket.exists()


def test_a_broken_configuration_starts_degraded_on_the_last_good_one(engine_store):
    good = f"runs: {{default_engine: {ENGINE}, max_steps: 3}}\n"
    with running_daemon(engine_store, good) as daemon:
        assert daemon.stop() == 0
        daemon.configure("runs: {max_steps: 0}\n")
        daemon.restart()
        degraded = daemon.wait_for("config_degraded")
        assert "runs.max_steps" in degraded["problem"]
        with Connection(daemon.api_socket) as client:
            told = status(client)
            assert told.state == system_pb.DAEMON_STATE_DEGRADED
            assert "last known good configuration" in told.degraded_reasons[0]
            assert "runs.max_steps" in told.degraded_reasons[0]
            with pytest.raises(grpc.RpcError) as refused:
                client.create(goal("Hello?", max_steps=4))
            assert Problem(refused.value).fields == {"spec.limits.max_steps": "4 is not in 1 to 3"}


def test_a_file_made_after_the_start_is_found_by_a_reload(tmp_path, engine_store):
    places = {"CONFIGURATION_DIRECTORY": str(tmp_path)}
    with (
        running_daemon(engine_store, None, places) as daemon,
        Connection(daemon.api_socket) as client,
    ):
        assert status(client).config_path == ""
        (tmp_path / "config.yaml").write_text("runs: {max_steps: 3}\n")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for("config_reloaded")
        assert status(client).config_path == str(tmp_path / "config.yaml")
        with pytest.raises(grpc.RpcError) as refused:
            client.create(goal("Hello?", max_steps=4))
        assert Problem(refused.value).fields == {"spec.limits.max_steps": "4 is not in 1 to 3"}


def test_a_half_installed_engine_degrades_and_stops_nothing(tmp_path):
    (tmp_path / "half").mkdir()
    with running_daemon(tmp_path) as daemon, Connection(daemon.api_socket) as client:
        told = status(client)
        assert told.state == system_pb.DAEMON_STATE_DEGRADED
        assert "half" in told.degraded_reasons[0]
        assert client.engines.ListEngines(engine_pb.ListEnginesRequest()).engines == []


def test_an_unreadable_engine_store_degrades_and_stops_nothing(tmp_path):
    store = tmp_path / "store"
    store.write_text("no directory")
    with running_daemon(store) as daemon, Connection(daemon.api_socket) as client:
        told = status(client)
        assert told.state == system_pb.DAEMON_STATE_DEGRADED
        assert told.degraded_reasons == [f"engine store: {store}: Not a directory"]
        with pytest.raises(grpc.RpcError) as refused:
            client.create(goal("Hello?"))
        assert Problem(refused.value).code is grpc.StatusCode.FAILED_PRECONDITION


def test_the_stream_of_a_run_survives_a_reload(engine_store):
    with running_daemon(engine_store, BASE_CONFIG + PRELOAD) as daemon:
        daemon.wait_for("engine_loaded")
        with Connection(daemon.api_socket) as client:
            run_id, stream = waiting_for_a_tool(client)
            daemon.process.send_signal(signal.SIGHUP)
            daemon.wait_for("config_reloaded")
            client.submit(run_id, result("call-1"))
            assert kinds(stream)[-1] == "run_finished"
