"""The API over real unix sockets, with small owners of runs and engines behind it.

What is proven here holds for any daemon: typed errors, who may call what, what a broken stream
does to its run, and the sockets themselves.
"""

import asyncio
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from edge_agent.api.server import SERVICES, ApiServers
from edge_agent.client import AsyncClient
from edge_agent.client.wire import typed_errors
from edge_agent.core import HaltScope, Limits, Message, Role, RunSpec, TextPart, ToolCall
from edge_agent.errors import EdgeAgentError, FailedPrecondition
from edge_agent.events import RunFinished, TextDelta
from edge_agent.v1 import engine_service_pb2 as engine_pb
from edge_agent.v1 import run_service_pb2 as pb
from edge_agent.v1 import system_service_pb2 as system_pb
from edge_agent.v1 import types_pb2 as t
from edge_agent.v1.engine_service_pb2_grpc import EngineServiceStub
from edge_agent.v1.run_service_pb2_grpc import RunServiceStub
from edge_agent.v1.system_service_pb2_grpc import SystemServiceStub
from tests.support.api_ports import LIMITS, MemoryDaemon, MemoryEngines, MemoryRuns

SPEC = pb.RunSpec(messages=[t.Message(role=t.ROLE_USER, parts=[t.Part(text="hi")])])
START = pb.ConverseRequest(start=pb.ExecuteRunRequest(spec=SPEC))
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0),)


@pytest.fixture
def logged():
    with structlog.testing.capture_logs() as lines:
        yield lines


class Edge:
    """A running API and what it works on."""

    def __init__(self, runtime_dir, limits=LIMITS):
        self.limits = limits
        self.runs = MemoryRuns()
        self.engines = MemoryEngines()
        self.daemon = MemoryDaemon(self.runs)
        self.servers = ApiServers(
            runtime_dir,
            runs=self.runs,
            engines=self.engines,
            daemon=self.daemon,
            limits=lambda: self.limits,
        )


@asynccontextmanager
async def serving(runtime_dir, limits=LIMITS):
    edge = Edge(runtime_dir, limits)
    await edge.servers.start()
    try:
        yield edge
    finally:
        await edge.servers.stop(0)
        await asyncio.sleep(0)
        left = {task.get_coro().__qualname__ for task in asyncio.all_tasks()}  # type: ignore[union-attr]
        assert not {name for name in left if name.startswith(("RunService", "_written"))}


@asynccontextmanager
async def stub(kind, path, options=()):
    async with grpc.aio.insecure_channel(f"unix:{path}", options=options) as channel:
        yield kind(channel)


async def error_of(call) -> EdgeAgentError:
    """The error that a call ends with, as a client makes it of the status's details."""
    with pytest.raises(EdgeAgentError) as caught, typed_errors("the daemon"):
        await drained(call)
    return caught.value


async def drained(call):
    """Everything that a call returns."""
    if not hasattr(call, "read"):
        return await call
    while await call.read() is not grpc.aio.EOF:
        pass
    return None


# --- errors ---


def test_every_violation_reaches_the_caller_by_field(runtime_dir):
    async def main():
        async with serving(runtime_dir) as edge, stub(RunServiceStub, edge.servers.api_socket) as s:
            spec = pb.RunSpec(tools=[t.Tool(name="?", input_schema_json="{")])
            return await error_of(s.CreateRun(pb.CreateRunRequest(spec=spec)))

    error = asyncio.run(main())
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert [v.field for v in error.violations] == [
        "spec.messages",
        "spec.tools[0].name",
        "spec.tools[0].input_schema_json",
    ]


