"""Whatever is sent, the answer is typed and comes in time: never INTERNAL, never UNKNOWN, no hang.

Messages are made from the descriptors, for every method on both sockets, and sent to a real daemon.
Its one engine is damaged, so that runs are accepted and end by themselves without a model. For
`make fuzz`, EDGE_AGENT_FUZZ_S says how long to go on.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.install import find_recipe, install
from edge_agent.v1 import system_service_pb2 as system_pb
from tests.support.any_message import METHODS, Ended, Wire, requests
from tests.support.api_ports import EdgeThread, MemoryRuns
from tests.support.connection import Connection, goal
from tests.support.daemon import DaemonProcess, running_daemon
from tests.support.engine_files import NAME, write_engine

FUZZ_S = float(os.environ.get("EDGE_AGENT_FUZZ_S", "0"))
EXAMPLES = 40
SHORT = settings(
    max_examples=EXAMPLES,
    deadline=None,  # each call has its own
    suppress_health_check=list(HealthCheck),
)
NEVER_ON_ADMIN = "/edge_agent.v1.SystemService/Drain"
"""After it there are no more runs; it has a test of its own."""

Send = Callable[[str, Sequence[Message]], Ended]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory) -> Iterator[DaemonProcess]:
    directory = tmp_path_factory.mktemp("any")
    recipe = find_recipe(str(write_engine(directory)), directory)
    install(recipe, Catalogue(directory / "store"), lambda _fraction, _note: None)
    (directory / "store" / NAME / "model.bin").write_bytes(b"shorter than it was")
    with running_daemon(directory / "store", f"runs: {{default_engine: {NAME}}}\n") as running:
        yield running
        for event in ("rpc_crashed", "run_crashed"):
            assert running.lines(event) == []


@pytest.fixture(params=["api", "admin"])
def wire(daemon, request) -> Iterator[Wire]:
    socket = daemon.api_socket if request.param == "api" else daemon.admin_socket
    with Wire(socket) as connected:
        yield connected


@pytest.fixture
def admin(daemon) -> Iterator[Connection]:
    with Connection(daemon.admin_socket) as connection:
        yield connection


def hunt(send: Send, method: str, words: st.SearchStrategy[str], profile: settings = SHORT) -> None:
    """Send any messages of a method; raises for the first that is not answered as promised."""

    @profile
    @given(requests(method, words))
    def any_messages_are_answered(messages):
        ended = send(method, messages)
        assert ended.answered, f"{method}: {ended.problem and vars(ended.problem)}"

    any_messages_are_answered()


@pytest.mark.timeout(FUZZ_S + 120)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_any_message_is_answered(daemon, wire, admin, method, request):
    on_admin = "admin" in request.node.callspec.id
    if on_admin and method == NEVER_ON_ADMIN:
        return
    run_id = admin.end_of(admin.create(goal("Hi")).id).id

    def send(method: str, messages: Sequence[Message]) -> Ended:
        ended: Ended = wire.send(method, messages)
        if method.endswith("/Halt") and ended.problem is None:  # else nothing runs any more
            told: Any = ended.responses[0]
            admin.clear_halt(told.halt.halt_id)
        return ended

    started_s = time.monotonic()
    share_s = FUZZ_S / (2 * len(METHODS))
    while True:
        hunt(send, method, st.just(run_id))
        if time.monotonic() - started_s >= share_s:
            break
    told = admin.system.GetStatus(system_pb.GetStatusRequest(), timeout=20)
    assert (told.pid, list(told.halts)) == (daemon.process.pid, [])
    assert admin.end_of(admin.create(goal("Hi")).id).error.reason == "ENGINE_FILES_WRONG"


def test_draining_is_answered_too(tmp_path):
    with running_daemon(tmp_path) as running, Wire(running.admin_socket) as wire:
        hunt(wire.send, NEVER_ON_ADMIN, st.nothing())
        with Wire(running.api_socket) as api:
            hunt(api.send, "/edge_agent.v1.RunService/CreateRun", st.nothing())


class Crashes(MemoryRuns):
    """A planted bug: lists of more than a few runs raise what nobody expects."""

    def list(self, *, page_size, **_):
        if page_size > 9:
            raise ValueError("planted")
        return (), ""


class Hangs(MemoryRuns):
    """A planted bug: a Halt of a tool is never answered."""

    async def halt(self, scope, target, reason, client):
        if scope == "TOOL":
            await asyncio.sleep(3600)
        return await super().halt(scope, target, reason, client)


@pytest.mark.parametrize(
    ("planted", "method", "code"),
    [
        (Crashes, "/edge_agent.v1.RunService/ListRuns", "INTERNAL"),
        (Hangs, "/edge_agent.v1.RunService/Halt", "DEADLINE_EXCEEDED"),
    ],
)
def test_a_planted_bug_is_found(runtime_dir, monkeypatch, planted, method, code):
    monkeypatch.setattr("tests.support.any_message.PATIENT_S", 1.0)
    quick = settings(SHORT, max_examples=400, phases=[Phase.generate], database=None)
    with EdgeThread(runtime_dir, runs=planted) as edge, Wire(edge.api) as wire:
        with pytest.raises(AssertionError, match=code):
            hunt(wire.send, method, st.just("call-1"), quick)
        healthy = wire.send(
            "/edge_agent.v1.SystemService/GetStatus", [system_pb.GetStatusRequest()]
        )
        assert healthy.problem is None


def test_a_request_that_is_right_is_among_them():
    seen = []

    @settings(SHORT, max_examples=10 * EXAMPLES)
    @given(requests("/edge_agent.v1.RunService/CreateRun"))
    def look(messages):
        (message,) = messages
        seen.append(message)

    look()
    assert any(each.spec.engine == NAME and len(each.spec.messages) == 1 for each in seen)
    assert any(each.spec.engine != NAME for each in seen)
