"""Bad requests, each answered typed, in time, the same on both sockets; the daemon stays well.

Every answer names what is wrong and the limit. What only the engine's worker can find (a prompt
that is too long, a schema that can't be enforced) ends the run with a reason that is stable.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from edge_agent.client.wire import typed_errors
from edge_agent.errors import EdgeAgentError
from edge_agent.v1 import engine_service_pb2 as engine_pb
from edge_agent.v1 import run_service_pb2 as run_pb
from edge_agent.v1 import system_service_pb2 as system_pb
from edge_agent.v1 import types_pb2 as pb
from tests.support.connection import (
    Connection,
    Problem,
    events,
    goal,
    result,
)
from tests.support.daemon import BASE_CONFIG, ENGINE, DaemonProcess, running_daemon

DEADLINE_S = 2.0
"""Twenty times the 100 ms that an answer should take: this machine may be busy."""
RUN_ENDS_S = 20.0
LAMP = pb.Tool(
    name="set_lamp",
    description="Switch the lamp.",
    input_schema_json='{"type":"object","properties":{"on":{"type":"boolean"}},"required":["on"],'
    '"additionalProperties":false}',
    examples=[pb.ToolExample(goal="Lights out.", arguments_json='{"on": false}')],
)
USER = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="Turn the lamp on.")])
CREATE = "/edge_agent.v1.RunService/CreateRun"
MIB = 1 << 20
NEVER = {
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}


@pytest.fixture(scope="module")
def daemon(engine_store) -> Iterator[DaemonProcess]:
    config = BASE_CONFIG + f"preload: [{ENGINE}]\n"
    with running_daemon(engine_store, config) as running:
        running.wait_for("engine_loaded")
        yield running


@pytest.fixture(params=["api", "admin"])
def client(daemon, request) -> Iterator[Connection]:
    """A connection to one of the sockets of a daemon that has not crashed when the test is over."""
    with Connection(getattr(daemon, f"{request.param}_socket")) as connection:
        yield connection
        has_not_crashed(daemon, connection)


@pytest.fixture(scope="class", autouse=True)
def _still_decides(daemon) -> Iterator[None]:
    """After all that a class has sent, a short run succeeds on both sockets."""
    yield
    for socket in (daemon.api_socket, daemon.admin_socket):
        with Connection(socket) as connection:
            is_well(daemon, connection)


def has_not_crashed(daemon: DaemonProcess, client: Connection) -> None:
    told = client.system.GetStatus(system_pb.GetStatusRequest(), timeout=DEADLINE_S)
    assert told.state == system_pb.DAEMON_STATE_READY
    for event in ("rpc_crashed", "run_crashed", "worker_lost", "worker_hung"):
        assert daemon.lines(event) == []


def is_well(daemon: DaemonProcess, client: Connection) -> None:
    """It answers, decides a run, and nothing in it has crashed."""
    has_not_crashed(daemon, client)
    run = client.end_of(client.create(goal("Hello?", max_output_tokens=1)).id)
    assert run.state == run_pb.RUN_STATE_SUCCEEDED


@pytest.fixture
def refused(record_property) -> Callable[..., Problem]:
    """Make a call that has to fail in time; what it took is in the report of
    `pytest -o junit_family=xunit1 --junit-xml`."""

    def make(call: Callable[[], Any]) -> Problem:
        started_s = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            call()
        took_ms = (time.monotonic() - started_s) * 1000
        record_property("answer_ms", round(took_ms, 1))
        problem = Problem(caught.value)
        assert problem.code not in NEVER
        assert problem.reason == problem.reason.upper() != ""
        return problem

    return make


def create(client: Connection, spec: run_pb.RunSpec, **fields: Any) -> run_pb.Run:
    request = run_pb.CreateRunRequest(spec=spec, **fields)
    return client.runs.CreateRun(request, timeout=DEADLINE_S).run


def failed(client: Connection, spec: run_pb.RunSpec, record: Callable[..., None]) -> pb.RunError:
    """The error of a run that is accepted and fails."""
    started_s = time.monotonic()
    request = run_pb.ExecuteRunRequest(spec=spec)
    *_, last = events(client.runs.ExecuteRun(request, timeout=RUN_ENDS_S))
    record("run_failed_ms", round((time.monotonic() - started_s) * 1000, 1))
    run = last.run_finished.run
    assert run.state == run_pb.RUN_STATE_FAILED
    assert run.error.reason == run.error.reason.upper() != ""
    return run.error


def raw(client: Connection, method: str, request: bytes, **options: Any) -> bytes:
    """A call of bytes that need be no message."""
    call: Any = client.channel.unary_unary(method, None, None)
    time_s = DEADLINE_S * (1 + len(request) // (6 * MIB))  # what is large has to be sent first
    answer: bytes = call(request, timeout=time_s, **options)
    return answer


class TestNames:
    def test_an_unknown_engine_names_the_installed_ones(self, client, refused):
        problem = refused(lambda: create(client, goal("Hi", engine="nobody")))
        assert (problem.code, problem.reason) == (grpc.StatusCode.NOT_FOUND, "ENGINE_NOT_FOUND")
        assert problem.metadata["engine"] == "nobody"
        assert problem.metadata["installed"] == ENGINE

    @pytest.mark.parametrize(
        "name",
        ["../../etc/passwd", "..", "/etc", ".lock", f"./{ENGINE}", f"{ENGINE}/", "a\nb", "é"],
    )
    def test_a_name_is_no_path(self, client, refused, name):
        for call in (
            lambda: client.engines.GetEngine(
                engine_pb.GetEngineRequest(name=name), timeout=DEADLINE_S
            ),
            lambda: create(client, goal("Hi", engine=name)),
        ):
            problem = refused(call)
            assert problem.reason == "ENGINE_NOT_FOUND"
            assert problem.metadata["engine"] == name

    def test_a_name_that_is_too_long_names_the_limit(self, client, refused):
        asked = engine_pb.GetEngineRequest(name="x" * 65)
        problem = refused(lambda: client.engines.GetEngine(asked, timeout=DEADLINE_S))
        assert problem.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "65 bytes, at most 64" in problem.fields["name"]

    def test_an_earlier_call_of_an_unknown_tool_names_the_known_ones(self, client, refused):
        call = pb.ToolCall(id="1", name="fly", arguments_json="{}")
        earlier = pb.Message(role=pb.ROLE_ASSISTANT, tool_calls=[call])
        spec = run_pb.RunSpec(messages=[USER, earlier, USER], tools=[LAMP])
        problem = refused(lambda: create(client, spec))
        assert problem.code is grpc.StatusCode.INVALID_ARGUMENT
        assert problem.fields == {
            "spec.messages[1].tool_calls[0].name": '"fly" is no tool of this run: set_lamp'
        }


class TestSchemas:
    @pytest.mark.parametrize(
        "schema",
        [
            {"type": "object", "required": 5},
            {"type": "object", "properties": []},
            {"type": "object", "properties": {"a": {"type": "strnig"}}},
            {"type": "object", "properties": {"a": {"enum": 5}}},
            {"type": "object", "properties": {"a": 5}},
            {"type": "object", "properties": {"a": {"description": ["x"]}}},
            {"type": "object", "$schema": "http://127.0.0.1:1/none"},
        ],
        ids=json.dumps,
    )
    def test_what_is_no_schema_fails_the_run_naming_the_tool(self, client, record_property, schema):
        text = json.dumps(schema)
        bad = pb.Tool(name="probe", description="Probe.", input_schema_json=text)
        error = failed(client, goal("Hi", tools=[LAMP, bad]), record_property)
        assert (error.reason, error.metadata["tool"]) == ("SCHEMA_INVALID", "probe")
        assert error.metadata["detail"] in error.message
        assert failed(
            client, goal("Hi", output_schema_json=text), record_property
        ).reason == "SCHEMA_INVALID"  # fmt: skip

    @pytest.mark.parametrize(
        ("schema", "named"),
        [
            ({"not": {"type": "string"}}, "not"),
            ({"if": {}, "then": {}}, "if"),
            ({"type": "array", "uniqueItems": True}, "uniqueItems"),
            ({"contains": {}}, "contains"),
            ({"type": "object", "dependentRequired": {}}, "dependentRequired"),
            ({"type": "object", "propertyNames": {}}, "propertyNames"),
            ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
            ({"oneOf": [{"type": "object"}, {"minProperties": 1}]}, "oneOf"),
            ({"type": "string", "format": "nonsense"}, "nonsense"),
            ({"type": "string", "pattern": "(?=a)b"}, "regex"),
            ({"$ref": "#/$defs/none"}, "/$defs/none"),
            ({"$ref": "http://127.0.0.1:1/x"}, "http://127.0.0.1:1/x"),
            ({"type": "integer", "minimum": 5, "maximum": 4}, "nsatisfiable"),
        ],
        ids=str,
    )
    def test_what_can_not_be_enforced_is_refused_by_name(
        self, client, record_property, schema, named
    ):
        text = json.dumps({"type": "object", "properties": {"a": schema}, "required": ["a"]})
        bad = pb.Tool(name="probe", description="Probe.", input_schema_json=text)
        error = failed(client, goal("Hi", tools=[LAMP, bad]), record_property)
        assert (error.reason, error.metadata["tool"]) == ("SCHEMA_UNSUPPORTED", "probe")
        assert named in error.message
        output = failed(client, goal("Hi", output_schema_json=text), record_property)
        assert (output.reason, output.metadata["tool"]) == ("SCHEMA_UNSUPPORTED", "")
        assert named in output.message

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{", "is not JSON"),
            ("[]", "is not a JSON object"),
            ('{"type":"string"}', 'must have "type": "object"'),
            ('{"type":"object","type":"object"}', "appears twice"),
            ('{"type":"object","a":NaN}', "NaN is not a JSON value"),
            ('{"type":"object","a":1e999}', "too large a number"),
            ('{"type":"object","a":"\\u0000"}', "has a NUL character"),
            ('{"type":"object","a":"\\ud800"}', "half a surrogate pair"),
            (
                '{"type":"object","x-guidance":{"lenient":true}}',
                '"x-guidance" is the daemon\'s own',
            ),
            ('{"type":"object","a":' + "[" * 64 + "]" * 64 + "}", "deeper than 64 levels"),
            ('{"type":"object","a":' + "[" * 50_000 + "]" * 50_000 + "}", "deeper than 64 levels"),
            ('{"type":"object","a":[' + "[]," * 70_000 + "[]]}", "brackets"),
            ('{"type":"object","a":"' + "x" * MIB + '"}', "characters of JSON"),
        ],
        ids=range(13),
    )
    def test_what_the_daemon_sees_by_itself_is_refused_at_once(self, client, refused, text, said):
        bad = pb.Tool(name="probe", input_schema_json=text)
        problem = refused(lambda: create(client, goal("Hi", tools=[LAMP, bad])))
        assert problem.code is grpc.StatusCode.INVALID_ARGUMENT
        assert said in problem.fields["spec.tools[1].input_schema_json"]


class TestTooMuch:
    @pytest.mark.parametrize("size", [100_000, MIB, 4 * MIB - 1000])
    def test_a_prompt_longer_than_the_context_is_never_cut(self, client, record_property, size):
        error = failed(client, goal("word " * (size // 5)), record_property)
        assert error.reason == "PROMPT_TOO_LONG"
        assert int(error.metadata["prompt_tokens"]) > int(error.metadata["context_tokens"])
        assert error.metadata["context_tokens"] in error.message

    @pytest.mark.parametrize("size", [4 * MIB, 6 * MIB, 48 * MIB])
    def test_a_request_above_the_limit_is_refused_with_both_numbers(self, client, refused, size):
        request = run_pb.CreateRunRequest(spec=goal("x" * size)).SerializeToString()
        problem = refused(lambda: raw(client, CREATE, request))
        assert problem.code is grpc.StatusCode.INVALID_ARGUMENT
        assert problem.reason == "REQUEST_TOO_LARGE"
        assert problem.metadata == {
            "size_bytes": str(len(request)),
            "limit_bytes": str(4 * MIB),
        }
        start = run_pb.ConverseRequest(start=run_pb.ExecuteRunRequest(spec=goal("x" * size)))
        talk = refused(lambda: list(client.runs.Converse(iter([start]), timeout=9 * DEADLINE_S)))
        assert talk.reason == "REQUEST_TOO_LARGE"

    @pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip])
    def test_above_64_mib_grpc_itself_refuses_and_memory_stays(self, daemon, client, compression):
        before = rss_bytes(daemon)
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as caught:
                raw(client, CREATE, bytes(65 * MIB), compression=compression)
            problem = Problem(caught.value)
            assert problem.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "larger than max" in problem.message
        with pytest.raises(EdgeAgentError) as typed, typed_errors("the daemon"):
            raw(client, CREATE, bytes(65 * MIB), compression=compression)
        assert typed.value.reason == "REQUEST_TOO_LARGE"
        assert rss_bytes(daemon) - before < 200 * MIB

    def test_ten_thousand_tools_are_refused_by_their_number(self, client, refused):
        spec = goal("Hi")
        spec.tools.extend(pb.Tool(name="no name", input_schema_json="{") for _ in range(10_000))
        problem = refused(lambda: create(client, spec))
        assert problem.fields == {"spec.tools": "10000 tools, at most 256 allowed (runs.max_tools)"}

    @pytest.mark.parametrize(
        ("spec", "field"),
        [
            (run_pb.RunSpec(messages=[USER] * 100_000), "spec.messages"),
            (
                run_pb.RunSpec(
                    messages=[pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="x")] * 500_000)]
                ),
                "spec.messages",
            ),
            (
                goal("Hi", tools=[pb.Tool(name="probe", examples=[LAMP.examples[0]] * 100_000)]),
                "spec.tools[0].examples",
            ),
        ],
        ids=["messages", "parts", "examples"],
    )
    def test_what_is_looked_at_one_by_one_is_counted_first(self, client, refused, spec, field):
        assert list(refused(lambda: create(client, spec)).fields) == [field]

    def test_a_list_of_all_states_many_times_over(self, client, refused):
        asked = run_pb.ListRunsRequest(states=[run_pb.RUN_STATE_QUEUED] * MIB, page_size=1001)
        problem = refused(lambda: client.runs.ListRuns(asked, timeout=DEADLINE_S))
        assert set(problem.fields) == {"states", "page_size"}

    @pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000], ids=["list", "object"])
    def test_deeply_nested_arguments_are_refused(self, client, refused, text):
        tool = pb.Tool(name="probe", examples=[pb.ToolExample(goal="x", arguments_json=text)])
        call = pb.ToolCall(id="1", name="probe", arguments_json=text)
        earlier = pb.Message(role=pb.ROLE_ASSISTANT, tool_calls=[call])
        spec = run_pb.RunSpec(messages=[USER, earlier, USER], tools=[tool])
        assert set(refused(lambda: create(client, spec)).fields) == {
            "spec.tools[0].examples[0].arguments_json",
            "spec.messages[1].tool_calls[0].arguments_json",
        }


def rss_bytes(daemon: DaemonProcess) -> int:
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    (line,) = [each for each in status.splitlines() if each.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


class TestMessages:
    def test_everything_empty_is_named(self, client, refused):
        problem = refused(lambda: create(client, run_pb.RunSpec()))
        assert problem.fields == {"spec.messages": "is empty, at least 1 message expected"}
        problem = refused(
            lambda: client.runs.CreateRun(run_pb.CreateRunRequest(), timeout=DEADLINE_S)
        )
        assert problem.fields == {"spec": "is missing"}
        spec = run_pb.RunSpec(
            messages=[
                pb.Message(role=pb.ROLE_USER),
                pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text=" \n")]),
                pb.Message(),
            ]
        )
        assert refused(lambda: create(client, spec)).fields == {
            "spec.messages[0].parts": "has no text",
            "spec.messages[1].parts": "has no text",
            "spec.messages[2].role": "0 is no role",
        }

    @pytest.mark.parametrize("kind", ["image", "audio"])
    def test_a_part_that_is_not_text_is_refused(self, client, refused, kind):
        blob = pb.Part()
        getattr(blob, kind).MergeFrom(pb.Blob(media_type="image/jpeg", data=b"\xff\xd8"))
        spec = run_pb.RunSpec(messages=[pb.Message(role=pb.ROLE_USER, parts=[blob])])
        problem = refused(lambda: create(client, spec))
        assert (problem.code, problem.reason) == (
            grpc.StatusCode.UNIMPLEMENTED,
            "UNSUPPORTED_PART",
        )
        assert problem.metadata["part"] == f"spec.messages[0].parts[0].{kind}"

    def test_five_wrong_fields_are_named_at_once(self, client, refused):
        spec = goal("Hi", agent="x" * 65, max_steps=0, max_tool_calls=1000, timeout_s=1e6)
        spec.sampling.temperature = float("nan")
        assert set(refused(lambda: create(client, spec)).fields) == {
            "spec.agent",
            "spec.limits.max_steps",
            "spec.limits.max_tool_calls",
            "spec.timeout",
            "spec.sampling.temperature",
        }

    def test_more_output_than_the_engine_has_fails_the_run(self, client, record_property):
        error = failed(client, goal("Hi", max_output_tokens=2**32 - 1), record_property)
        assert error.reason == "MAX_OUTPUT_TOO_LONG"
        assert error.metadata["max_output_tokens"] == str(2**32 - 1)


class TestBytes:
    @pytest.mark.parametrize(
        "request_",
        [b"\xff\xff\xff", b"\x0a\x7f", b"\x7b" * 5000 + b"\x7c" * 5000, b"\x0a\x04" * 100_000],
        ids=["garbage", "cut", "groups", "nested"],
    )
    def test_what_is_no_message_is_refused(self, client, refused, request_):
        problem = refused(lambda: raw(client, CREATE, request_))
        assert problem.code is grpc.StatusCode.INVALID_ARGUMENT
        assert problem.reason == "MALFORMED_MESSAGE"
        assert problem.metadata["message"] == "edge_agent.v1.CreateRunRequest"
        stream = client.channel.stream_stream("/edge_agent.v1.RunService/Converse", None, None)
        talk = refused(lambda: list(stream(iter([request_]), timeout=DEADLINE_S)))
        assert talk.reason == "MALFORMED_MESSAGE"


SERVICES = (run_pb, engine_pb, system_pb)
MARK = "MARK"


def unary_methods() -> dict[str, type[Any]]:
    """Every method that takes one message, and the class of that message."""
    found = {}
    for module in SERVICES:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                path = f"/{service.full_name}/{method.name}"
                if not method.client_streaming:
                    found[path] = getattr(module, method.input_type.name)
    return found


def text_fields(message: Descriptor, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The way to every string field below a message."""
    for field in message.fields:
        way = (*prefix, field.name)
        if field.type == FieldDescriptor.TYPE_STRING:
            yield way
        elif field.message_type is not None:
            yield from text_fields(field.message_type, way)


