"""What the ledger's columns hold: values come back as they were, and a changed row is noticed."""

import dataclasses

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core import (
    FinishReason,
    Message,
    Role,
    RunError,
    RunState,
    TextPart,
    ToolCall,
    ToolResult,
    Usage,
)
from edge_agent.errors import LedgerRowCorrupt
from edge_agent.events import (
    ApprovalDecided,
    ApprovalRequested,
    CancelTool,
    DaemonToolStarted,
    Event,
    EventBody,
    HistoryShortened,
    MessagesAdded,
    RunFinished,
    Snapshot,
    StateChanged,
    StepFinished,
    TextDelta,
    ToolCallsIssued,
    ToolResultAccepted,
    ToolUpdated,
)
from edge_agent.ledger import rows
from edge_agent.records import LoggedText
from tests.support.chaos import examples
from tests.support.ledger import call_record, run, spec, step_record, turn

CALL = ToolCall("call-1", "move_to", '{"x":1}', 2.5, 0.25)
ERROR = RunError("BROKEN", "it broke", metadata={"step": "1"})
BODIES: tuple[EventBody, ...] = (
    Snapshot(run("run-1")),
    StateChanged(RunState.SUSPENDED, None, ERROR),
    TextDelta(1, "Grüße", 2),
    ToolCallsIssued(1, (CALL,)),
    ApprovalRequested(1, (CALL,)),
    ApprovalDecided("call-1", approved=True, client="arm"),
    DaemonToolStarted(1, CALL),
    MessagesAdded((Message(Role.USER, (TextPart("go on"),)),)),
    ToolResultAccepted(ToolResult("call-1", (TextPart("done"),))),
    StepFinished(1, turn("on the table"), Usage(1, 2, 3), FinishReason.STOP, 0.5),
    ToolUpdated("call-1", (TextPart("half way"),), is_error=False, done=False),
    CancelTool("call-1", ERROR),
    HistoryShortened(2, 4, 6, 8, "they spoke of lamps"),
    RunFinished(run("run-1")),
)
VALUES = st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(), st.binary())


def test_every_kind_of_event_is_here():
    assert {type(body) for body in BODIES} == set(EventBody.__args__)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_events_come_back(body: EventBody):
    sequence, kind, stored = rows.event(Event("run-1", 7, body), None)
    assert rows.read_event("run-1", sequence, kind, stored) == Event("run-1", 7, body)


@examples(100)
@given(st.lists(st.tuples(st.text(max_size=5), st.integers(0, 9)), min_size=1))
def test_text_comes_back(deltas: list[tuple[str, int]]):
    text = "".join(piece for piece, _ in deltas)
    ends = tuple(len("".join(piece for piece, _ in deltas[: n + 1])) for n in range(len(deltas)))
    logged = LoggedText(2, 9, text, ends, tuple(tokens for _, tokens in deltas))
    sequence, kind, stored = rows.event(logged, None)
    assert sequence == 9
    assert rows.read_event("run-1", sequence, kind, stored) == logged


def test_records_and_specs_come_back():
    assert rows.read_step(1, rows.value(step_record("run-1"))) == step_record("run-1")
    assert rows.read_call(1, rows.value(call_record("run-1"))) == call_record("run-1")
    assert rows.read_spec(1, rows.value(spec())) == spec()


def test_a_head_and_the_last_event_leave_the_transcript_out():
    whole = dataclasses.replace(run("run-1"), transcript=(turn("on the table"),))
    assert rows.read_head(1, rows.head(whole)) == run("run-1")
    _, kind, stored = rows.event(Event("run-1", 7, RunFinished(whole)), 12)
    last = rows.read_event("run-1", 7, kind, stored)
    numbered = dataclasses.replace(run("run-1"), result_number=12)
    assert last == Event("run-1", 7, RunFinished(numbered))


def test_a_later_release_may_add_fields():
    stored = msgspec.msgpack.decode(rows.head(run("run-1")))
    assert rows.read_head(1, msgspec.msgpack.encode({**stored, "mood": "curious"})) == run("run-1")


@pytest.mark.parametrize("stored", [b"", b"\xc1", b"\x80", b"\x93\x01\x02\x03"])
def test_what_is_no_value_is_an_error_of_its_row(stored: bytes):
    with pytest.raises(LedgerRowCorrupt):
        rows.read_head(1, stored)
    with pytest.raises(LedgerRowCorrupt):
        rows.read_event("run-1", 1, "StateChanged", stored)
    with pytest.raises(LedgerRowCorrupt):
        rows.read_event("run-1", 1, "StateForgotten", stored)


@examples(200)
@given(st.lists(VALUES, min_size=1), st.data())
def test_a_row_with_another_value_is_noticed(columns: list[rows.Value], data: st.DataObject):
    row = (*columns, rows.crc(columns))
    assert rows.checked("heads", row) == tuple(columns)
    at = data.draw(st.integers(0, len(columns) - 1))
    other = data.draw(VALUES.filter(lambda each: repr(each) != repr(columns[at])))
    with pytest.raises(LedgerRowCorrupt) as raised:
        rows.checked("heads", (*columns[:at], other, *columns[at + 1 :], row[-1]))
    assert raised.value.metadata["table"] == "heads"


def test_the_same_request_has_the_same_digest_and_another_has_not():
    assert rows.digest(rows.value(spec("look"))) == rows.digest(rows.value(spec("look")))
    assert rows.digest(rows.value(spec("look"))) != rows.digest(rows.value(spec("fetch")))