@pytest.mark.parametrize(
    ("ask", "code", "reason"),
    [
        (lambda s: s.GetRun(pb.GetRunRequest(run_id="x")), "NOT_FOUND", "NOT_FOUND"),
        (lambda s: s.GetRun(pb.GetRunRequest()), "INVALID_ARGUMENT", "INVALID_REQUEST"),
        (lambda s: s.CancelRun(pb.CancelRunRequest(run_id="x")), "NOT_FOUND", "NOT_FOUND"),
        (lambda s: s.WatchRun(pb.WatchRunRequest(run_id="x")), "NOT_FOUND", "NOT_FOUND"),
        (lambda s: s.ClearHalt(pb.ClearHaltRequest(halt_id="x")), "NOT_FOUND", "NOT_FOUND"),
        (lambda s: s.Halt(pb.HaltRequest()), "INVALID_ARGUMENT", "INVALID_REQUEST"),
        (lambda s: s.ListRuns(pb.ListRunsRequest(page_size=1001)),
         "INVALID_ARGUMENT", "INVALID_REQUEST"),
        (lambda s: s.ExecuteRun(pb.ExecuteRunRequest()), "INVALID_ARGUMENT", "INVALID_REQUEST"),
        (lambda s: s.SubmitToolResults(pb.SubmitToolResultsRequest(run_id="x")),
         "INVALID_ARGUMENT", "INVALID_REQUEST"),
    ],
)  # fmt: skip
def test_errors_are_typed(runtime_dir, ask, code, reason):
    async def main():
        async with serving(runtime_dir) as edge, stub(RunServiceStub, edge.servers.api_socket) as s:
            return await error_of(ask(s))

    error = asyncio.run(main())
    assert (error.code, error.reason) == (code, reason)


def test_the_unexpected_tells_the_caller_nothing_but_where_to_look(runtime_dir, logged):
    async def main():
        async with serving(runtime_dir) as edge, stub(RunServiceStub, edge.servers.api_socket) as s:
            spec = pb.RunSpec(messages=SPEC.messages, engine="explodes")
            return await error_of(s.CreateRun(pb.CreateRunRequest(spec=spec)))

    error = asyncio.run(main())
    assert (error.code, error.reason) == ("INTERNAL", "INTERNAL")
    assert "secret" not in error.message
    crashed, finished = logged
    assert crashed["event"] == "rpc_crashed"
    assert crashed["rpc_id"] == finished["rpc_id"] == error.metadata["rpc_id"]
    assert crashed["exc_info"]


def test_a_request_above_the_limit_is_refused_with_both_numbers(runtime_dir):
    async def main():
        async with serving(runtime_dir) as edge, stub(RunServiceStub, edge.servers.api_socket) as s:
            text = "x" * LIMITS.max_request_bytes
            messages = [t.Message(role=t.ROLE_USER, parts=[t.Part(text=text)])]
            request = pb.CreateRunRequest(spec=pb.RunSpec(messages=messages))
            unary = await error_of(s.CreateRun(request))
            start = pb.ExecuteRunRequest(spec=request.spec)
            talk = s.Converse(iter([pb.ConverseRequest(start=start)]))
            return request.ByteSize(), unary, await error_of(talk)

    size, unary, talk = asyncio.run(main())
    for error in (unary, talk):
        assert (error.code, error.reason) == ("INVALID_ARGUMENT", "REQUEST_TOO_LARGE")
        assert error.metadata["limit_bytes"] == str(LIMITS.max_request_bytes)
    assert unary.metadata["size_bytes"] == str(size)


def test_a_broken_configuration_is_reported_to_admin_even_when_the_report_is_long(runtime_dir):
    async def main():
        async with (
            serving(runtime_dir) as edge,
            stub(SystemServiceStub, edge.servers.admin_socket) as s,
        ):
            return await error_of(s.ReloadConfig(system_pb.ReloadConfigRequest()))

    error = asyncio.run(main())
    assert error.reason == "CONFIG_INVALID"
    assert error.violations[0].field == "runs.key_0"
    assert int(error.metadata["violations_left_out"]) + len(error.violations) == 200


def test_a_list_of_runs_leaves_their_transcripts_out(runtime_dir):
    async def main():
        async with serving(runtime_dir) as edge, stub(RunServiceStub, edge.servers.api_socket) as s:
            run = await edge.runs.create(
                RunSpec((), "small", Limits(1, 1), 1.0), client="", request_id=""
            )
            said = (Message(Role.ASSISTANT, (TextPart("long"),)),)
            edge.runs.emit(run.id, RunFinished(replace(run, transcript=said)))
            got = await s.GetRun(pb.GetRunRequest(run_id=run.id))
            listed = await s.ListRuns(pb.ListRunsRequest())
            return len(got.run.transcript), [len(each.transcript) for each in listed.runs]

    assert asyncio.run(main()) == (1, [0])