WAYS = [
    (path, way) for path, kind in unary_methods().items() for way in text_fields(kind.DESCRIPTOR)
]


def filled(message: Any, way: tuple[str, ...], text: str) -> None:
    """Put the text where the way leads, with just enough around it."""
    first_name, *rest = way
    field = message.DESCRIPTOR.fields_by_name[first_name]
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        getattr(message, first_name).update({text: "x"} if rest == ["key"] else {"x": text})
        return
    if not rest:
        if field.is_repeated:
            getattr(message, first_name).append(text)
        else:
            setattr(message, first_name, text)
        return
    inner = getattr(message, first_name)
    filled(inner.add() if field.is_repeated else inner, tuple(rest), text)


def with_text(path: str, way: tuple[str, ...], text: str) -> Any:
    """A request that is right but for the text in one of its fields."""
    request = unary_methods()[path]()
    if "spec" in request.DESCRIPTOR.fields_by_name and way[:2] != ("spec", "messages"):
        request.spec.messages.append(USER)
    if way[:2] == ("spec", "tools") and way[2] != "name":
        tool = request.spec.tools.add(name="probe")
        filled(tool, way[2:], text)
    elif way[:2] == ("spec", "messages"):
        message = request.spec.messages.add(role=pb.ROLE_USER)
        filled(message, way[2:], text)
    else:
        filled(request, way, text)
    return request


