"""What a step may decode, what is refused beforehand, and the check of what was decoded."""

import json
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.backends.llama_cpp import LlamaCpp
from edge_agent.core import RunError, Tool
from edge_agent.decoding.schemas import check_schemas, union_schema, validate
from edge_agent.errors import StepFailed

LAMP = Tool(
    "set_lamp",
    "Switch a lamp.",
    json.dumps({
        "type": "object",
        "properties": {"lamp": {"enum": ["front", "rear"]}, "on": {"type": "boolean"}},
        "required": ["lamp", "on"],
        "additionalProperties": False,
    }),
)  # fmt: skip
STOP = Tool("stop", "Stop.", '{"type": "object", "additionalProperties": false}')

# Compiling a grammar needs the library and no model.
unenforceable = LlamaCpp().check_schema


def tool(schema: object) -> Tool:
    return Tool("probe", "", json.dumps(schema))


def refusal(tools: tuple[Tool, ...], output_schema: object = None) -> RunError:
    with pytest.raises(StepFailed) as caught:
        check_schemas(tools, json.dumps(output_schema) if output_schema else "", unenforceable)
    return caught.value.error


def accepts(schema_json: str, value: object) -> bool:
    try:
        validate(schema_json, json.dumps(value))
    except StepFailed:
        return False
    return True


class TestUnion:
    def test_is_a_call_of_a_tool_or_an_answer(self):
        union = union_schema((LAMP, STOP), "")
        assert accepts(union, {"name": "set_lamp", "arguments": {"lamp": "rear", "on": True}})
        assert accepts(union, {"name": "stop", "arguments": {}})
        assert accepts(union, {"answer": "Done."})

    @pytest.mark.parametrize(
        "value",
        [
            {"name": "stop", "arguments": {"lamp": "rear", "on": True}},  # another tool's
            {"name": "set_lamp", "arguments": {"lamp": "middle", "on": True}},
            {"name": "set_lamp", "arguments": {"lamp": "rear"}},
            {"name": "fly", "arguments": {}},
            {"name": "stop"},
            {"name": "stop", "arguments": {}, "answer": "both"},
            {"answer": 7},
            {},
            "Done.",
        ],
    )
    def test_is_nothing_else(self, value: object):
        assert not accepts(union_schema((LAMP, STOP), ""), value)

    def test_the_answer_branch_is_there_without_tools_too(self):
        assert accepts(union_schema((), ""), {"answer": "Hello."})

    def test_an_output_schema_replaces_the_answers_text(self):
        union = union_schema((STOP,), '{"type": "integer"}')
        assert accepts(union, {"answer": 7})
        assert not accepts(union, {"answer": "seven"})

    def test_a_schemas_own_references_hold_inside_the_union(self):
        shelf = tool({
            "type": "object",
            "properties": {"shelf": {"$ref": "#/$defs/number"}},
            "required": ["shelf"],
            "$defs": {"number": {"type": "integer"}},
        })  # fmt: skip
        report = {"$ref": "#/$defs/report", "$defs": {"report": {"const": "ok"}}}
        union = union_schema((STOP, shelf), json.dumps(report))
        assert unenforceable(union) is None
        assert accepts(union, {"name": "probe", "arguments": {"shelf": 3}})
        assert not accepts(union, {"name": "probe", "arguments": {"shelf": "three"}})
        assert accepts(union, {"answer": "ok"})
        assert not accepts(union, {"answer": 3})

    @given(st.text(min_size=1, max_size=20), st.text(max_size=20))
    def test_holds_any_name_and_any_answer(self, name: str, answer: str):
        union = union_schema((Tool(name, "", STOP.input_schema_json),), "")
        assert accepts(union, {"name": name, "arguments": {}})
        assert accepts(union, {"answer": answer})


class TestRefusals:
    def test_good_schemas_are_accepted_as_they_are(self):
        check_schemas((LAMP, STOP), '{"type": "integer"}', unenforceable)
        assert refusal((LAMP, tool({"not": {}}))).metadata["tool"] == "probe"

    @pytest.mark.parametrize(
        ("schema", "named"),
        [
            ({"not": {"type": "string"}}, "not"),
            ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "uniqueItems"),
            ({"type": "array", "contains": {"type": "string"}}, "contains"),
            ({"type": "object", "if": {}, "then": {}}, "if"),
            ({"type": "string", "pattern": "(?=a)b"}, "regex"),
            ({"$ref": "https://example.com/schema.json"}, "https://example.com/schema.json"),
        ],
    )
    def test_names_what_cannot_be_enforced(self, schema: dict[str, Any], named: str):
        error = refusal((tool(schema),))
        assert error.reason == "SCHEMA_UNSUPPORTED"
        assert named in error.message
        assert named in error.metadata["detail"]
        assert error.metadata["tool"] == "probe"
        assert not error.retryable

    @pytest.mark.parametrize(
        ("schema", "named"),
        [
            ({"type": "strin"}, "strin"),
            ({"type": "object", "required": "lamp"}, "lamp"),
            ({"$schema": "https://example.com/dialect", "type": "object"}, "example.com/dialect"),
            ({"$schema": 7, "not": {}}, "7"),
            # The grammar engine would take these: it does not look at what is for people.
            ({"type": "string", "description": ["x"]}, '"x"'),
            ({"type": "object", "title": 5}, "5"),
        ],
    )
    def test_tells_what_is_no_schema_from_what_cannot_be_enforced(
        self, schema: dict[str, Any], named: str
    ):
        error = refusal((tool(schema),))
        assert error.reason == "SCHEMA_INVALID"
        assert named in error.message

    def test_names_the_output_schema(self):
        error = refusal((LAMP,), {"not": {"type": "string"}})
        assert "the output schema" in error.message
        assert error.metadata["tool"] == ""

    @pytest.mark.parametrize("keyword", ["$ref", "$schema"])
    def test_never_asks_the_network(self, keyword: str):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(0)
            port = listener.getsockname()[1]
            refusal((tool({keyword: f"http://127.0.0.1:{port}/schema.json"}),))
            with pytest.raises(BlockingIOError):  # nobody has connected
                listener.accept()


class TestValidation:
    @pytest.mark.parametrize("text", ["7", '{"lamp": "rear"', "", '{"lamp": "rear", "on": 1}'])
    def test_refuses_what_does_not_satisfy_the_schema(self, text: str):
        with pytest.raises(StepFailed) as caught:
            validate(LAMP.input_schema_json, text)
        assert caught.value.error.reason == "OUTPUT_INVALID"
        assert caught.value.error.retryable
        assert caught.value.error.metadata["detail"]

    def test_a_remote_reference_is_refused_without_the_network(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(0)
            port = listener.getsockname()[1]
            with pytest.raises(StepFailed, match="outside the schema"):
                validate(json.dumps({"$ref": f"http://127.0.0.1:{port}/x.json"}), "7")
            with pytest.raises(BlockingIOError):
                listener.accept()
