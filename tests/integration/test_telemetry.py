"""The machine's telemetry over gRPC, and with every run: the API alone, and the real daemon."""

import asyncio
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from edge_agent.client import AsyncClient, Client
from edge_agent.errors import InvalidRequest
from edge_agent.telemetry.reading import ReadingStatus
from edge_agent.telemetry.sampler import Sampler
from edge_agent.v1 import system_service_pb2 as pb
from tests.support import sysroots
from tests.support.api_ports import EdgeThread
from tests.support.connection import Connection, Problem
from tests.support.daemon import BASE_CONFIG, running_daemon

TOTAL_KB = 7_789_568


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The root of an Orin Nano."""
    sysroots.orin_nano(tmp_path)
    return tmp_path


@pytest.fixture
def edge(runtime_dir, machine):
    """An API whose sampler the test drives; its time stands still."""
    with EdgeThread(runtime_dir) as edge:
        edge.daemon.sampler = Sampler(machine, clock=lambda: 0.0)
        edge.daemon.sampler.sample(0.0)
        yield edge


@pytest.mark.parametrize("socket", ["api", "admin"])
def test_both_sockets_serve_it_and_the_first_message_comes_at_once(edge, socket):
    with Client(getattr(edge, socket)) as client:
        found = next(iter(client.watch_telemetry(3600)))
    assert found.mem_available_bytes == 5_242_880 * 1024
    assert found.gpu_utilisation_percent.value == 34.5
    assert found.power_mode_number == 2


def test_each_message_tells_the_newest(edge, machine):
    with Client(edge.api) as client:
        stream = client.watch_telemetry(0.1)
        next(stream)
        for available in (1_000, 2_000, 3_000):
            sysroots.put(machine, {"proc/meminfo": sysroots.meminfo(TOTAL_KB, available)})
            edge.daemon.sampler.sample(0.0)
        seen = next(found for found in stream if found.mem_available_bytes != 5_242_880 * 1024)
    assert seen.mem_available_bytes == 3_000 * 1024


def test_what_the_sampler_does_not_renew_is_told_as_stale(edge, machine):
    now_s = [0.0]
    edge.daemon.sampler = Sampler(machine, clock=lambda: now_s[0])
    edge.daemon.sampler.sample(0.0)
    with Client(edge.api) as client:
        stream = client.watch_telemetry(0.1)
        assert next(stream).mem_available_bytes
        now_s[0] = 60.0
        late = next(found for found in stream if found.mem_available_bytes is None)
    assert late.memory.available_bytes.status is ReadingStatus.STALE
    assert late.memory.available_bytes.value == 5_242_880 * 1024
    assert late.as_of_s - late.sampled_at_s == pytest.approx(60)


def test_an_interval_out_of_bounds_is_refused(edge):
    with Client(edge.api) as client:
        for interval_s in (0.05, 3601.0):
            with pytest.raises(InvalidRequest) as refused:
                next(client.watch_telemetry(interval_s))
            assert refused.value.violations[0].field == "interval"


def test_the_asyncio_client_has_it_too(edge):
    async def first() -> int | None:
        async with AsyncClient(edge.api) as client:
            async for found in client.watch_telemetry(3600):
                return found.mem_available_bytes
        return None

    assert asyncio.run(first()) == 5_242_880 * 1024


def test_a_daemon_watches_the_machine_below_its_root(engine_store, machine):
    config = f"{BASE_CONFIG}telemetry: {{sysroot: {machine}, interval: 50ms}}\n"
    with running_daemon(engine_store, config) as daemon:
        with Connection(daemon.api_socket) as connection:
            request = pb.WatchTelemetryRequest(interval=Duration(nanos=100_000_000))
            stream = connection.system.WatchTelemetry(request, timeout=20)
            while not next(stream).telemetry.memory.total_bytes.value:
                pass
            sysroots.put(machine, {"proc/meminfo": sysroots.meminfo(TOTAL_KB, 1_000)})
            while next(stream).telemetry.memory.available_bytes.value != 1_000 * 1024:
                pass
            stream.cancel()
            wrong = pb.WatchTelemetryRequest(interval=Duration(nanos=1))
            with pytest.raises(grpc.RpcError) as refused:
                next(connection.system.WatchTelemetry(wrong, timeout=20))
            assert Problem(refused.value).reason == "INVALID_REQUEST"
        assert daemon.stop() == 0


def test_a_run_ends_with_the_machines_energy_memory_and_temperature(engine_store, machine):
    config = f"{BASE_CONFIG}telemetry: {{sysroot: {machine}}}\n"
    with running_daemon(engine_store, config) as daemon, Client(str(daemon.api_socket)) as client:
        while next(client.watch_telemetry()).power_mw.value is None:
            pass
        run = client.run("Say hello.", max_output_tokens=16)
        assert run.ended_at_s
        assert run.telemetry
        seconds = run.ended_at_s - run.created_at_s
        assert run.telemetry.energy_mj == pytest.approx(5_966 * seconds, rel=0.1)
        assert run.telemetry.min_available_bytes == 5_242_880 * 1024
        assert run.telemetry.max_temperature_milli_c == 49_593
        assert client.get(run.id).telemetry == run.telemetry
