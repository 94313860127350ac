"""What a caller learns about bytes that are no message, or too many."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.api.receiving import receive
from edge_agent.errors import InvalidRequest
from edge_agent.v1 import run_service_pb2 as pb
from edge_agent.v1 import types_pb2 as t

LIMIT_BYTES = 100_000
HALF_A_PAIR = "\ud800".encode(errors="surrogatepass")


def refused(raw, message=pb.CreateRunRequest):
    with pytest.raises(InvalidRequest) as caught:
        receive(raw, message.FromString, LIMIT_BYTES)
    return caught.value


def request(**fields):
    user = t.Message(role=t.ROLE_USER, parts=[t.Part(text="one"), t.Part(text="MARK")])
    return pb.CreateRunRequest(spec=pb.RunSpec(messages=[t.Message(), user], **fields))


def test_a_message_is_received_up_to_the_limit_and_not_looked_into_above_it():
    raw = request().SerializeToString()
    assert receive(raw, pb.CreateRunRequest.FromString, len(raw)) == request()
    with pytest.raises(InvalidRequest) as caught:
        receive(b"\xff" * (len(raw) + 1), pb.CreateRunRequest.FromString, len(raw))
    assert caught.value.reason == "REQUEST_TOO_LARGE"
    assert caught.value.metadata == {
        "size_bytes": str(len(raw) + 1),
        "limit_bytes": str(len(raw)),
    }


@pytest.mark.parametrize("wrong", [HALF_A_PAIR + b"!", b"caf\xe9"])
def test_text_that_is_not_utf8_is_named_by_its_field(wrong):
    raw = request().SerializeToString().replace(b"MARK", wrong)
    error = refused(raw)
    assert [v.field for v in error.violations] == ["spec.messages[1].parts[1].text"]
    assert "is not UTF-8" in error.violations[0].description
    assert error.reason == "INVALID_REQUEST"


def test_the_search_passes_over_every_kind_of_field():
    # 1: varint, 2: fixed 64, 5: fixed 32, then a group, all of them unknown; then the text.
    others = (
        b"\xa0\x06\x96\x01" + b"\xa9\x06" + bytes(8) + b"\xad\x06" + bytes(4) + b"\xb3\x06\xb4\x06"
    )
    error = refused(others + b"\x0a\x01\xff", pb.GetRunRequest)
    assert error.violations[0].field == "run_id"
    assert error.violations[0].description == "is not UTF-8: ff at byte 0 of 1"


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xff\xff",
        b"\x0a",
        b"\x0a\x7f",
        b"\x7b" * 5000 + b"\x7c" * 5000,  # groups in groups
        b"\x0a\x02\x0e\x00" * 20_000,  # more than is looked through
        b"\xff" * 20,
        b"\x08" + b"\xff" * 11,
    ],
)
def test_what_is_no_message_is_said_to_be_none(raw):
    error = refused(raw)
    assert error.reason == "MALFORMED_MESSAGE"
    assert error.metadata == {
        "message": "edge_agent.v1.CreateRunRequest",
        "size_bytes": str(len(raw)),
    }


def is_answered(raw):
    """A message, or a typed refusal; anything else is raised."""
    try:
        receive(raw, pb.CreateRunRequest.FromString, LIMIT_BYTES)
    except InvalidRequest as error:
        return bool(error.violations) or error.reason == "MALFORMED_MESSAGE"
    return True


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_typed_refusal(raw):
    assert is_answered(raw)


@given(st.data())
def test_a_message_cut_or_changed_anywhere_is_a_message_or_a_typed_refusal(data):
    raw = bytearray(request(engine="é", agent="ü").SerializeToString())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    assert is_answered(bytes(raw))
    assert is_answered(bytes(raw[:cut]))