# --- who calls ---


def test_one_line_is_logged_for_each_call(runtime_dir, logged):
    async def main():
        async with serving(runtime_dir) as edge, stub(RunServiceStub, edge.servers.api_socket) as s:
            metadata = (("edge-agent-client", "robot-7"),)
            await s.ListRuns(pb.ListRunsRequest(), metadata=metadata)
            await error_of(s.GetRun(pb.GetRunRequest(run_id="x")))

    asyncio.run(main())
    good, bad = logged
    assert good["event"] == bad["event"] == "rpc_finished"
    assert good["method"] == "/edge_agent.v1.RunService/ListRuns"
    assert (good["client"], good["code"], good["reason"]) == ("robot-7", "OK", None)
    assert (bad["client"], bad["code"], bad["reason"]) == ("anonymous", "NOT_FOUND", "NOT_FOUND")
    assert good["duration_ms"] > 0
    assert good["rpc_id"] != bad["rpc_id"]


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "ro'bot"])
def test_a_client_with_a_bad_name_is_refused(runtime_dir, name):
    async def main():
        async with serving(runtime_dir) as edge, stub(RunServiceStub, edge.servers.api_socket) as s:
            metadata = (("edge-agent-client", name),)
            return await error_of(s.CreateRun(pb.CreateRunRequest(spec=SPEC), metadata=metadata))

    assert asyncio.run(main()).violations[0].field == "metadata.edge-agent-client"


def test_a_run_belongs_to_the_client_that_made_it(runtime_dir):
    async def main():
        async with (
            serving(runtime_dir) as edge,
            AsyncClient(str(edge.servers.api_socket), name="robot-7") as client,
        ):
            return await client.create("hi")

    assert asyncio.run(main()).client == "robot-7"


ADMIN_CALLS = [
    (EngineServiceStub, "LoadEngine", engine_pb.LoadEngineRequest(name="small")),
    (EngineServiceStub, "UnloadEngine", engine_pb.UnloadEngineRequest(name="small")),
    (SystemServiceStub, "ReloadConfig", system_pb.ReloadConfigRequest()),
    (SystemServiceStub, "Drain", system_pb.DrainRequest()),
]


@pytest.mark.parametrize(("kind", "method", "request_"), ADMIN_CALLS)
def test_what_is_for_admin_is_refused_on_the_api_socket(runtime_dir, kind, method, request_):
    async def main():
        async with serving(runtime_dir) as edge, stub(kind, edge.servers.api_socket) as s:
            return await error_of(getattr(s, method)(request_)), edge.daemon.draining

    error, draining = asyncio.run(main())
    assert (error.code, error.reason) == ("PERMISSION_DENIED", "ADMIN_SOCKET_REQUIRED")
    assert not draining


def test_admin_may(runtime_dir):
    async def main():
        async with serving(runtime_dir) as edge:
            async with AsyncClient(str(edge.servers.admin_socket)) as client:
                loaded = await client.load("small")
                unloaded = await client.unload("small")
            async with stub(SystemServiceStub, edge.servers.admin_socket) as s:
                await s.Drain(system_pb.DrainRequest())
            return loaded, unloaded, edge.daemon.draining

    loaded, unloaded, draining = asyncio.run(main())
    assert loaded.worker.pid == 4242
    assert unloaded.worker is None
    assert draining


