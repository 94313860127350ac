"""The frames between the daemon and a worker: they come out as they went in, or are refused."""

import itertools
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent import frames
from edge_agent.core import (
    BlobPart,
    FinishReason,
    Message,
    PartKind,
    Role,
    RunError,
    Sampling,
    StepRequest,
    StepResult,
    TextPart,
    Tool,
    ToolCall,
    ToolExample,
    Usage,
)
from edge_agent.engines import protocol
from edge_agent.engines.manifest import Manifest, decode_manifest
from tests.support.engine_files import FILES, recipe_data

INTEGERS = st.integers(-(2**63), 2**63 - 1)  # what MessagePack holds
SECONDS = st.floats(allow_nan=False)
TEXT = st.text(max_size=20)


def tuples(of: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(of, max_size=2).map(tuple)


PARTS = tuples(
    st.builds(TextPart, TEXT)
    | st.builds(BlobPart, st.sampled_from(PartKind), TEXT, st.binary(max_size=20))
)
MAYBE_SECONDS = st.none() | SECONDS
CALLS = tuples(st.builds(ToolCall, TEXT, TEXT, TEXT, MAYBE_SECONDS, MAYBE_SECONDS))
REQUESTS = st.builds(
    StepRequest,
    messages=tuples(st.builds(Message, st.sampled_from(Role), PARTS, CALLS, TEXT, st.booleans())),
    tools=tuples(
        st.builds(
            Tool, TEXT, TEXT, TEXT, tuples(st.builds(ToolExample, TEXT, TEXT, TEXT)), MAYBE_SECONDS
        )
    ),
    output_schema_json=TEXT,
    answer_only=st.booleans(),
    max_output_tokens=st.none() | INTEGERS,
    sampling=st.builds(Sampling, SECONDS, SECONDS, st.none() | INTEGERS),
)
USAGES = st.builds(
    Usage, INTEGERS, INTEGERS, INTEGERS, SECONDS, SECONDS, SECONDS, ttft_ms=MAYBE_SECONDS
)
RESULTS = st.builds(StepResult, TEXT, CALLS, st.sampled_from(FinishReason), USAGES, MAYBE_SECONDS)
ERRORS = st.builds(RunError, TEXT, TEXT, st.booleans(), st.dictionaries(TEXT, TEXT, max_size=2))
DELTAS = st.builds(protocol.Delta, INTEGERS, TEXT, INTEGERS)
FINISHED = st.builds(protocol.Finished, INTEGERS, RESULTS)
FAILED = st.builds(protocol.Failed, INTEGERS, ERRORS)


def manifest() -> Manifest:
    data = recipe_data(FILES)
    del data["obtain"]
    source = {"kind": "path", "location": "files"}
    return decode_manifest(msgspec.json.encode(data | {"source": source}))


OPTIONS = protocol.Options(
    slots=2,
    context_tokens=1024,
    threads=None,
    prefill_batch_tokens=256,
    backlog_tokens=64,
    backlog_s=2.5,
)
TO_WORKER = st.one_of(
    st.just(protocol.Load(protocol.PROTOCOL_VERSION, manifest(), "/engines/tiny", OPTIONS)),
    st.builds(protocol.Generate, INTEGERS, REQUESTS),
    st.builds(protocol.Cancel, INTEGERS),
    st.builds(protocol.Ping, INTEGERS),
    st.just(protocol.Shutdown()),
)
TO_DAEMON = st.one_of(
    st.builds(protocol.Hello, INTEGERS),
    st.builds(protocol.Loading, st.floats(0, 1)),
    st.builds(protocol.Ready, INTEGERS, st.floats(0, 100), TEXT),
    st.builds(protocol.Refused, ERRORS),
    st.builds(protocol.Pong, INTEGERS),
    st.builds(protocol.Batch, tuples(DELTAS), tuples(FINISHED), tuples(FAILED)),
)


def framed(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def packed(**fields: Any) -> bytes:
    return msgspec.msgpack.encode(fields)


class TestMessages:
    @given(TO_WORKER)
    def test_what_goes_to_the_worker_comes_out_as_it_went_in(self, message):
        (body,) = frames.Framer().feed(protocol.encode(message))
        assert protocol.to_worker_decoder.decode(body) == message

    @given(TO_DAEMON)
    def test_what_goes_to_the_daemon_comes_out_as_it_went_in(self, message):
        (body,) = frames.Framer().feed(protocol.encode(message))
        assert protocol.to_daemon_decoder.decode(body) == message

    def test_refuses_a_message_of_the_other_direction(self):
        with pytest.raises(msgspec.ValidationError, match="ping"):
            protocol.to_daemon_decoder.decode(packed(t="ping", nonce=1))
        with pytest.raises(msgspec.ValidationError, match="pong"):
            protocol.to_worker_decoder.decode(packed(t="pong", nonce=1))

    @pytest.mark.parametrize(
        "body",
        [
            packed(t="fly"),
            packed(nonce=1),
            packed(t="ping"),
            packed(t="ping", nonce="one"),
            packed(t="ping", nonce=1, urgent=True),
            packed(t="shutdown", grace_s=1.0),
            b"",
            b"\xc1",
        ],
        ids=["tag", "no tag", "missing", "type", "unknown", "unknown in an empty one", "", "bytes"],
    )
    def test_refuses_what_the_version_does_not_know(self, body: bytes):
        with pytest.raises(msgspec.DecodeError):
            protocol.to_worker_decoder.decode(body)

    def test_the_first_messages_are_read_far_enough_to_see_another_version(self):
        hello = protocol.to_daemon_decoder.decode(packed(t="hello", version=9, mood="good"))
        assert hello == protocol.Hello(9)


class TestFraming:
    @given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(0, 300), max_size=10))
    def test_frames_come_out_whole_wherever_the_stream_is_cut(self, bodies, cuts):
        stream = b"".join(framed(body) for body in bodies)
        places = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
        framer = frames.Framer()
        found = [
            body
            for start, end in itertools.pairwise(places)
            for body in framer.feed(stream[start:end])
        ]
        assert found == bodies

    def test_what_a_reader_left_comes_with_the_next_bytes(self):
        framer = frames.Framer()
        assert next(framer.feed(framed(b"one") + framed(b"two"))) == b"one"
        assert list(framer.feed(b"")) == [b"two"]

    def test_refuses_a_length_above_the_limit_before_its_bytes_come(self):
        header = struct.pack(">I", frames.MAX_FRAME_BYTES + 1)
        with pytest.raises(ValueError, match=str(frames.MAX_FRAME_BYTES + 1)):
            list(frames.Framer().feed(header))

    def test_refuses_to_send_what_the_other_end_would_refuse(self):
        part = "x" * (frames.MAX_FRAME_BYTES // 2)
        huge = protocol.Batch((protocol.Delta(1, part, 1), protocol.Delta(2, part, 1)))
        with pytest.raises(ValueError, match="at most"):
            protocol.encode(huge)

    def test_the_largest_length_is_taken(self):
        framer = frames.Framer()
        header = struct.pack(">I", frames.MAX_FRAME_BYTES)
        assert list(framer.feed(header + b"x")) == []
        (body,) = framer.feed(b"x" * (frames.MAX_FRAME_BYTES - 1))
        assert len(body) == frames.MAX_FRAME_BYTES
