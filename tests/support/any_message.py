"""Requests of every kind for property tests, made from the descriptors: valid ones and others.

And a way to send them that reports how a call ended.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, cast

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

from edge_agent.v1 import engine_service_pb2, run_service_pb2, system_service_pb2
from edge_agent.v1 import types_pb2 as pb
from tests.support.connection import Problem

DEADLINE_S: Final = 2.0
PATIENT_S: Final = 20.0
"""Tells a call that hangs from a machine that is busy."""
_LONGEST_WAIT_S = 3600
READ_MESSAGES: Final = 20
_MODULES = (run_service_pb2, engine_service_pb2, system_service_pb2)
METHODS: Final[dict[str, MethodDescriptor]] = {
    f"/{service.full_name}/{method.name}": method
    for module in _MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}

_F = FieldDescriptor
_WORDS = st.sampled_from(
    [
        "", "tiny", "nobody", "call-1", "set_lamp", "answer", "anonymous", "../x", ".", "a\0b",
        "{}", "[]", "{", '{"type":"object"}', '{"type":"object","properties":{"a":{"not":{}}}}',
        '{"a":NaN}', '{"a":1e999}', '{"a":"\\ud800"}', '{"a":1,"a":2}', "[" * 300, '{"a":' * 300,
        "<|im_end|>", "\u202e", "😀", "\x7f\x1b[2J", "x" * 64, "x" * 65, "x" * 300, "x" * 300_000,
    ]
)  # fmt: skip
_SMALL = st.integers(-9, 20)
_SIGNED32, _SIGNED64 = st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1)
_UNSIGNED32, _UNSIGNED64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
_SCALARS: dict[int, st.SearchStrategy[Any]] = {
    _F.TYPE_STRING: _WORDS | st.text(max_size=40),
    _F.TYPE_BYTES: st.binary(max_size=100),
    _F.TYPE_BOOL: st.booleans(),
    _F.TYPE_DOUBLE: st.floats(),
    _F.TYPE_FLOAT: st.floats(width=32),
    _F.TYPE_ENUM: st.integers(-1, 12) | _SIGNED32,
    _F.TYPE_INT32: _SMALL | _SIGNED32,
    _F.TYPE_INT64: _SMALL | _SIGNED64,
    _F.TYPE_UINT32: st.integers(0, 20) | _UNSIGNED32,
    _F.TYPE_UINT64: st.integers(0, 20) | _UNSIGNED64,
}
_USER = pb.Message(role=pb.ROLE_USER, parts=[pb.Part(text="Turn the lamp on.")])
_SPEC = run_service_pb2.RunSpec(
    messages=[_USER],
    engine="tiny",
    tools=[pb.Tool(name="set_lamp", input_schema_json='{"type":"object"}')],
)
_START = run_service_pb2.ExecuteRunRequest(spec=_SPEC)
_VALID: dict[str, Message] = {
    "CreateRunRequest": run_service_pb2.CreateRunRequest(spec=_SPEC),
    "ExecuteRunRequest": _START,
    "ConverseRequest": run_service_pb2.ConverseRequest(start=_START),
    "SubmitToolResultsRequest": run_service_pb2.SubmitToolResultsRequest(
        run_id="nobody", results=[pb.ToolResult(tool_call_id="call-1")]
    ),
    "HaltRequest": run_service_pb2.HaltRequest(
        scope=run_service_pb2.HALT_SCOPE_AGENT, target="patrol"
    ),
}


def requests(method: str, words: st.SearchStrategy[str] | None = None) -> st.SearchStrategy[Any]:
    """Lists of messages for a method: one, or for a stream of requests any number.

    `words` are more values for its string fields, such as ids that exist.
    """
    descriptor = METHODS[method]
    kind = message_factory.GetMessageClass(descriptor.input_type)
    valid = _VALID.get(descriptor.input_type.name, kind())
    one = st.just(valid) | _changed(valid, kind, words) | _any(kind, words)
    if descriptor.client_streaming:
        return st.lists(one, max_size=4)
    return one.map(lambda message: [message])


def _any(kind: type[Message], words: st.SearchStrategy[str] | None) -> st.SearchStrategy[Message]:
    """Each field set or not; of a oneof the last one stays."""
    fields = {field.name: _values(field, words) for field in kind.DESCRIPTOR.fields}
    return st.fixed_dictionaries({}, optional=fields).map(lambda found: _built(kind, found))


def _changed(
    valid: Message, kind: type[Message], words: st.SearchStrategy[str] | None
) -> st.SearchStrategy[Message]:
    """The valid message with one of its fields, at any depth, set or added to otherwise."""

    def merged(found: Message) -> Message:
        both = kind()
        both.CopyFrom(valid)
        both.MergeFrom(found)
        return both

    ways = []
    for field in kind.DESCRIPTOR.fields:
        values = _values(field, words)
        inner = field.message_type
        if inner is not None and not field.is_repeated:
            below = message_factory.GetMessageClass(cast("Descriptor", inner))
            values = values | _changed(below(), below, words)
        ways.append(values.map(functools.partial(_with, kind, field.name)))
    return st.one_of(ways).map(merged) if ways else st.just(valid)


def _with(kind: type[Message], name: str, value: Any) -> Message:
    return _built(kind, {name: value})


def _values(field: Any, words: st.SearchStrategy[str] | None) -> Any:
    if field.message_type is not None:
        one: Any = _any(message_factory.GetMessageClass(field.message_type), words)
    else:
        one = _SCALARS[field.type]
        if words is not None and field.type == _F.TYPE_STRING:
            one = one | words
    return st.lists(one, max_size=4) if field.is_repeated else one


def _built(kind: type[Message], found: dict[str, Any]) -> Message:
    message = kind()
    for name, value in found.items():
        if isinstance(value, Message):
            getattr(message, name).CopyFrom(value)
            getattr(message, name).SetInParent()
        elif _is_map(kind, name):
            getattr(message, name).update({entry.key: entry.value for entry in value})
        elif isinstance(value, list):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message


def _is_map(kind: type[Message], name: str) -> bool:
    entry = kind.DESCRIPTOR.fields_by_name[name].message_type
    return entry is not None and entry.GetOptions().map_entry


@dataclass(frozen=True)
class Ended:
    """How a call ended. `problem` None: well, or cancelled by us after some messages."""

    method: str
    responses: Sequence[Message]
    problem: Problem | None

    @property
    def answered(self) -> bool:
        """In time, and as promised: well, or with a typed error of the daemon's own."""
        wrong = {
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.UNKNOWN,
            grpc.StatusCode.DEADLINE_EXCEEDED,
        }
        return self.problem is None or (
            self.problem.code not in wrong and self.problem.reason != ""
        )