def test_a_halt_of_all_is_lifted_by_admin_only(runtime_dir):
    async def main():
        async with serving(runtime_dir) as edge:
            async with AsyncClient(str(edge.servers.api_socket), name="r") as client:
                everything = await client.halt(reason="smoke")
                one_tool = await client.halt(HaltScope.TOOL, "arm")
                await client.clear_halt(one_tool.halt.id)
                with pytest.raises(EdgeAgentError) as caught:
                    await client.clear_halt(everything.halt.id)
                latched = edge.runs.halts()
            async with AsyncClient(str(edge.servers.admin_socket)) as admin:
                await admin.clear_halt(everything.halt.id)
            return everything, caught.value, latched, edge.runs.halts()

    everything, refusal, latched, after = asyncio.run(main())
    assert (everything.halt.client, everything.halt.reason) == ("r", "smoke")
    assert refusal.reason == "ADMIN_SOCKET_REQUIRED"
    assert latched == (everything.halt,)
    assert after == ()


# --- streams ---


def test_a_conversation(runtime_dir):
    """Calls go out, results come back, the run ends, the client has hung up its half before."""

    async def main():
        async with serving(runtime_dir) as edge, stub(RunServiceStub, edge.servers.api_socket) as s:
            talk = s.Converse()
            await talk.write(START)
            kinds = [(await talk.read()).event.WhichOneof("kind")]
            edge.runs.issue("run-1", ToolCall("c1", "lamp", "{}"))
            kinds.append((await talk.read()).event.WhichOneof("kind"))
            result = t.ToolResult(tool_call_id="c1", parts=[t.Part(text="on")])
            await talk.write(pb.ConverseRequest(tool_results=pb.ToolResults(results=[result])))
            kinds.append((await talk.read()).event.WhichOneof("kind"))
            await talk.done_writing()
            edge.runs.finish("run-1", "The lamp is on.")
            last = (await talk.read()).event
            assert await talk.read() is grpc.aio.EOF
            return (
                [*kinds, last.WhichOneof("kind")],
                last.run_finished.run.answer,
                await talk.code(),
            )

    kinds, answer, code = asyncio.run(main())
    assert kinds == ["snapshot", "tool_calls_issued", "tool_result_accepted", "run_finished"]
    assert answer == "The lamp is on."
    assert code is grpc.StatusCode.OK


RESULTS = pb.ConverseRequest(tool_results=pb.ToolResults(results=[t.ToolResult(tool_call_id="c1")]))
NEVER_CALLED = pb.ConverseRequest(
    tool_results=pb.ToolResults(results=[t.ToolResult(tool_call_id="never")])
)


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "start"),
        ([pb.ConverseRequest()], "start"),
        ([RESULTS], "start"),
        ([START, START], "tool_results"),
        ([START, pb.ConverseRequest()], "tool_results"),
        ([START, pb.ConverseRequest(tool_results=pb.ToolResults())], "tool_results.results"),
    ],
)
def test_a_conversation_out_of_order_ends_naming_the_field(runtime_dir, messages, field):
    async def main():
        async with serving(runtime_dir) as edge, stub(RunServiceStub, edge.servers.api_socket) as s:
            error = await error_of(s.Converse(iter(messages)))
            if messages[:1] == [START]:
                await edge.runs.until(lambda: edge.runs.run("run-1").state.ended)
                assert edge.runs.run("run-1").error.reason == "INVALID_REQUEST"
                await edge.runs.until(lambda: edge.runs.watchers == 0)
            return error

    error = asyncio.run(main())
    assert error.code == "INVALID_ARGUMENT"
    assert [v.field for v in error.violations] == [field]


def test_a_result_for_a_call_that_never_was_ends_the_conversation(runtime_dir):
    async def main():
        async with serving(runtime_dir) as edge, stub(RunServiceStub, edge.servers.api_socket) as s:
            return await error_of(s.Converse(iter([START, NEVER_CALLED])))

    assert asyncio.run(main()).code == "NOT_FOUND"