class TestText:
    """Every string field of every request, found by the descriptors."""

    def test_all_of_them_are_found(self):
        assert len(WAYS) > 40
        assert {way[-1] for _, way in WAYS} >= {
            "text", "name", "run_id", "arguments_json", "input_schema_json", "target", "page_token",
        }  # fmt: skip

    def test_a_nul_never_gets_through_unseen(self, client):
        for path, way in WAYS:
            request = with_text(path, way, "nul\0nul")
            try:
                answer = raw(client, path, request.SerializeToString())
            except grpc.RpcError as error:
                problem = Problem(error)
                assert problem.code not in NEVER, (path, way)
                assert problem.reason, (path, way)
            else:
                assert b"\0nul" not in answer
                assert way == ("reason",), "only the reason of a Halt is taken, without it"
                undo_halts(client)

    def test_half_a_surrogate_pair_is_refused_by_the_fields_name(self, client, refused):
        for path, way in WAYS:
            request = with_text(path, way, MARK).SerializeToString()
            wrong = request.replace(MARK.encode(), b"\xed\xa0\x80x")
            problem = refused(functools.partial(raw, client, path, wrong))
            if problem.reason == "ADMIN_SOCKET_REQUIRED":
                continue
            assert problem.code is grpc.StatusCode.INVALID_ARGUMENT, (path, way)
            ((field, said),) = problem.fields.items()
            assert re.sub(r"\[\d+\]", "", field) == ".".join(way)
            assert said.startswith("is not UTF-8: ed")

    @pytest.mark.parametrize(
        "place", ["user", "system", "description", "example", "schema", "arguments", "result"]
    )
    def test_control_tokens_are_text(self, client, place):
        """Ten markers read as control tokens would be ten tokens; as text they are many more."""
        plain = prompt_tokens(client, place, "")
        marked = prompt_tokens(client, place, "<|im_end|>" * 10)
        assert marked - plain > 30


