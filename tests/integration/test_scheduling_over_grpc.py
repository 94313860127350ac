"""The scheduler as callers see it: priorities, why a step waits, pins, and what is held back."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from edge_agent.cli.main import main
from edge_agent.client import AsyncClient, Client
from edge_agent.core import EngineState, Priority
from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.manifest import digest
from edge_agent.errors import FailedPrecondition, NotFound
from edge_agent.status import WaitReason
from edge_agent.units import size_text
from edge_agent.v1 import engine_service_pb2 as engine_pb
from edge_agent.v1 import run_service_pb2 as run_pb
from edge_agent.v1 import system_service_pb2 as system_pb
from tests.support.connection import CALL_TIMEOUT_S, Connection, Problem, events, first, goal
from tests.support.daemon import DaemonProcess, running_daemon
from tests.support.engines import make_store

STORY = "Write a very long story about a robot."
CONFIG = (
    "runs: {default_engine: alpha}\n"
    "worker: {threads: 1}\n"
    "scheduling: {max_resident_engines: 1, min_residency: 1ms}\n"
    "engines: {alpha: {slots: 1}, beta: {slots: 1}}\n"
)


@pytest.fixture(scope="module")
def store(engine_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return make_store(engine_store, tmp_path_factory.mktemp("two") / "store", "alpha", "beta")


@pytest.fixture
def daemon(store: Catalogue) -> Iterator[DaemonProcess]:
    with running_daemon(store.root, CONFIG) as running:
        yield running


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[Connection]:
    with Connection(daemon.api_socket) as connection:
        yield connection


@pytest.fixture
def admin(daemon: DaemonProcess) -> Iterator[Connection]:
    with Connection(daemon.admin_socket, "operator") as connection:
        yield connection


def load(admin: Connection, name: str) -> engine_pb.Engine:
    request = engine_pb.LoadEngineRequest(name=name)
    return admin.engines.LoadEngine(request, timeout=CALL_TIMEOUT_S).engine


def pin(admin: Connection, name: str, *, pinned: bool) -> engine_pb.Engine:
    request = engine_pb.PinEngineRequest(name=name, pinned=pinned)
    return admin.engines.PinEngine(request, timeout=CALL_TIMEOUT_S).engine


def release(admin: Connection, name: str) -> engine_pb.Engine:
    request = engine_pb.ReleaseEngineRequest(name=name)
    return admin.engines.ReleaseEngine(request, timeout=CALL_TIMEOUT_S).engine


def engine(client: Connection, name: str) -> engine_pb.Engine:
    request = engine_pb.GetEngineRequest(name=name)
    return client.engines.GetEngine(request, timeout=CALL_TIMEOUT_S).engine


def explain(client: Connection, run_id: str | None = None) -> list[engine_pb.StepWait]:
    request = engine_pb.ExplainRequest(run_id=run_id)
    return list(client.engines.Explain(request, timeout=CALL_TIMEOUT_S).waits)


def status(client: Connection) -> system_pb.GetStatusResponse:
    return client.system.GetStatus(system_pb.GetStatusRequest(), timeout=CALL_TIMEOUT_S)


def until(client: Connection, wanted: Callable[[engine_pb.Engine], bool]) -> None:
    """Wait until an engine is so."""
    request = engine_pb.WatchEnginesRequest()
    watching = client.engines.WatchEngines(request, timeout=CALL_TIMEOUT_S)
    next(response for response in watching if wanted(response.engine))
    watching.cancel()


def waiting(client: Connection, count: int) -> None:
    """Wait until so many steps wait for alpha."""
    until(client, lambda each: each.name == "alpha" and each.worker.waiting_steps == count)


def busy(client: Connection) -> str:
    """A run that has alpha's one place, and keeps it."""
    run_id = client.create(goal(STORY, max_output_tokens=1000)).id
    client.until(run_id, "text_delta")
    return run_id


def quarantine(daemon: DaemonProcess, store: Catalogue, name: str) -> None:
    """As two boots that ended inside this engine's load leave it."""
    suspects = {digest(store.get(name)): {"engine": name, "boot_ids": ["one", "two"]}}
    (daemon.state_dir / "quarantine.json").write_text(json.dumps(suspects))


# --- priorities ---


def test_a_run_keeps_the_priority_that_it_was_given(client):
    for asked, told in (
        (run_pb.PRIORITY_UNSPECIFIED, run_pb.PRIORITY_NORMAL),
        (run_pb.PRIORITY_URGENT, run_pb.PRIORITY_URGENT),
        (run_pb.PRIORITY_BATCH, run_pb.PRIORITY_BATCH),
    ):
        made = client.create(goal("Hello?", max_output_tokens=2, priority=asked))
        assert made.priority == told
        assert client.end_of(made.id).priority == told


def test_a_priority_that_is_none_is_refused_by_name(client):
    with pytest.raises(grpc.RpcError) as refused:
        client.create(goal("Hello?", priority=9))
    problem = Problem(refused.value)
    assert problem.code is grpc.StatusCode.INVALID_ARGUMENT
    assert problem.fields == {
        "spec.priority": "9 is no priority, one of URGENT, INTERACTIVE, NORMAL, BATCH expected"
    }