def test_a_late_result_does_not_end_the_conversation(runtime_dir, logged):
    async def main():
        async with serving(runtime_dir) as edge, stub(RunServiceStub, edge.servers.api_socket) as s:
            talk = s.Converse()
            await talk.write(START)
            await talk.read()
            edge.runs.issue("run-1", ToolCall("open", "lamp", "{}"))
            results = [t.ToolResult(tool_call_id=c) for c in ("late", "open")]
            await talk.write(pb.ConverseRequest(tool_results=pb.ToolResults(results=results)))
            await edge.runs.until(lambda: edge.runs.results)
            edge.runs.finish("run-1", "done")
            events = []
            while (response := await talk.read()) is not grpc.aio.EOF:
                events.append(response.event.WhichOneof("kind"))
            return events, [result.tool_call_id for result in edge.runs.results]

    events, taken = asyncio.run(main())
    assert events[-1] == "run_finished"
    assert taken == ["open"]
    late = [line for line in logged if line["event"] == "tool_result_late"]
    assert [(line["tool_call_id"], line["reason"]) for line in late] == [
        ("late", "TOOL_CALL_NOT_OPEN")
    ]


@pytest.mark.parametrize("method", ["ExecuteRun", "Converse"])
@pytest.mark.parametrize(
    ("on_disconnect", "cancelled"),
    [
        (pb.ON_DISCONNECT_UNSPECIFIED, True),
        (pb.ON_DISCONNECT_CANCEL, True),
        (pb.ON_DISCONNECT_CONTINUE, False),
    ],
)
def test_a_client_that_vanishes(runtime_dir, logged, method, on_disconnect, cancelled):
    """Its run is cancelled, unless it is to continue."""

    async def main():
        async with serving(runtime_dir) as edge:
            start = pb.ExecuteRunRequest(spec=SPEC, on_disconnect=on_disconnect)
            async with stub(RunServiceStub, edge.servers.api_socket) as s:
                if method == "ExecuteRun":
                    call = s.ExecuteRun(start)
                else:
                    call = s.Converse()
                    await call.write(pb.ConverseRequest(start=start))
                await call.read()
                await edge.runs.until(lambda: edge.runs.watchers == 1)
            await edge.runs.until(lambda: edge.runs.watchers == 0)
            if cancelled:
                await edge.runs.until(lambda: edge.runs.run("run-1").state.ended)
            return edge.runs.run("run-1")

    run = asyncio.run(main())
    assert run.state.ended == cancelled
    assert (run.error and run.error.reason) == ("CLIENT_DISCONNECTED" if cancelled else None)
    assert [(line["event"], line["code"]) for line in logged] == [("rpc_finished", "CANCELLED")]


def test_a_watcher_that_vanishes_changes_nothing(runtime_dir):
    async def main():
        async with serving(runtime_dir) as edge:
            async with stub(RunServiceStub, edge.servers.api_socket) as s:
                await s.CreateRun(pb.CreateRunRequest(spec=SPEC))
                call = s.WatchRun(pb.WatchRunRequest(run_id="run-1"))
                await call.read()
                await edge.runs.until(lambda: edge.runs.watchers == 1)
            await edge.runs.until(lambda: edge.runs.watchers == 0)
            return edge.runs.run("run-1")

    assert not asyncio.run(main()).state.ended


def test_a_watch_goes_on_where_the_last_one_ended(runtime_dir):
    async def main():
        async with serving(runtime_dir) as edge, stub(RunServiceStub, edge.servers.api_socket) as s:
            await s.CreateRun(pb.CreateRunRequest(spec=SPEC))
            for index in range(3):
                edge.runs.emit("run-1", TextDelta(1, str(index), 1))
            edge.runs.finish("run-1", "012")
            watch = s.WatchRun(pb.WatchRunRequest(run_id="run-1", after_sequence=1))
            return [(r.event.sequence, r.event.WhichOneof("kind")) async for r in watch]

    assert asyncio.run(main()) == [
        (4, "snapshot"),
        (2, "text_delta"),
        (3, "text_delta"),
        (4, "run_finished"),
    ]


