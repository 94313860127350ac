"""What a verifying tool says, and what the model is told of it."""

import pytest

from edge_agent.core import TextPart, Tool, ToolCall, ToolResult
from edge_agent.runs import verification

CALL = ToolCall("call-1", "pick", '{"what":"cup"}')


def found(text: str, *, is_error: bool = False, cancelled: bool = False) -> ToolResult:
    return ToolResult("call-1-verify", (TextPart(text),), is_error, cancelled)


@pytest.mark.parametrize(
    ("said", "acted"),
    [
        (found('{"acted": true}'), True),
        (found('{"acted": false, "seen": "cup"}'), False),
        (found('{"acted": 1}'), None),
        (found('{"acted": null}'), None),
        (found("[true]"), None),
        (found("acted"), None),
        (found(""), None),
        (found("[" * 10_000), None),
        (found('{"acted": true}', is_error=True), None),
        (found('{"acted": true}', cancelled=True), None),
    ],
)
def test_only_a_plain_yes_or_no_counts(said, acted):
    assert verification.acted(said) is acted


def test_the_evidence_is_what_was_said_as_far_as_people_read():
    assert verification.evidence(found("x" * 1024)) == "x" * 1024
    assert verification.evidence(found("x" * 1025)) == "x" * 1024


@pytest.mark.parametrize(("acted", "words"), [(True, "it has acted"), (False, "it has not acted")])
def test_the_model_is_told_and_what_did_not_act_is_an_error(acted, words):
    told = verification.result(CALL, "no result within 5 s", acted=acted)
    assert told.tool_call_id == "call-1"
    assert told.is_error is not acted
    (part,) = told.parts
    assert isinstance(part, TextPart)
    assert part.text == f"no result within 5 s; a look at it afterwards says that {words}"


def test_who_looks_gets_the_arguments_of_the_call():
    look = verification.call_of(CALL, Tool("holding", "Look.", "{}"))
    assert look == ToolCall("call-1-verify", "holding", '{"what":"cup"}')