class Wire:
    """One connection that sends messages as bytes."""

    def __init__(self, socket: Path) -> None:
        self._channel = grpc.insecure_channel(
            f"unix:{socket}", options=[("grpc.use_local_subchannel_pool", 1)]
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def send(self, method: str, messages: Sequence[Message]) -> Ended:
        """Make a call, and read what comes up to a bound."""
        ended = self._call(method, messages, DEADLINE_S)
        if ended.problem and ended.problem.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            ended = self._call(method, messages, PATIENT_S)
        return ended

    def _call(self, method: str, messages: Sequence[Message], timeout_s: float) -> Ended:
        descriptor = METHODS[method]
        kind = message_factory.GetMessageClass(descriptor.output_type)
        coding: tuple[Callable[[Message], bytes], Callable[[bytes], Message]] = (
            lambda message: message.SerializeToString(),
            kind.FromString,
        )
        responses: list[Message] = []
        try:
            if not descriptor.server_streaming:
                _wait_less(messages[0])
                call = self._channel.unary_unary(method, *coding)
                responses.append(call(messages[0], timeout=timeout_s))
            elif descriptor.client_streaming:
                stream = self._channel.stream_stream(method, *coding)
                responses += _read(stream(iter(messages), timeout=timeout_s), method)
            else:
                watch = self._channel.unary_stream(method, *coding)
                responses += _read(watch(messages[0], timeout=timeout_s), method)
        except grpc.RpcError as error:
            return Ended(method, responses, Problem(error))
        return Ended(method, responses, None)


def _wait_less(message: Message) -> None:
    """A call that waits for as long as it is told to is told so for a moment."""
    wait = getattr(message, "wait", None)
    if wait is not None and 0 < wait.seconds <= _LONGEST_WAIT_S:
        wait.seconds, wait.nanos = 0, 1_000_000


def _read(call: Any, method: str) -> Iterator[Message]:
    """What comes until the end, or until it is enough; a watch of engines has no end."""
    enough = 1 if method.endswith(("/WatchEngines", "/WatchTelemetry")) else READ_MESSAGES
    for count, response in enumerate(call, 1):
        yield response
        if count == enough:
            call.cancel()
            return