@pytest.mark.parametrize("method", ["ExecuteRun", "Converse", "WatchRun"])
def test_a_reader_that_reads_nothing(runtime_dir, logged, method):
    """Its stream ends with SLOW_READER, and its run with it, unless it only watched."""

    async def main():
        limits = replace(LIMITS, slow_reader_s=0.2)
        async with (
            serving(runtime_dir, limits) as edge,
            stub(RunServiceStub, edge.servers.api_socket, SMALL_WINDOW) as s,
        ):
            if method == "WatchRun":
                await s.CreateRun(pb.CreateRunRequest(spec=SPEC))
                call = s.WatchRun(pb.WatchRunRequest(run_id="run-1"))
            elif method == "ExecuteRun":
                call = s.ExecuteRun(pb.ExecuteRunRequest(spec=SPEC))
            else:
                call = s.Converse()
                await call.write(START)
            await call.read()
            await edge.runs.until(lambda: edge.runs.watchers == 1)
            for _ in range(100):
                edge.runs.emit("run-1", TextDelta(1, "x" * 10_000, 1))
            await edge.runs.until(lambda: edge.runs.watchers == 0)
            error = await error_of(call)
            return edge.runs.run("run-1"), error

    run, error = asyncio.run(main())
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "SLOW_READER")
    assert (run.error and run.error.reason) == (None if method == "WatchRun" else "SLOW_READER")
    finished = [line for line in logged if line["event"] == "rpc_finished"]
    assert finished[-1]["reason"] == "SLOW_READER"


def test_engines_are_watched(runtime_dir):
    async def main():
        async with (
            serving(runtime_dir) as edge,
            stub(EngineServiceStub, edge.servers.api_socket) as s,
        ):
            watch = s.WatchEngines(engine_pb.WatchEnginesRequest())
            before = await watch.read()
            await edge.engines.load("small")
            after = await watch.read()
            return before.engine.state, after.engine.state

    assert asyncio.run(main()) == (engine_pb.ENGINE_STATE_INSTALLED, engine_pb.ENGINE_STATE_READY)


# --- servers and sockets ---


def test_the_modes_of_the_sockets_do_not_depend_on_the_umask(runtime_dir):
    async def main():
        modes = {}
        for umask in (0o000, 0o777):
            before = os.umask(umask)
            try:
                async with serving(runtime_dir) as edge:
                    for path in (edge.servers.api_socket, edge.servers.admin_socket):
                        modes[umask, path.name] = stat.S_IMODE(path.stat().st_mode)
                    assert os.umask(umask) == umask
            finally:
                os.umask(before)
        return modes

    assert asyncio.run(main()) == {
        (0o000, "api.sock"): 0o660,
        (0o000, "admin.sock"): 0o600,
        (0o777, "api.sock"): 0o660,
        (0o777, "admin.sock"): 0o600,
    }


def test_a_second_daemon_is_refused_and_harms_nothing(runtime_dir):
    async def main():
        async with serving(runtime_dir) as edge:
            with pytest.raises(FailedPrecondition) as caught:
                await Edge(runtime_dir).servers.start()
            async with AsyncClient(str(edge.servers.api_socket)) as client:
                assert (await client.status()).pid == 4711
        async with serving(runtime_dir):
            pass  # the lock is free again
        return caught.value

    error = asyncio.run(main())
    assert error.reason == "ALREADY_RUNNING"
    assert error.metadata["pid"] == str(os.getpid())
    assert f"pid {os.getpid()}" in error.message


def test_the_socket_of_a_daemon_that_was_killed_is_replaced(runtime_dir):
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(runtime_dir / "api.sock"))
    stale.close()

    async def main():
        async with (
            serving(runtime_dir) as edge,
            AsyncClient(str(edge.servers.api_socket)) as client,
        ):
            return (await client.status()).version

    assert asyncio.run(main()) == "9.8.7"


def test_a_file_in_the_way_is_named_and_left_alone(runtime_dir):
    (runtime_dir / "admin.sock").write_text("precious")

    async def main():
        with pytest.raises(FailedPrecondition) as caught:
            await Edge(runtime_dir).servers.start()
        return caught.value

    error = asyncio.run(main())
    assert error.reason == "SOCKET_PATH_TAKEN"
    assert error.metadata["path"] == str(runtime_dir / "admin.sock")
    assert (runtime_dir / "admin.sock").read_text() == "precious"
    (runtime_dir / "admin.sock").unlink()

    async def again():
        async with serving(runtime_dir):
            pass

    asyncio.run(again())