def undo_halts(client: Connection) -> None:
    status = client.system.GetStatus(system_pb.GetStatusRequest(), timeout=DEADLINE_S)
    for halt in status.halts:
        client.clear_halt(halt.halt_id)


def prompt_tokens(client: Connection, place: str, text: str) -> int:
    """What the prompt takes with the text in one place of the conversation."""
    tool = pb.Tool()
    tool.CopyFrom(LAMP)
    call = pb.ToolCall(id="1", name="set_lamp", arguments_json='{"on":true}')
    spec = run_pb.RunSpec(tools=[tool], limits=pb.Limits(max_steps=1, max_output_tokens=4))
    spec.messages.add(role=pb.ROLE_SYSTEM).parts.add(text="Obey." + text * (place == "system"))
    spec.messages.add(role=pb.ROLE_USER).parts.add(text="On!" + text * (place == "user"))
    if place == "arguments":
        call.arguments_json = json.dumps({"on": text})
    spec.messages.add(role=pb.ROLE_ASSISTANT, tool_calls=[call])
    answer = spec.messages.add(role=pb.ROLE_TOOL, tool_call_id="1")
    answer.parts.add(text="ok" + text * (place == "result"))
    if place == "description":
        spec.tools[0].description += text
    if place == "example":
        spec.tools[0].examples[0].goal += text
    if place == "schema":
        schema = {"type": "object", "properties": {"on": {"enum": ["a" + text]}}}
        spec.tools[0].input_schema_json = json.dumps(schema)
    run = client.end_of(create(client, spec).id)
    assert run.state in {run_pb.RUN_STATE_SUCCEEDED, run_pb.RUN_STATE_FAILED}
    assert run.usage.prompt_tokens, run.error
    return run.usage.prompt_tokens