def test_a_batch_run_gives_way_and_goes_on(daemon, client):
    with Connection(daemon.api_socket, "night-shift") as other:
        batch = goal(STORY, max_output_tokens=200, priority=run_pb.PRIORITY_BATCH)
        stream = events(other.execute(batch))
        run_id = first(stream, "text_delta").run_id
        made = client.create(goal("Hello?", max_output_tokens=2, priority=run_pb.PRIORITY_URGENT))
        assert client.end_of(made.id).state == run_pb.RUN_STATE_SUCCEEDED
        assert daemon.wait_for("step_preempted")["run"] == run_id
        ended = other.end_of(run_id)
    assert ended.state == run_pb.RUN_STATE_SUCCEEDED
    assert ended.usage.completion_tokens <= 200


def test_a_timeout_that_can_not_be_met_is_refused_with_the_arithmetic(client):
    client.end_of(client.create(goal(STORY, max_output_tokens=128)).id)  # its pace is known now
    run = client.end_of(client.create(goal("word " * 1900, timeout_s=0.3)).id)
    assert (run.state, run.error.reason) == (run_pb.RUN_STATE_FAILED, "DEADLINE_UNMEETABLE")
    told = {name: float(value) for name, value in run.error.metadata.items() if name != "engine"}
    assert told["load_s"] + told["prefill_s"] + told["decode_s"] > told["left_s"]
    assert run.usage.prompt_tokens == 0


# --- why a step waits ---


def test_a_waiting_step_is_explained_on_both_sockets(client, admin):
    assert explain(client) == []
    running = busy(client)
    low = client.create(goal("Later.", priority=run_pb.PRIORITY_BATCH, timeout_s=600)).id
    waiting(client, 1)
    high = admin.create(goal("Now.", priority=run_pb.PRIORITY_URGENT)).id
    waiting(client, 2)

    waits = explain(client)
    assert [wait.run_id for wait in waits] == [high, low]
    assert [wait.position for wait in waits] == [1, 2]
    assert [wait.client for wait in waits] == ["operator", "test"]
    assert [wait.priority for wait in waits] == [run_pb.PRIORITY_URGENT, run_pb.PRIORITY_BATCH]
    for wait in waits:
        assert (wait.engine, list(wait.engines)) == ("alpha", ["alpha"])
        assert wait.reason == engine_pb.WAIT_REASON_PLACE
        assert "alpha" in wait.text
    assert 590 < waits[1].deadline_in.ToTimedelta().total_seconds() <= 600

    assert [wait.run_id for wait in explain(admin, low)] == [low]
    assert explain(client, running) == []
    assert explain(client, "nobody") == []
    told = status(client)
    assert (told.running_steps, told.waiting_steps) == (1, 2)


def test_a_run_id_that_can_be_none_is_refused(client):
    with pytest.raises(grpc.RpcError) as refused:
        explain(client, "")
    assert list(Problem(refused.value).fields) == ["run_id"]


def test_the_status_tells_what_memory_is_left(client, admin):
    empty = status(client).memory
    loaded = load(admin, "alpha")
    memory = status(client).memory
    assert (empty.committed_bytes, memory.committed_bytes) == (0, loaded.steady_bytes)
    assert memory.level == system_pb.MEMORY_LEVEL_NORMAL
    assert 0 < memory.room_bytes < memory.total_bytes
    assert 0 < memory.hard_floor_bytes < memory.soft_floor_bytes < memory.kept_bytes
    assert memory.HasField("available_bytes")
    assert not memory.HasField("budget_bytes")


# --- pins ---


def test_a_pinned_engine_does_not_leave_for_another(client, admin):
    load(admin, "alpha")
    assert pin(admin, "alpha", pinned=True).pinned
    refused = client.end_of(client.create(goal("Hi", engine="beta")).id)
    assert refused.error.reason == "ENGINE_TOO_LARGE"
    assert refused.error.metadata["pinned"] == "alpha"
    assert engine(client, "alpha").state == engine_pb.ENGINE_STATE_READY

    assert not pin(admin, "alpha", pinned=False).pinned
    served = client.end_of(client.create(goal("Hi", engine="beta", max_output_tokens=2)).id)
    assert served.state == run_pb.RUN_STATE_SUCCEEDED
    assert not engine(client, "alpha").HasField("worker")


def test_a_load_is_measured_and_told(client, admin):
    before = engine(client, "beta")
    assert list(before.measurements) == []
    assert before.steady_bytes == before.estimated_steady_bytes
    (measured,) = load(admin, "beta").measurements
    assert measured.source == "process"
    assert 0 < measured.steady_bytes <= measured.load_peak_bytes
    assert measured.measured_at.ToSeconds() > 0


# --- quarantine ---