def test_a_socket_that_someone_listens_on_is_not_stolen(runtime_dir):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(runtime_dir / "api.sock"))
        other.listen()

        async def main():
            with pytest.raises(FailedPrecondition) as caught:
                await Edge(runtime_dir).servers.start()
            return caught.value

        assert "another program listens" in asyncio.run(main()).message


def test_a_path_too_long_for_a_socket_is_refused_with_both_numbers(runtime_dir):
    async def start(length):
        directory = runtime_dir / ("x" * (length - len(f"{runtime_dir}//admin.sock")))
        async with serving(directory):
            pass

    asyncio.run(start(107))
    with pytest.raises(FailedPrecondition) as caught:
        asyncio.run(start(108))
    assert caught.value.reason == "SOCKET_PATH_TOO_LONG"
    assert (caught.value.metadata["size_bytes"], caught.value.metadata["limit_bytes"]) == (
        "108",
        "107",
    )


def test_a_runtime_directory_that_can_not_be_is_refused(runtime_dir):
    (runtime_dir / "file").write_text("")

    async def main():
        await Edge(runtime_dir / "file" / "below").servers.start()

    with pytest.raises(FailedPrecondition) as caught:
        asyncio.run(main())
    assert caught.value.reason == "RUNTIME_DIR_UNUSABLE"


def test_health_says_what_it_is_told(runtime_dir, logged):
    async def main():
        said = []
        async with serving(runtime_dir) as edge:
            for told in (None, True, False):
                if told is not None:
                    await edge.servers.set_serving(told)
                async with stub(health_pb2_grpc.HealthStub, edge.servers.api_socket) as s:
                    for service in ("", SERVICES[0]):
                        answer = await s.Check(health_pb2.HealthCheckRequest(service=service))
                        said.append(answer.status == health_pb2.HealthCheckResponse.SERVING)
            async with stub(health_pb2_grpc.HealthStub, edge.servers.api_socket) as s:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await s.Check(health_pb2.HealthCheckRequest(service="no.such.Service"))
            return said, caught.value.code()

    said, unknown = asyncio.run(main())
    assert said == [False, False, True, True, False, False]
    assert unknown is grpc.StatusCode.NOT_FOUND
    assert {line["event"] for line in logged} == {"rpc_finished"}
    assert {line["log_level"] for line in logged} == {"debug"}


def test_running_calls_finish_within_the_grace_period(runtime_dir):
    async def main():
        async with serving(runtime_dir) as edge, stub(RunServiceStub, edge.servers.api_socket) as s:
            call = s.ExecuteRun(pb.ExecuteRunRequest(spec=SPEC))
            await call.read()
            stopping = asyncio.create_task(edge.servers.stop(20))
            edge.runs.finish("run-1", "done")
            last = await call.read()
            await stopping
            return last.event.WhichOneof("kind"), await call.code()

    assert asyncio.run(main()) == ("run_finished", grpc.StatusCode.OK)


def buf_curl(api_socket, *arguments):
    """A client that is not ours: it knows the API by reflection only."""
    buf = shutil.which("buf", path=Path(sys.executable).parent) or shutil.which("buf")
    if buf is None:
        pytest.fail("buf is missing; `make setup` installs it")
    return subprocess.run(
        [
            buf,
            "curl",
            "--protocol",
            "grpc",
            "--http2-prior-knowledge",
            "--unix-socket",
            api_socket,
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    ).stdout


def test_a_foreign_client_finds_and_calls_the_api_by_reflection(runtime_dir):
    async def main():
        async with serving(runtime_dir) as edge:
            path = edge.servers.api_socket
            listed = await asyncio.to_thread(buf_curl, path, "--list-services", "http://localhost")
            status = await asyncio.to_thread(
                buf_curl, path, "http://localhost/edge_agent.v1.SystemService/GetStatus"
            )
            return listed.split(), json.loads(status)

    services, status = asyncio.run(main())
    assert set(services) >= {*SERVICES, "grpc.health.v1.Health"}
    assert (status["version"], status["pid"], status["state"]) == (
        "9.8.7",
        4711,
        "DAEMON_STATE_READY",
    )
