"""Health can't stay green while no step moves: the probe takes the whole path to a real worker."""

import os
import signal

from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from edge_agent.v1 import engine_service_pb2 as engine_pb
from edge_agent.v1 import run_service_pb2 as run_pb
from edge_agent.v1 import system_service_pb2 as system_pb
from tests.conftest import ENGINE
from tests.support.connection import Connection, goal
from tests.support.daemon import BASE_CONFIG, running_daemon

PROBING = BASE_CONFIG + "scheduling: {probe_interval: 500ms}\n"


def health(client: Connection) -> int:
    status: int = client.health.Check(health_pb2.HealthCheckRequest(), timeout=20).status
    return status


def engine_of(client: Connection) -> engine_pb.Engine:
    return client.engines.GetEngine(engine_pb.GetEngineRequest(name=ENGINE), timeout=20).engine


def test_a_worker_that_answers_pings_and_decides_nothing_is_not_served(engine_store):
    config = PROBING + f"preload: [{ENGINE}]\n"
    with running_daemon(engine_store, config) as daemon, Connection(daemon.api_socket) as client:
        daemon.wait_for("engine_loaded")
        assert health(client) == health_pb2.HealthCheckResponse.SERVING
        worker = engine_of(client).worker.pid
        os.kill(worker, signal.SIGSTOP)
        try:
            stuck = daemon.wait_for("steps_stuck")
            assert stuck["engine"] == ENGINE
            status = client.system.GetStatus(system_pb.GetStatusRequest(), timeout=20)
            assert any("one token" in reason for reason in status.degraded_reasons)
            assert health(client) == health_pb2.HealthCheckResponse.NOT_SERVING
        finally:
            os.kill(worker, signal.SIGCONT)
        daemon.wait_for("steps_move_again")
        assert health(client) == health_pb2.HealthCheckResponse.SERVING
        run = client.end_of(client.create(goal("Hello?", max_output_tokens=2)).id)
        assert run.state == run_pb.RUN_STATE_SUCCEEDED


def test_no_engine_is_loaded_for_a_probe(engine_store):
    config = BASE_CONFIG + "scheduling: {probe_interval: 50ms}\n"
    with running_daemon(engine_store, config) as daemon, Connection(daemon.api_socket) as client:
        watching = client.engines.WatchEngines(engine_pb.WatchEnginesRequest(), timeout=20)
        assert next(watching).engine.state == engine_pb.ENGINE_STATE_INSTALLED
        run = client.end_of(client.create(goal("Hello?", max_output_tokens=2)).id)
        assert run.state == run_pb.RUN_STATE_SUCCEEDED
        with Connection(daemon.admin_socket) as admin:
            admin.engines.UnloadEngine(engine_pb.UnloadEngineRequest(name=ENGINE), timeout=20)
        assert engine_of(client).state == engine_pb.ENGINE_STATE_INSTALLED
        assert len(daemon.lines("engine_loaded")) == 1