def test_an_engine_in_quarantine_is_not_loaded_before_somebody_releases_it(daemon, store):
    daemon.stop()
    quarantine(daemon, store, "alpha")
    daemon.restart()
    with Connection(daemon.api_socket) as client, Connection(daemon.admin_socket) as admin:
        assert engine(client, "alpha").quarantined
        assert not engine(client, "beta").quarantined
        with pytest.raises(grpc.RpcError) as refused:
            load(admin, "alpha")
        assert Problem(refused.value).reason == "ENGINE_QUARANTINED"
        ended = client.end_of(client.create(goal("Hi")).id)
        assert ended.error.reason == "ENGINE_QUARANTINED"
        told = status(client)
        assert told.state == system_pb.DAEMON_STATE_DEGRADED
        assert [
            reason.startswith("engine alpha is in quarantine") for reason in told.degraded_reasons
        ] == [True]

        assert not release(admin, "alpha").quarantined
        assert status(client).state == system_pb.DAEMON_STATE_READY
        assert load(admin, "alpha").state == engine_pb.ENGINE_STATE_READY
    daemon.stop()
    daemon.restart()  # it is not remembered again
    with Connection(daemon.api_socket) as client:
        assert not engine(client, "alpha").quarantined


def test_a_release_that_the_disk_refuses_changes_nothing(daemon, store):
    daemon.stop()
    quarantine(daemon, store, "alpha")
    (daemon.state_dir / "quarantine.json.partial").mkdir()  # in the way of the new content
    daemon.restart()
    with Connection(daemon.admin_socket) as admin:
        with pytest.raises(grpc.RpcError) as refused:
            release(admin, "alpha")
        problem = Problem(refused.value)
        assert problem.code is grpc.StatusCode.FAILED_PRECONDITION
        assert (problem.reason, problem.metadata["engine"]) == ("STATE_NOT_WRITABLE", "alpha")
        assert engine(admin, "alpha").quarantined
        (daemon.state_dir / "quarantine.json.partial").rmdir()
        assert not release(admin, "alpha").quarantined


def test_an_unknown_engine_is_neither_pinned_nor_released(admin):
    for call in (lambda: pin(admin, "nobody", pinned=True), lambda: release(admin, "nobody")):
        with pytest.raises(grpc.RpcError) as refused:
            call()
        assert Problem(refused.value).reason == "ENGINE_NOT_FOUND"


# --- the Python clients and the command line ---


def test_the_client_speaks_of_all_this_in_core_values(daemon, client, store):
    busy(client)
    with Client(str(daemon.api_socket), name="robot") as robot:
        run = robot.create("Later.", priority=Priority.INTERACTIVE)
        assert run.priority is Priority.INTERACTIVE
        waiting(client, 1)
        (wait,) = robot.explain(run.id)
        assert (wait.client, wait.reason, wait.priority) == (
            "robot",
            WaitReason.PLACE,
            Priority.INTERACTIVE,
        )
        told = robot.status()
        assert (told.waiting_steps, told.running_steps) == (1, 1)
        assert told.memory is not None
        assert told.memory.level == "NORMAL"
        assert robot.engine("alpha").digest == digest(store.get("alpha"))
        with pytest.raises(NotFound):
            robot.engine("nobody")
    with Client(str(daemon.admin_socket)) as operator:
        assert operator.pin("alpha").pinned
        assert not operator.pin("alpha", pinned=False).pinned
        assert operator.release("alpha").state is EngineState.READY


def test_the_async_client_does_too(daemon):
    async def scenario() -> None:
        async with AsyncClient(str(daemon.admin_socket)) as operator:
            assert await operator.explain() == ()
            assert (await operator.pin("beta")).pinned
            assert (await operator.engine("beta")).pinned
            assert not (await operator.release("beta")).quarantined

    asyncio.run(scenario())


def test_a_quarantine_arrives_at_a_client_as_it_was_raised(daemon, store):
    daemon.stop()
    quarantine(daemon, store, "beta")
    daemon.restart()
    with Client(str(daemon.admin_socket)) as operator, pytest.raises(FailedPrecondition) as refused:
        operator.load("beta")
    assert refused.value.reason == "ENGINE_QUARANTINED"


def test_engines_show_tells_what_was_measured_where_the_daemon_runs(daemon, admin, store, capfd):
    load(admin, "alpha")
    words = ["engines", "show", "alpha", "--store", str(store.root)]
    assert main([*words, "--socket", str(daemon.api_socket)]) == 0
    people = capfd.readouterr().out
    assert main([*words, "--socket", str(daemon.api_socket), "--json"]) == 0
    programs = json.loads(capfd.readouterr().out)
    assert "in memory:\n  state: READY\n  reserved: " in people
    assert people.rstrip().endswith("  process")
    (measured,) = programs["daemon"]["measurements"]
    assert measured["source"] == "process"


def test_engines_show_does_without_the_daemon_unless_one_is_named(
    store, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("EDGE_AGENT_SOCKET", str(tmp_path / "none.sock"))
    words = ["engines", "show", "alpha", "--store", str(store.root)]
    assert main(words) == 0
    memory = store.get("alpha").memory
    steady, peak = size_text(memory.steady_bytes), size_text(memory.load_peak_bytes)
    assert f"  estimated: {steady} loaded, {peak} while it loads\n" in capfd.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["daemon"] is None
    assert main([*words, "--socket", str(tmp_path / "none.sock")]) == 1