class TestToolResults:
    @pytest.fixture
    def waiting(self, client) -> Iterator[run_pb.Run]:
        """A run that waits for the result of `call-1`."""
        limits = pb.Limits(max_steps=2, max_output_tokens=32)
        spec = run_pb.RunSpec(messages=[USER], tools=[LAMP], limits=limits)
        run = create(client, spec)
        client.until(run.id, "tool_calls_issued")
        yield client.get(run.id)
        client.runs.CancelRun(run_pb.CancelRunRequest(run_id=run.id), timeout=DEADLINE_S)

    def test_nobody_asked_for_it(self, client, refused, waiting):
        problem = refused(lambda: client.submit(waiting.id, result("call-7")))
        assert (problem.code, problem.reason) == (
            grpc.StatusCode.NOT_FOUND,
            "TOOL_CALL_NOT_FOUND",
        )
        assert problem.metadata == {"run_id": waiting.id, "tool_call_id": "call-7"}
        assert client.get(waiting.id).state == run_pb.RUN_STATE_WAITING_TOOL

    def test_twice(self, client, refused, waiting):
        problem = refused(lambda: client.submit(waiting.id, result("call-1"), result("call-1")))
        assert problem.fields == {"results[1].tool_call_id": '"call-1" appears twice'}
        client.submit(waiting.id, result("call-1"))
        problem = refused(lambda: client.submit(waiting.id, result("call-1")))
        assert problem.code is grpc.StatusCode.FAILED_PRECONDITION
        assert problem.reason in {"TOOL_CALL_CLOSED", "RUN_ENDED"}

    def test_for_a_run_that_has_ended(self, client, refused):
        run = client.end_of(create(client, goal("Hi", max_output_tokens=1)).id)
        problem = refused(lambda: client.submit(run.id, result("call-1")))
        assert (problem.code, problem.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "RUN_ENDED",
        )

    def test_for_a_run_that_never_was(self, client, refused):
        problem = refused(lambda: client.submit("nobody", result("call-1")))
        assert (problem.code, problem.reason) == (grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND")

    @pytest.mark.parametrize(
        ("results", "field", "said"),
        [
            ([], "results", "is empty"),
            ([result("call-1", "x" * (256 * 1024 + 1))], "results[0].parts", "at most 262144"),
            ([result("call-1", "a\0b")], "results[0].parts[0].text", "NUL"),
            ([result("")], "results[0].tool_call_id", "is empty"),
            ([result(f"call-{n}") for n in range(4096)], "results", "at most 4096"),
        ],
        ids=["none", "large", "nul", "nameless", "many"],
    )
    def test_of_the_wrong_size(self, client, refused, waiting, results, field, said):
        problem = refused(lambda: client.submit(waiting.id, *results))
        assert problem.code is grpc.StatusCode.INVALID_ARGUMENT
        assert said in problem.fields[field]
        assert client.get(waiting.id).state == run_pb.RUN_STATE_WAITING_TOOL

    def test_an_empty_or_deeply_nested_result_is_a_result(self, client, waiting):
        client.submit(waiting.id, result("call-1", "[" * 1000))
        assert client.end_of(waiting.id).state == run_pb.RUN_STATE_SUCCEEDED

    def test_a_conversation_ends_at_a_result_that_nobody_asked_for(self, client, refused):
        spec = run_pb.RunSpec(messages=[USER], tools=[LAMP])
        start = run_pb.ConverseRequest(start=run_pb.ExecuteRunRequest(spec=spec))
        wrong = run_pb.ConverseRequest(tool_results=run_pb.ToolResults(results=[result("call-7")]))
        problem = refused(
            lambda: list(client.runs.Converse(iter([start, wrong]), timeout=DEADLINE_S))
        )
        assert problem.reason == "TOOL_CALL_NOT_FOUND"


class TestWatching:
    def test_an_event_that_has_not_happened(self, client, refused):
        run = create(client, goal("Hi", max_output_tokens=1))
        asked = run_pb.WatchRunRequest(run_id=run.id, after_sequence=2**64 - 1)
        problem = refused(lambda: list(client.runs.WatchRun(asked, timeout=DEADLINE_S)))
        assert problem.code is grpc.StatusCode.INVALID_ARGUMENT
        assert "is above" in problem.fields["after_sequence"]

    def test_a_page_that_was_never_given_out(self, client, refused):
        asked = run_pb.ListRunsRequest(page_token="nonsense")
        problem = refused(lambda: client.runs.ListRuns(asked, timeout=DEADLINE_S))
        assert "'nonsense' is not a token of this list" in problem.fields["page_token"]


def given_up(daemon: DaemonProcess) -> int:
    return [line["reason"] for line in daemon.lines("rpc_finished")].count("SLOW_READER")


@pytest.mark.parametrize("socket", ["api", "admin"])
def test_clients_that_read_nothing_hurt_nobody(engine_store, socket):
    """The run's snapshot alone is larger than what fits into an unread stream."""
    config = (
        f"runs: {{default_engine: {ENGINE}, slow_reader: 1s, max_tool_result_size: 4MiB}}\n"
        f"worker: {{threads: 1}}\npreload: [{ENGINE}]\n"
    )
    small_window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384))
    with running_daemon(engine_store, config) as daemon:
        daemon.wait_for("engine_loaded")
        path = daemon.api_socket if socket == "api" else daemon.admin_socket
        with Connection(path) as client:
            spec = run_pb.RunSpec(messages=[USER], tools=[LAMP], limits=pb.Limits(max_steps=2))
            run = client.create(spec)
            client.until(run.id, "tool_calls_issued")
            client.submit(run.id, result("call-1", "word " * 400_000))
            ended = client.end_of(run.id)
            assert ended.error.reason == "PROMPT_TOO_LONG"
            deaf = [Connection(path, f"deaf-{n}", small_window) for n in range(20)]
            asked = run_pb.WatchRunRequest(run_id=run.id, after_sequence=0)
            calls = [each.runs.WatchRun(asked, timeout=60) for each in deaf]
            try:
                while given_up(daemon) < len(deaf):
                    is_well(daemon, client)
                problems = []
                for call in calls:  # whoever reads after all gets what was sent, and then the end
                    with pytest.raises(grpc.RpcError) as caught:
                        list(call)
                    problems.append(Problem(caught.value).reason)
                assert set(problems) == {"SLOW_READER"}
            finally:
                for each in deaf:
                    each.__exit__()
            is_well(daemon, client)
