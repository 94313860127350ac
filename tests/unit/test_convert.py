"""Requests to core values with every violation named, and values there and back again."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from edge_agent import core, events
from edge_agent.api import (
    convert_client,
    convert_conversation,
    convert_request,
    convert_response,
    convert_tools,
    validation,
)
from edge_agent.api import spans as spans_
from edge_agent.api.convert_error import error_of, status_of
from edge_agent.api.ports import RequestLimits
from edge_agent.core import HaltScope, Role, RunState, TextPart
from edge_agent.errors import (
    EdgeAgentError,
    FieldViolation,
    Halted,
    InvalidRequest,
    NotFound,
    Overloaded,
    StepFailed,
    Unsupported,
    WorkerError,
)
from edge_agent.status import DaemonState, DaemonStatus, MemoryStatus
from edge_agent.v1 import run_service_pb2 as pb
from edge_agent.v1 import system_service_pb2 as system_pb
from edge_agent.v1 import types_pb2 as t

LIMITS = RequestLimits(
    default_engine=lambda: "small",
    timeout_s=60.0,
    max_timeout_s=3600.0,
    max_steps=8,
    max_tool_calls=16,
    max_same_calls=3,
    durable=False,
    max_request_bytes=100_000,
    max_tools=4,
    max_tool_result_bytes=100,
    slow_reader_s=1.0,
)


UNKNOWN: Any = 77
"""A value that an enum does not have."""


def user(text="hi"):
    return t.Message(role=t.ROLE_USER, parts=[t.Part(text=text)])


def spec(**fields):
    return pb.RunSpec(**{"messages": [user()], **fields})


def convert(asked, **fields):
    return convert_request.run_request(pb.CreateRunRequest(spec=asked, **fields), LIMITS)


def violations(asked, **fields):
    with pytest.raises(InvalidRequest) as caught:
        convert(asked, **fields)
    return {violation.field: violation.description for violation in caught.value.violations}


def tool(**fields):
    return t.Tool(**{"name": "lamp", "description": "Switches the lamp.", **fields})


def test_what_is_left_out_becomes_the_daemons_default():
    made = convert(spec(tools=[tool()]))
    assert made == core.RunSpec(
        messages=(core.Message(Role.USER, (TextPart("hi"),)),),
        engine="small",
        limits=core.Limits(max_steps=8, max_tool_calls=16),
        timeout_s=60.0,
        tools=(core.Tool("lamp", "Switches the lamp.", convert_tools.NO_ARGUMENTS),),
    )


def test_what_is_asked_for_is_taken():
    made = convert(
        spec(
            engine="big",
            agent="fetcher",
            output_schema_json='{"type":"object"}',
            timeout=Duration(seconds=2, nanos=500_000_000),
            limits=t.Limits(max_steps=2, max_tool_calls=0, max_output_tokens=7),
            sampling=t.Sampling(temperature=0.5, top_p=0.25, seed=9),
        )
    )
    assert (made.engine, made.agent, made.timeout_s) == ("big", "fetcher", 2.5)
    assert made.limits == core.Limits(2, 0, 7)
    assert made.sampling == core.Sampling(0.5, 0.25, 9)
    assert made.output_schema_json == '{"type":"object"}'


def test_a_schema_keeps_the_order_of_its_keys():
    text = '{"type":"object","properties":{"z":{},"a":{}}}'
    assert convert(spec(tools=[tool(input_schema_json=text)])).tools[0].input_schema_json == text


def test_every_violation_of_a_request_is_in_one_error():
    asked = spec(
        messages=[t.Message(role=t.ROLE_ASSISTANT)],
        tools=[tool(name="answer"), tool(name="no way"), tool(input_schema_json="{")],
        agent="x" * 65,
        timeout=Duration(seconds=3601),
        limits=t.Limits(max_steps=9, max_tool_calls=17, max_output_tokens=0),
        sampling=t.Sampling(temperature=2.5, top_p=0),
    )
    assert set(violations(asked, request_id="r" * 65)) == {
        "request_id",
        "spec.agent",
        "spec.timeout",
        "spec.messages[0].parts",
        "spec.messages[0].role",
        "spec.limits.max_steps",
        "spec.limits.max_tool_calls",
        "spec.limits.max_output_tokens",
        "spec.tools[0].name",
        "spec.tools[1].name",
        "spec.tools[2].input_schema_json",
        "spec.sampling.temperature",
        "spec.sampling.top_p",
    }


def test_a_violation_says_value_and_limit():
    found = violations(spec(timeout=Duration(seconds=3601), agent="é" * 40))
    assert found["spec.timeout"] == "3601s is above the limit of 3600s"
    assert found["spec.agent"] == f'"{"é" * 40}" has 80 bytes, at most 64 allowed'


def test_a_long_value_is_shortened():
    found = violations(spec(tools=[tool(name="x" * 500)]))
    assert found["spec.tools[0].name"].startswith('"' + "x" * 64 + '"... does not match')


def test_a_missing_spec_is_named():
    with pytest.raises(InvalidRequest) as caught:
        convert_request.run_request(pb.ExecuteRunRequest(), LIMITS, "start.")
    assert [v.field for v in caught.value.violations] == ["start.spec"]


def test_no_engine_and_no_default_is_refused():
    limits = replace(LIMITS, default_engine=lambda: None)
    with pytest.raises(InvalidRequest, match=r"spec\.engine: .*runs\.default_engine"):
        convert_request.run_request(pb.CreateRunRequest(spec=spec()), limits)


def test_an_unknown_on_disconnect_is_refused():
    request = pb.ExecuteRunRequest(spec=spec(), on_disconnect=UNKNOWN)
    with pytest.raises(InvalidRequest, match="on_disconnect"):
        convert_request.run_request(request, LIMITS)


CALL = t.ToolCall(id="c1", name="lamp", arguments_json="{}")
CALLING = t.Message(role=t.ROLE_ASSISTANT, tool_calls=[CALL])


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "spec.messages"),
        ([t.Message(parts=[t.Part(text="x")]), user()], "spec.messages[0].role"),
        ([t.Message(role=UNKNOWN, parts=[t.Part(text="x")]), user()], "spec.messages[0].role"),
        ([user(), t.Message(role=t.ROLE_SYSTEM, parts=[t.Part(text="x")]), user()],
         "spec.messages[1].role"),
        ([t.Message(role=t.ROLE_SYSTEM, parts=[t.Part(text="x")])], "spec.messages[0].role"),
        ([user(), t.Message(role=t.ROLE_ASSISTANT, parts=[t.Part(text="x")])],
         "spec.messages[1].role"),
        ([user("")], "spec.messages[0].parts"),
        ([user("  \n")], "spec.messages[0].parts"),
        ([t.Message(role=t.ROLE_USER)], "spec.messages[0].parts"),
        ([t.Message(role=t.ROLE_USER, parts=[t.Part(text="x"), t.Part()])],
         "spec.messages[0].parts[1]"),
        ([user("a\0b")], "spec.messages[0].parts[0].text"),
        ([user(), t.Message(role=t.ROLE_TOOL, tool_call_id="c1")],
         "spec.messages[1].tool_call_id"),
        ([CALLING, t.Message(role=t.ROLE_TOOL, tool_call_id="c2")],
         "spec.messages[1].tool_call_id"),
        ([CALLING, *[t.Message(role=t.ROLE_TOOL, tool_call_id="c1")] * 2],
         "spec.messages[2].tool_call_id"),
        ([CALLING, CALLING, user()], "spec.messages[1].tool_calls[0].id"),
        ([t.Message(role=t.ROLE_USER, tool_calls=[CALL])], "spec.messages[0].tool_calls"),
        ([t.Message(role=t.ROLE_USER, parts=[t.Part(text="x")], tool_call_id="c1")],
         "spec.messages[0].tool_call_id"),
        ([t.Message(role=t.ROLE_USER, parts=[t.Part(text="x")], is_error=True)],
         "spec.messages[0].is_error"),
        ([t.Message(role=t.ROLE_ASSISTANT, tool_calls=[t.ToolCall(id="", name="a",
                                                                  arguments_json="{}")]), user()],
         "spec.messages[0].tool_calls[0].id"),
        ([t.Message(role=t.ROLE_ASSISTANT, tool_calls=[t.ToolCall(id="1", name="-",
                                                                  arguments_json="{}")]), user()],
         "spec.messages[0].tool_calls[0].name"),
        ([t.Message(role=t.ROLE_ASSISTANT, tool_calls=[t.ToolCall(id="1", name="a",
                                                                  arguments_json="[]")]), user()],
         "spec.messages[0].tool_calls[0].arguments_json"),
    ],
)  # fmt: skip
def test_a_conversation_that_makes_no_sense_is_refused(messages, field):
    tools = [tool(), tool(name="a")]
    assert list(violations(spec(messages=messages, tools=tools))) == [field]


def test_an_earlier_call_of_a_tool_that_the_run_has_not_is_refused():
    asked = spec(messages=[user(), CALLING, user()], tools=[tool(name="arm"), tool(name="base")])
    assert violations(asked) == {
        "spec.messages[1].tool_calls[0].name": '"lamp" is no tool of this run: arm, base'
    }
    asked = spec(messages=[user(), CALLING, user()])
    (description,) = violations(asked).values()
    assert description == '"lamp" is no tool of this run: it has none'


def test_a_conversation_with_answered_calls_is_taken():
    result = t.Message(role=t.ROLE_TOOL, tool_call_id="c1", is_error=True)
    made = convert(spec(messages=[user(), CALLING, result], tools=[tool()]))
    assert made.messages[1].tool_calls == (core.ToolCall("c1", "lamp", "{}"),)
    assert made.messages[2] == core.Message(Role.TOOL, tool_call_id="c1", is_error=True)


BLOB = t.Blob(media_type="x/y", data=b"1")


@pytest.mark.parametrize(
    ("part", "kind"), [(t.Part(image=BLOB), "image"), (t.Part(audio=BLOB), "audio")]
)
def test_a_part_that_is_not_text_is_unsupported_and_named(part, kind):
    message = t.Message(role=t.ROLE_USER, parts=[t.Part(text="x"), part])
    with pytest.raises(Unsupported) as caught:
        convert(spec(messages=[message]))
    assert caught.value.reason == "UNSUPPORTED_PART"
    assert caught.value.metadata["part"] == f"spec.messages[0].parts[1].{kind}"


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("a", True),
        ("_move.to-2", True),
        ("x" * 64, True),
        ("x" * 65, False),
        ("", False),
        (".a", False),
        ("-a", False),
        ("a b", False),
        ("a\n", False),
        ("é", False),
        ("answer", False),
        ("Answer", True),
    ],
)
def test_names_of_tools(name, good):
    if good:
        assert convert(spec(tools=[tool(name=name)])).tools[0].name == name
    else:
        assert list(violations(spec(tools=[tool(name=name)]))) == ["spec.tools[0].name"]


def test_a_name_that_appears_twice_says_where_it_was_first():
    found = violations(spec(tools=[tool(), tool(name="b"), tool(), tool()]))
    assert found == {
        "spec.tools[2].name": '"lamp" is already spec.tools[0]',
        "spec.tools[3].name": '"lamp" is already spec.tools[0]',
    }


def test_too_many_tools_are_refused_with_both_numbers():
    assert len(convert(spec(tools=[tool(name=f"t{i}") for i in range(4)])).tools) == 4
    found = violations(spec(tools=[tool(name=f"t{i}") for i in range(5)]))
    assert found == {"spec.tools": "5 tools, at most 4 allowed (runs.max_tools)"}


def nested(depth):
    return '{"type":"object","a":' + "[" * (depth - 1) + "]" * (depth - 1) + "}"


@pytest.mark.parametrize(
    "schema",
    [
        "{",
        "[]",
        "1",
        '"object"',
        "null",
        '{"type":"string"}',
        '{"properties":{}}',
        '{"type":["object"]}',
        '{"type":"object","type":"object"}',
        '{"type":"object","a":{"b":1,"b":2}}',
        '{"type":"object","maximum":NaN}',
        '{"type":"object","maximum":-Infinity}',
        '{"type":"object","maximum":1e999}',
        '{"type":"object","maximum":' + "9" * 5000 + "}",
        '{"type":"object","description":"\\ud800"}',
        '{"type":"object","\\udfff":1}',
        '{"type":"object","enum":["a\\u0000b"]}',
        '{"type":"object"}\0',
        nested(65),
        nested(50_000),
    ],
)
def test_a_schema_that_is_no_sound_json_object_is_refused(schema):
    found = violations(spec(tools=[tool(input_schema_json=schema)]))
    assert set(found) == {"spec.tools[0].input_schema_json"}


def test_a_schema_may_be_as_deep_as_the_limit():
    schema = nested(64)
    assert convert(spec(tools=[tool(input_schema_json=schema)])).tools[0].input_schema_json


def test_a_whole_surrogate_pair_in_an_escape_is_a_character():
    schema = '{"type":"object","description":"\\ud83d\\ude00"}'
    assert convert(spec(tools=[tool(input_schema_json=schema)]))


def test_the_arguments_of_an_example_are_an_object():
    example = t.ToolExample(goal="g", arguments_json="[1]")
    found = violations(spec(tools=[tool(examples=[example])]))
    assert list(found) == ["spec.tools[0].examples[0].arguments_json"]


@pytest.mark.parametrize(
    "wrong",
    [
        Duration(),
        Duration(seconds=-1),
        Duration(seconds=1, nanos=-1),
        Duration(nanos=1_000_000_000),
        Duration(seconds=2**62),
    ],
)
@pytest.mark.parametrize("field", ["timeout", "valid_for"])
def test_a_duration_is_above_0_and_well_formed(wrong, field):
    assert list(violations(spec(tools=[tool(**{field: wrong})]))) == [f"spec.tools[0].{field}"]


@pytest.mark.parametrize(
    "sampling",
    [
        t.Sampling(temperature=-0.1),
        t.Sampling(temperature=math.nan),
        t.Sampling(temperature=math.inf),
        t.Sampling(top_p=0),
        t.Sampling(top_p=1.5),
        t.Sampling(top_p=math.nan),
    ],
)
def test_sampling_out_of_range_is_refused(sampling):
    assert len(violations(spec(sampling=sampling))) == 1


def test_the_limits_themselves_are_allowed():
    made = convert(
        spec(
            timeout=Duration(seconds=3600),
            limits=t.Limits(max_steps=8, max_tool_calls=16, max_output_tokens=1),
            sampling=t.Sampling(temperature=2, top_p=1),
            agent="a" * 64,
        ),
        request_id="r" * 64,
    )
    assert made.timeout_s == 3600


def results(*values):
    return convert_tools.tool_results(values, LIMITS)


def test_tool_results_are_checked_as_a_whole():
    with pytest.raises(InvalidRequest) as caught:
        results(
            t.ToolResult(tool_call_id="a", parts=[t.Part(text="x" * 101)]),
            t.ToolResult(tool_call_id="a"),
            t.ToolResult(),
        )
    assert [v.field for v in caught.value.violations] == [
        "results[1].tool_call_id",
        "results[2].tool_call_id",
        "results[0].parts",
    ]
    assert "101 bytes of text, at most 100" in caught.value.violations[2].description


def test_no_results_are_no_results():
    with pytest.raises(InvalidRequest, match="results: is empty"):
        results()


def test_a_result_may_be_as_large_as_the_limit():
    text = "x" * LIMITS.max_tool_result_bytes
    assert results(t.ToolResult(tool_call_id="a", parts=[t.Part(text=text)]))


def test_what_is_looked_at_one_by_one_is_counted_first():
    part, example = t.Part(text="x"), t.ToolExample(goal="x", arguments_json="{}")
    most = convert_conversation.MAX_ITEMS
    full = t.Message(role=t.ROLE_USER, parts=[part] * (most - 1))
    assert len(convert(spec(messages=[full])).messages[0].parts) == most - 1
    full.parts.add(text="one more")
    assert violations(spec(messages=[full])) == {
        "spec.messages": "4097 messages, parts and tool calls in all, at most 4096 allowed"
    }
    assert list(violations(spec(messages=[user()] * 2049))) == ["spec.messages"]
    assert convert(spec(tools=[tool(examples=[example] * 16)]))
    assert violations(spec(tools=[tool(examples=[example] * 17)])) == {
        "spec.tools[0].examples": "17 examples, at most 16 allowed"
    }
    with pytest.raises(InvalidRequest, match="results: 4098 results and parts in all"):
        results(t.ToolResult(tool_call_id="a", parts=[t.Part(text="")] * 4097))
    with pytest.raises(InvalidRequest, match="states: 13 states, at most 12"):
        convert_request.page(pb.ListRunsRequest(states=[pb.RUN_STATE_QUEUED] * 13))


def test_the_json_of_a_request_is_bounded_as_a_whole():
    wide = '{"enum":[' + ",".join(["[]"] * 40_000) + "]}"
    assert convert(spec(output_schema_json=wide))
    tools = [tool(input_schema_json='{"type":"object",' + wide[1:])]
    assert violations(spec(output_schema_json=wide, tools=tools)) == {
        "spec.tools[0].input_schema_json": "80004 brackets in the JSON up to here, at most 65536"
    }
    long = '{"description":"' + "x" * 600_000 + '"}'
    tools = [tool(input_schema_json='{"type":"object",' + long[1:])]
    assert violations(spec(output_schema_json=long, tools=tools)) == {
        "spec.tools[0].input_schema_json": (
            "1200052 characters of JSON in this request up to here, at most 1048576"
        )
    }


def test_a_schema_can_not_tell_the_grammar_engine_to_be_lenient():
    lenient = '{"type":"object","x-guidance":{"lenient":true}}'
    assert violations(spec(output_schema_json=lenient)) == {
        "spec.output_schema_json": '"x-guidance" is the daemon\'s own, leave it out'
    }
    assert list(violations(spec(tools=[tool(input_schema_json=lenient)])))


@given(
    st.recursive(
        st.text(st.characters()) | st.integers() | st.text(alphabet='[]{}"\\u0d8f'),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    )
)
def test_depth_and_text_of_json_are_judged_by_its_text_alone(value):
    text = json.dumps({"value": value})
    value = json.loads(text)["value"]  # two halves in a row have become a character
    deep = json.dumps({"value": _nested(value, 70)})
    strings = "".join(_strings(value))
    problem = validation._wrong_inside(text)
    if any("\ud800" <= character <= "\udfff" for character in strings):
        assert problem in {"has half a surrogate pair, which is not text", "has a NUL character"}
    elif "\0" in strings:
        assert problem == "has a NUL character"
    else:
        assert problem is None
    assert validation._wrong_inside(deep) == "is nested deeper than 64 levels"
    assert validation._depth(text) == _depth({"value": value})


def _nested(value, levels):
    return value if levels == 0 else [_nested(value, levels - 1)]


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *_strings(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _depth(value):
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(_depth, inner), default=0) if isinstance(value, dict | list) else 0


def test_a_tool_may_return_nothing():
    assert results(t.ToolResult(tool_call_id="a")) == (core.ToolResult("a", ()),)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.HaltRequest(), "scope"),
        (pb.HaltRequest(scope=UNKNOWN), "scope"),
        (pb.HaltRequest(scope=pb.HALT_SCOPE_ALL, target="x"), "target"),
        (pb.HaltRequest(scope=pb.HALT_SCOPE_TOOL), "target"),
        (pb.HaltRequest(scope=pb.HALT_SCOPE_CLIENT, target="x" * 65), "target"),
    ],
)
def test_a_halt_of_nothing_clear_is_refused(request_, field):
    with pytest.raises(InvalidRequest) as caught:
        convert_request.halt(request_)
    assert [v.field for v in caught.value.violations] == [field]


def test_a_long_reason_never_stands_in_the_way_of_a_halt():
    request = pb.HaltRequest(scope=pb.HALT_SCOPE_ALL, reason="é\0" * 200)
    scope, target, reason = convert_request.halt(request)
    assert (scope, target) == (HaltScope.ALL, "")
    assert len(reason.encode()) <= 256
    assert reason.startswith("éé")
    assert reason.endswith("...")


def test_pages():
    assert convert_request.page(pb.ListRunsRequest()) == (frozenset(), 100, "")
    wanted = pb.ListRunsRequest(states=[pb.RUN_STATE_FAILED], page_size=1000, page_token="t")
    assert convert_request.page(wanted) == (frozenset({core.RunState.FAILED}), 1000, "t")
    with pytest.raises(InvalidRequest) as caught:
        convert_request.page(
            pb.ListRunsRequest(states=[pb.RUN_STATE_UNSPECIFIED, UNKNOWN], page_size=1001)
        )
    assert [v.field for v in caught.value.violations] == ["states[0]", "states[1]", "page_size"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"],
                                            exclude_characters="\0")), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


@given(value=json_values, ascii_only=st.booleans())
def test_any_sound_json_object_is_taken_as_it_is(value, ascii_only):
    text = json.dumps({"type": "object", "x": value}, ensure_ascii=ascii_only)
    made = convert(spec(tools=[tool(input_schema_json=text)]))
    assert made.tools[0].input_schema_json == text


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_as_a_schema_is_refused_by_name(text):
    fields = set(violations(spec(tools=[tool(input_schema_json=f"x{text}")])))
    assert fields == {"spec.tools[0].input_schema_json"}


# --- there and back again ---

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
spans = st.floats(0, 1e6).map(lambda s: round(s, 3))
states = st.sampled_from([each for each in core.RunState if each is not RunState.UNSPECIFIED])
parts = st.lists(names.map(TextPart), max_size=2).map(tuple)
fences = st.none() | st.builds(core.Fence, st.integers(0, 2**63), st.integers(0, 2**63))
some = st.none() | spans
calls = st.lists(st.builds(core.ToolCall, names, names, names, some, some, fences), max_size=2).map(
    tuple
)
errors = st.builds(core.RunError, names, names, st.booleans(), st.dictionaries(names, names))
counts = st.integers(0, 2**31)
usages = st.builds(
    core.Usage, counts, counts, counts, spans, spans, st.just(0.0), st.none() | spans, counts
)
messages = st.builds(core.Message, st.sampled_from(Role), parts, calls, names, st.booleans())
runs = st.builds(
    core.Run,
    id=names,
    request_id=names,
    client=names,
    agent=names,
    engine=names,
    state=states,
    created_at_s=spans,
    sequence=counts,
    ended_at_s=st.none() | spans,
    steps=counts,
    transcript=st.lists(messages, max_size=2).map(tuple),
    open_tool_calls=calls,
    daemon_tool_calls=calls,
    unapproved_tool_calls=calls,
    background_tool_calls=calls,
    pending_messages=st.lists(messages, max_size=2).map(tuple),
    durable=st.booleans(),
    partial_text=names,
    answer=st.none() | names,
    error=st.none() | errors,
    usage=usages,
    priority=st.sampled_from(core.Priority),
)
results_ = st.builds(
    core.ToolResult, names, parts, st.booleans(), st.booleans(), st.none() | errors
)
bodies = st.one_of(
    st.builds(events.Snapshot, runs),
    st.builds(events.StateChanged, states, st.none() | st.just(0.5)),
    st.builds(events.TextDelta, counts, names, counts),
    st.builds(events.ToolCallsIssued, counts, calls),
    st.builds(events.ToolResultAccepted, results_, st.booleans()),
    st.builds(events.ToolUpdated, names, parts, st.booleans(), st.booleans()),
    st.builds(events.MessagesAdded, st.lists(messages, max_size=2).map(tuple), st.booleans()),
    st.builds(events.ApprovalRequested, counts, calls),
    st.builds(events.ApprovalDecided, names, st.booleans(), names, names),
    st.builds(
        events.StepFinished,
        counts,
        messages,
        usages,
        st.sampled_from(core.FinishReason),
        st.none() | spans,
        st.booleans(),
    ),
    st.builds(events.CancelTool, names, errors),
    st.builds(events.RunFinished, runs),
)


@given(event=st.builds(events.Event, names, counts, bodies))
def test_an_event_arrives_as_it_was_sent(event):
    message = pb.RunEvent()
    convert_response.fill_event(message, event)
    assert convert_client.event(pb.RunEvent.FromString(message.SerializeToString())) == event


def test_an_empty_text_delta_is_still_one():
    message = pb.RunEvent()
    convert_response.fill_event(message, events.Event("r", 1, events.TextDelta(0, "", 0)))
    assert message.WhichOneof("kind") == "text_delta"


def test_an_event_of_a_newer_daemon_is_passed_over():
    assert convert_client.event(pb.RunEvent(run_id="r", sequence=3)) is None


class TestValuesThatOnlyANewerDaemonKnows:
    def test_a_state_of_a_run_that_goes_on_is_unspecified(self):
        run = convert_client.run(pb.Run(state=UNKNOWN))
        assert (run.state, run.state.ended) == (RunState.UNSPECIFIED, False)
        event = convert_client.event(pb.RunEvent(state_changed=pb.StateChanged(state=UNKNOWN)))
        assert event is not None
        assert event.body == events.StateChanged(RunState.UNSPECIFIED)

    def test_nobody_here_knows_how_a_run_ended_in_such_a_state(self):
        run = pb.Run(state=UNKNOWN, ended_at=convert_response.timestamp(5.0))
        event = convert_client.event(pb.RunEvent(run_finished=pb.RunFinished(run=run)))
        assert event is not None
        assert isinstance(event.body, events.RunFinished)
        assert event.body.run.state is RunState.OUTCOME_UNKNOWN

    def test_a_step_is_told_with_its_text(self):
        message = t.Message(role=UNKNOWN, parts=[t.Part(text="hi")])
        step = pb.StepFinished(step=1, message=message, finish_reason="BORED")
        event = convert_client.event(pb.RunEvent(step_finished=step))
        assert event is not None
        assert isinstance(event.body, events.StepFinished)
        assert event.body.finish_reason is core.FinishReason.UNSPECIFIED
        assert event.body.message == core.Message(Role.ASSISTANT, (TextPart("hi"),))

    def test_a_halt_may_cover_everything(self):
        latched = convert_client.halt(pb.HaltRecord(halt_id="h", scope=UNKNOWN, target="x"))
        assert (latched.scope, latched.target) == (HaltScope.ALL, "x")

    def test_a_run_of_such_a_priority_is_a_normal_one(self):
        assert convert_client.run(pb.Run(priority=UNKNOWN)).priority is core.Priority.NORMAL

    def test_a_daemon_is_told(self):
        told = system_pb.GetStatusResponse(state=UNKNOWN, runs={"RUNNING": 1, "A": 2, "B": 3})
        status = convert_client.status(told)
        assert status.state is DaemonState.UNSPECIFIED
        assert status.memory is None
        tight = system_pb.GetStatusResponse(memory=system_pb.MemoryStatus(level=UNKNOWN))
        memory = convert_client.status(tight).memory
        assert memory is not None
        assert memory.level == "UNSPECIFIED"
        assert status.runs == {RunState.RUNNING: 1, RunState.UNSPECIFIED: 5}


def test_the_speed_of_decoding_survives_the_wire():
    usage = core.Usage(completion_tokens=30, decode_s=1.5)
    run = core.Run("r", "", "c", "", "e", core.RunState.SUCCEEDED, 0.0, usage=usage)
    assert convert_client.run(convert_response.run(run)).usage.tokens_per_second == 20.0


sizes = st.integers(0, 2**63)
statuses = st.builds(
    DaemonStatus,
    version=names,
    state=st.sampled_from(DaemonState),
    degraded_reasons=st.lists(names, max_size=2).map(tuple),
    pid=counts,
    started_at_s=spans,
    uptime_s=spans,
    runs=st.dictionaries(states, counts, max_size=2),
    engines_installed=counts,
    engines_loaded=counts,
    max_resident_engines=counts,
    halts=st.just(()),
    config_path=names,
    memory=st.none()
    | st.builds(
        MemoryStatus,
        total_bytes=sizes,
        available_bytes=st.none() | sizes,
        reserve_bytes=sizes,
        budget_bytes=st.none() | sizes,
        soft_floor_bytes=sizes,
        hard_floor_bytes=sizes,
        kept_bytes=sizes,
        committed_bytes=sizes,
        held_bytes=sizes,
        leaked_bytes=sizes,
        room_bytes=sizes,
        level=st.sampled_from(["NORMAL", "SOFT", "HARD"]),
    ),
    waiting_steps=counts,
    running_steps=counts,
)


@given(status=statuses)
def test_a_status_arrives_as_it_was_sent(status):
    raw = convert_response.status(status).SerializeToString()
    assert convert_client.status(system_pb.GetStatusResponse.FromString(raw)) == status


@pytest.mark.parametrize("priority", core.Priority)
def test_a_priority_is_taken_as_asked_for(priority):
    asked = convert_client.run_spec("Go.", [], convert_client.RunOptions(priority=priority))
    assert convert(asked).priority is priority


def test_a_priority_that_is_none_is_refused_with_those_that_are():
    assert violations(spec(priority=UNKNOWN)) == {
        "spec.priority": "77 is no priority, one of URGENT, INTERACTIVE, NORMAL, BATCH expected"
    }


def test_what_a_client_asks_for_is_what_the_daemon_reads():
    example = core.ToolExample("goal", '{"on":true}', "done")
    lamp = core.Tool("lamp", "d", '{"type":"object"}', (example,), 3.5, 0.25)
    options = convert_client.RunOptions(
        engine="e", system="Be brief.", max_steps=2, temperature=0.5, timeout_s=9.5, agent="a"
    )
    made = convert(convert_client.run_spec("Light!", [lamp], options))
    assert made.tools == (lamp,)
    assert [(m.role, m.text) for m in made.messages] == [
        (Role.SYSTEM, "Be brief."),
        (Role.USER, "Light!"),
    ]
    assert (made.engine, made.limits.max_steps, made.timeout_s) == ("e", 2, 9.5)
    assert made.sampling == core.Sampling(temperature=0.5)


# --- errors ---


def there_and_back(error):
    status = status_of(error)
    return error_of(error.code, status.message, status.SerializeToString())


@pytest.mark.parametrize(
    "error",
    [
        NotFound("no run x", metadata={"run_id": "x"}),
        Halted("halted", metadata={"halt_id": "h"}),
        Overloaded("full", reason="TOO_MANY_RUNS", retry_after_s=2.5),
        InvalidRequest.field("spec.engine", "is empty"),
        EdgeAgentError("internal"),
    ],
)
def test_an_error_arrives_as_it_was_raised(error):
    got = there_and_back(error)
    assert type(got) is type(error)
    assert vars(got) == vars(error)


def test_a_retryable_error_says_when():
    assert there_and_back(WorkerError("gone")).retry_after_s == 1.0
    assert there_and_back(NotFound("no")).retry_after_s is None


def test_what_a_worker_says_about_a_step_arrives_as_a_wrong_request():
    got = there_and_back(StepFailed(core.RunError("STEP_FAILED", "too long", retryable=True)))
    assert (type(got), got.reason, got.message) == (InvalidRequest, "STEP_FAILED", "too long")
    assert got.retry_after_s == 1.0


def test_an_error_without_details_is_still_typed():
    got = error_of("NOT_FOUND", "", None)
    assert (type(got), got.reason, got.message) == (NotFound, "NOT_FOUND", "NOT_FOUND")


def test_a_huge_error_fits_into_trailing_metadata():
    """A caller whose 8 KiB are exceeded gets an error of its own gRPC library instead."""
    violations = [FieldViolation(f"spec.tools[{i}].name", "ü" * 300) for i in range(100)]
    error = InvalidRequest("ü" * 5000, metadata={"a": "ü" * 500}, violations=violations)
    status = status_of(error)
    on_wire = len(status.message.encode()) * 3 + status.ByteSize() * 4 / 3
    assert on_wire < 8000
    got = there_and_back(error)
    assert got.violations
    assert int(got.metadata["violations_left_out"]) == 100 - len(got.violations)


def test_half_a_surrogate_pair_in_an_error_does_not_break_it():
    assert there_and_back(NotFound("\ud800")).message == "?"


# --- tools that use resources, go on in the background, or are looked at afterwards ---


def look(**changes):
    return tool(name="look", side_effect=t.SIDE_EFFECT_NONE, **changes)


@pytest.mark.parametrize(
    ("tools", "fields"),
    [
        ([tool(resources=["Arm"])], {"spec.tools[0].resources[0]"}),
        ([tool(resources=["arm", "arm"])], {"spec.tools[0].resources[1]"}),
        ([tool(resources=[f"r{n}" for n in range(17)])], {"spec.tools[0].resources"}),
        ([tool(lifecycle=9)], {"spec.tools[0].lifecycle"}),
        ([tool(verify="nobody")], {"spec.tools[0].verify"}),
        ([tool(verify="look"), tool(name="look")], {"spec.tools[0].verify"}),
        ([tool(verify="look"), look(resources=["arm"])], {"spec.tools[0].verify"}),
        (
            [tool(verify="look"), look(lifecycle=t.LIFECYCLE_BACKGROUND)],
            {"spec.tools[0].verify"},
        ),
        ([tool(verify="look"), look(needs_approval=True)], {"spec.tools[0].verify"}),
    ],
)
def test_a_tool_that_can_not_be_so_is_refused_by_name(tools, fields):
    assert set(violations(spec(tools=tools))) == fields


def test_a_tool_arrives_with_what_it_uses():
    asked = tool(resources=["arm", "base.left"], lifecycle=t.LIFECYCLE_BACKGROUND, verify="look")
    made = convert(spec(tools=[asked, look()])).tools[0]
    assert made.resources == ("arm", "base.left")
    assert made.lifecycle is core.Lifecycle.BACKGROUND
    assert made.verify == "look"
    assert convert_client.tool(made).resources == asked.resources


@pytest.mark.parametrize("strategy", core.ToolStrategy)
def test_a_tool_strategy_arrives(strategy):
    asked = convert_client.run_spec("go", [], {"tool_strategy": strategy, "engine": "small"})
    assert convert(asked).tool_strategy is strategy


def test_an_unknown_tool_strategy_is_refused_by_name():
    assert set(violations(spec(tool_strategy=9))) == {"spec.tool_strategy"}


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        (pb.ToolUpdateRequest(run_id="r", tool_call_id="c"), {"parts"}),
        (pb.ToolUpdateRequest(tool_call_id="c", done=True), {"run_id"}),
        (pb.ToolUpdateRequest(run_id="r", done=True), {"tool_call_id"}),
    ],
)
def test_an_update_that_tells_nothing_is_refused(request_, fields):
    with pytest.raises(InvalidRequest) as refused:
        convert_tools.tool_update(request_, LIMITS)
    assert {each.field for each in refused.value.violations} == fields


def test_an_error_on_a_result_is_the_daemons_own_to_set():
    sent = t.ToolResult(tool_call_id="c", error=t.RunError(reason="X"))
    with pytest.raises(InvalidRequest) as refused:
        convert_tools.tool_results([sent], LIMITS)
    assert [each.field for each in refused.value.violations] == ["results[0].error"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"outcome": pb.OUTCOME_UNSPECIFIED}, "outcome"),
        ({"evidence": " "}, "evidence"),
        ({"evidence": "x" * 1025}, "evidence"),
        ({"run_id": ""}, "run_id"),
        ({"tool_call_id": ""}, "tool_call_id"),
    ],
)
def test_a_resolution_without_a_ground_is_refused(changes, field):
    whole = {"run_id": "r", "tool_call_id": "c", "outcome": pb.OUTCOME_ACTED, "evidence": "seen"}
    with pytest.raises(InvalidRequest) as refused:
        convert_request.resolution(pb.ResolveOutcomeRequest(**{**whole, **changes}))
    assert [each.field for each in refused.value.violations] == [field]


@pytest.mark.parametrize("role", [t.ROLE_SYSTEM, t.ROLE_TOOL])
def test_only_users_say_something_to_a_run(role):
    said = [t.Message(role=role, parts=[t.Part(text="hi")])]
    with pytest.raises(InvalidRequest) as refused:
        convert_request.appended(pb.AppendMessagesRequest(run_id="r", messages=said))
    assert "messages[0].role" in {each.field for each in refused.value.violations}


@pytest.mark.parametrize("cursor", [2**63, 2**64 - 1])
def test_a_cursor_beyond_what_the_ledger_counts_to_is_refused(cursor):
    with pytest.raises(InvalidRequest) as refused:
        convert_request.results_wanted(pb.WaitResultsRequest(cursor=cursor))
    assert [each.field for each in refused.value.violations] == ["cursor"]
    with pytest.raises(InvalidRequest) as refused:
        convert_request.acknowledged(pb.AckResultsRequest(cursor=cursor))
    assert [each.field for each in refused.value.violations] == ["cursor"]


@given(st.integers(0, 4_000_000_000).map(lambda thousandths: thousandths / 1000))
def test_a_span_of_milliseconds_arrives_as_it_was_sent(value_s):
    assert spans_.seconds(spans_.filled(Duration(), value_s)) == value_s


def test_a_bound_of_cost_arrives_and_one_beyond_all_money_is_refused():
    asked = convert_client.run_spec("go", [], {"max_cost_nano_usd": 5, "engine": "small"})
    assert convert(asked).limits.max_cost_nano_usd == 5
    asked.limits.max_cost_nano_usd = 10**18 + 1
    assert set(violations(asked)) == {"spec.limits.max_cost_nano_usd"}
