"""Engines in real memory: loads, evictions, preemption, floors and workers that run out of it.

Three engines (the same model under three names) and a budget that holds two. What is free here is
the machine's, so a floor is set from what is free when a test begins, and a real process takes
memory below it.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.telemetry import procfs
from edge_agent.v1 import engine_service_pb2 as engine_pb
from edge_agent.v1 import run_service_pb2 as run_pb
from edge_agent.v1 import system_service_pb2 as system_pb
from tests.support.connection import Connection, events, first, goal, text_of
from tests.support.daemon import running_daemon
from tests.support.engines import make_store
from tests.support.processes import is_gone, wait_gone

GIB = 1 << 30
MIB = 1 << 20
STORY = "Tell me a long story about a robot that looks for its charger."
HOG = (
    "import sys; block = bytearray(int(sys.argv[1]));"
    "block[::4096] = b'x' * len(block[::4096]);"
    "print('held', flush=True); sys.stdin.read()"
)
CONFIG = """
runs: {{default_engine: alpha}}
worker: {{threads: 1}}
engines:
  alpha: {{slots: 1, context_tokens: 1024}}
  beta: {{slots: 1, context_tokens: 1024}}
  gamma: {{slots: 1, context_tokens: 1024}}
scheduling: {{min_residency: 100ms, probe_interval: null, robot_reserve: 64MiB{more}}}
"""


@pytest.fixture(scope="module")
def three(engine_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(engine_store, tmp_path_factory.mktemp("three"), "alpha", "beta", "gamma").root


def config(**scheduling: str) -> str:
    return CONFIG.format(more="".join(f", {key}: {value}" for key, value in scheduling.items()))


def states(client: Connection) -> dict[str, str]:
    answer = client.engines.ListEngines(engine_pb.ListEnginesRequest(), timeout=20)
    return {
        each.name: engine_pb.EngineState.Name(each.state).removeprefix("ENGINE_STATE_")
        for each in answer.engines
    }


def reserved_bytes(client: Connection, name: str) -> int:
    request = engine_pb.GetEngineRequest(name=name)
    return client.engines.GetEngine(request, timeout=20).engine.load_peak_bytes


def pid(client: Connection, name: str) -> int:
    return client.engines.GetEngine(
        engine_pb.GetEngineRequest(name=name), timeout=20
    ).engine.worker.pid


def short(name: str, **more: object) -> run_pb.RunSpec:
    return goal("Hello?", engine=name, max_output_tokens=2, **more)


def ok(client: Connection, spec: run_pb.RunSpec) -> run_pb.Run:
    run = client.end_of(client.create(spec).id)
    assert run.state == run_pb.RUN_STATE_SUCCEEDED, run.error
    return run


def available_bytes() -> int:
    found = procfs.read_memory(Path("/")).available_bytes.value
    assert found is not None
    return found


@contextlib.contextmanager
def hog(size_bytes: int) -> Iterator[None]:
    """A process that holds so much memory, really."""
    command = [sys.executable, "-c", HOG, str(size_bytes)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline().strip() == "held"
        try:
            yield
        finally:
            process.stdin.close()
            process.wait()


class TestBudget:
    def test_what_fits_stays_and_what_does_not_makes_the_least_wanted_go(self, three):
        with (
            running_daemon(three, config(memory_budget="800MiB")) as daemon,
            Connection(daemon.api_socket) as client,
        ):
            for name in ("alpha", "beta", *("alpha",) * 8):
                ok(client, short(name))
            assert states(client) == {"alpha": "READY", "beta": "READY", "gamma": "INSTALLED"}
            gone = pid(client, "beta")
            ok(client, short("gamma"))
            assert states(client) == {"alpha": "READY", "beta": "INSTALLED", "gamma": "READY"}
            assert is_gone(gone)
            assert daemon.wait_for("engine_evicted")["why"] == "ROOM"

    def test_an_engine_that_can_never_fit_is_refused_with_the_numbers(self, three):
        with (
            running_daemon(three, config(memory_budget="300MiB")) as daemon,
            Connection(daemon.api_socket) as client,
        ):
            run = client.end_of(client.create(short("alpha")).id)
            assert (run.state, run.error.reason) == (run_pb.RUN_STATE_FAILED, "ENGINE_TOO_LARGE")
            assert int(run.error.metadata["available_bytes"]) == 300 * MIB
            assert int(run.error.metadata["needed_bytes"]) > 300 * MIB

    def test_a_pinned_engine_stays_and_what_does_not_fit_beside_it_is_refused(self, three):
        pinned = config(memory_budget="500MiB").replace(
            "alpha: {slots: 1,", "alpha: {pinned: true, slots: 1,"
        )
        with running_daemon(three, pinned) as daemon, Connection(daemon.api_socket) as client:
            ok(client, short("alpha"))
            kept = pid(client, "alpha")
            run = client.end_of(client.create(short("beta")).id)
            assert run.error.reason == "ENGINE_TOO_LARGE"
            assert run.error.metadata["pinned"] == "alpha"
            assert pid(client, "alpha") == kept

    def test_what_a_load_takes_is_measured_and_remembered_over_a_restart(self, three):
        with running_daemon(three, config()) as daemon:
            with Connection(daemon.api_socket) as client:
                estimated = reserved_bytes(client, "alpha")
                ok(client, short("alpha"))
                after = reserved_bytes(client, "alpha")
                assert after >= estimated
            assert daemon.stop() == 0
            assert (daemon.state_dir / "footprints.json").read_bytes().count(b"measured_at_s") == 1
            assert not (daemon.state_dir / "loading.json").exists()
            daemon.restart()
            with Connection(daemon.api_socket) as client:
                assert reserved_bytes(client, "alpha") == after


class TestPreemption:
    def test_an_urgent_step_takes_the_place_of_a_batch_one_that_goes_on_afterwards(self, three):
        with running_daemon(three, config()) as daemon, Connection(daemon.api_socket) as client:
            spec = goal(STORY, max_output_tokens=120, priority=run_pb.PRIORITY_BATCH)
            batch = events(client.execute(spec))
            seen = [first(batch, "text_delta")]
            urgent = ok(client, short("alpha", priority=run_pb.PRIORITY_URGENT))
            assert daemon.wait_for("step_preempted")["by_run"] == urgent.id
            seen += list(batch)
            run = seen[-1].run_finished.run
            assert run.state == run_pb.RUN_STATE_SUCCEEDED
            assert text_of(seen) == run.answer
            assert run.usage.completion_tokens > 100

    def test_what_it_has_read_of_its_prompt_is_kept_although_another_took_its_only_slot(
        self, three
    ):
        with running_daemon(three, config()) as daemon, Connection(daemon.api_socket) as client:
            long = "Rooms: " + "kitchen, hall, cellar, garage, " * 60 + STORY
            spec = goal(long, max_output_tokens=60, priority=run_pb.PRIORITY_BATCH)
            batch = events(client.execute(spec))
            first(batch, "text_delta")
            ok(client, short("alpha", priority=run_pb.PRIORITY_URGENT))
            assert len(daemon.lines("step_preempted")) == 1
            usage = list(batch)[-1].run_finished.run.usage
            assert usage.prompt_tokens > 400
            assert usage.cached_tokens > 0.9 * usage.prompt_tokens

    def test_a_normal_step_is_not_preempted(self, three):
        with running_daemon(three, config()) as daemon, Connection(daemon.api_socket) as client:
            normal = events(client.execute(goal(STORY, max_output_tokens=60)))
            first(normal, "text_delta")
            ok(client, short("alpha", priority=run_pb.PRIORITY_URGENT))
            assert list(normal)[-1].run_finished.run.state == run_pb.RUN_STATE_SUCCEEDED
            assert daemon.lines("step_preempted") == []


class TestFloors:
    def test_below_the_soft_floor_idle_engines_go_and_none_comes_until_it_is_over(self, three):
        floor = (available_bytes() - 3 * GIB // 2) // MIB
        with (
            running_daemon(three, config(soft_floor=f"{floor}MiB", hard_floor="64MiB")) as daemon,
            Connection(daemon.api_socket) as client,
        ):
            ok(client, short("alpha"))
            idle = pid(client, "alpha")
            with hog(3 * GIB):
                assert daemon.wait_for("memory_pressure")["floor"] == "SOFT"
                assert daemon.wait_for("engine_evicted")["why"] == "SOFT_FLOOR"
                assert wait_gone(idle)
                waits = client.create(short("beta", timeout_s=60.0))
                explained = client.engines.Explain(engine_pb.ExplainRequest(), timeout=20).waits
                assert [each.run_id for each in explained] == [waits.id]
                assert explained[0].reason == engine_pb.WAIT_REASON_PRESSURE
                assert states(client)["beta"] == "INSTALLED"
            assert client.end_of(waits.id).state == run_pb.RUN_STATE_SUCCEEDED

    def test_below_the_hard_floor_a_worker_is_killed_and_its_step_goes_on_later(self, three):
        free = available_bytes()
        floors = {
            "soft_floor": f"{(free - 5 * GIB // 4) // MIB}MiB",
            "hard_floor": f"{(free - 3 * GIB // 2) // MIB}MiB",
        }
        with (
            running_daemon(three, config(**floors)) as daemon,
            Connection(daemon.api_socket) as client,
        ):
            stream = events(client.execute(goal(STORY, max_output_tokens=300, timeout_s=100.0)))
            seen = [first(stream, "text_delta")]
            worker = pid(client, "alpha")
            with hog(3 * GIB):
                assert daemon.wait_for("engine_killed")["pid"] == worker
                assert wait_gone(worker)
            seen += list(stream)
            run = seen[-1].run_finished.run
            assert run.state == run_pb.RUN_STATE_SUCCEEDED
            assert text_of(seen) == run.answer
            assert daemon.process.poll() is None


class TestWorkersThatRunOutOfMemory:
    def test_a_load_that_finds_no_memory_is_tried_twice_and_then_fails_with_the_numbers(
        self, three, tmp_path
    ):
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nulimit -v 520000\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        limited = config().replace(
            "worker: {threads: 1}", f"worker: {{threads: 1, python: {{llama_cpp: {python}}}}}"
        )
        with running_daemon(three, limited) as daemon, Connection(daemon.api_socket) as client:
            run = client.end_of(client.create(short("alpha")).id)
            assert (run.state, run.error.reason) == (run_pb.RUN_STATE_FAILED, "OUT_OF_MEMORY")
            assert int(run.error.metadata["needed_bytes"]) > 0
            assert int(run.error.metadata["available_bytes"]) > 0
            assert len(daemon.lines("engine_load_failed")) == 2
            assert states(client)["alpha"] == "FAILED"
            status = client.system.GetStatus(system_pb.GetStatusRequest(), timeout=20)
            assert status.state != system_pb.DAEMON_STATE_DRAINING


class TestKilledAtEveryState:
    def test_while_it_drains_whoever_needs_the_room_gets_it(self, three):
        one = config(memory_budget="500MiB")
        with running_daemon(three, one) as daemon, Connection(daemon.api_socket) as client:
            stream = events(client.execute(goal(STORY, max_output_tokens=900)))
            first(stream, "text_delta")
            victim = pid(client, "alpha")
            other = client.create(short("beta"))
            watching = client.engines.WatchEngines(engine_pb.WatchEnginesRequest(), timeout=30)
            for change in watching:
                if change.engine.state == engine_pb.ENGINE_STATE_DRAINING:
                    break
            os.kill(victim, signal.SIGKILL)
            run = list(stream)[-1].run_finished.run
            assert (run.state, run.error.reason) == (run_pb.RUN_STATE_FAILED, "WORKER_LOST")
            assert client.end_of(other.id).state == run_pb.RUN_STATE_SUCCEEDED
            assert states(client)["beta"] == "READY"
