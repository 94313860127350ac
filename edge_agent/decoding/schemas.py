"""JSON Schemas of what a step may decode, and the check of what it did decode.

Owns the shape of the union (a tool call, or `{"answer": ...}`). Runs in the worker: compiling and
validating hold the GIL.
"""

import functools
import json
from collections.abc import Callable, Sequence
from typing import NoReturn

import jsonschema_rs

from edge_agent.core import ANSWER, RunError, Tool
from edge_agent.errors import StepFailed

TEXT_ANSWER = '{"type":"string"}'
_CACHED_SCHEMAS = 512
_DIALECTS = (
    "https://json-schema.org/draft/2020-12/schema",
    "https://json-schema.org/draft/2019-09/schema",
    "http://json-schema.org/draft-07/schema",
    "http://json-schema.org/draft-06/schema",
    "http://json-schema.org/draft-04/schema",
)


def union_schema(tools: Sequence[Tool], output_schema_json: str) -> str:
    """One call of one of `tools`, or an answer."""
    branches: list[object] = [
        _closed({"name": {"const": tool.name}, "arguments": _resource(tool.input_schema_json, n)})
        for n, tool in enumerate(tools)
    ]
    branches.append(_closed({ANSWER: _resource(output_schema_json or TEXT_ANSWER, len(tools))}))
    return json.dumps({"anyOf": branches})


def _resource(schema_json: str, number: int) -> object:
    """A schema whose own references (`#/$defs/...`) still hold inside another one."""
    schema: object = json.loads(schema_json)
    if isinstance(schema, dict) and '"$ref"' in schema_json:
        return {"$id": f"urn:edge-agent:branch:{number}", **schema}
    return schema


def _closed(properties: dict[str, object]) -> dict[str, object]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def check_schemas(
    tools: Sequence[Tool],
    output_schema_json: str,
    unenforceable: Callable[[str], str | None],
) -> None:
    """Refuse a schema that is none, or that can't be enforced, before anything is decoded.

    Args:
        tools: whose `input_schema_json` are checked.
        output_schema_json: empty for none.
        unenforceable: what of a schema the grammar engine can't enforce; None if nothing.

    Raises:
        StepFailed: reason SCHEMA_INVALID or SCHEMA_UNSUPPORTED, naming the tool and the keyword.
    """
    named = [(f"tool {tool.name!r}", tool.name, tool.input_schema_json) for tool in tools]
    if output_schema_json:
        named.append(("the output schema", "", output_schema_json))
    for what, tool_name, schema_json in named:
        invalid = _meta_complaint(schema_json)
        if invalid is not None:
            _refuse("SCHEMA_INVALID", f"{what}: {invalid}", tool=tool_name, detail=invalid)
        complaint = unenforceable(schema_json)
        if complaint is not None:
            _refuse("SCHEMA_UNSUPPORTED", f"{what}: {complaint}", tool=tool_name, detail=complaint)


@functools.lru_cache(maxsize=_CACHED_SCHEMAS)
def _meta_complaint(schema_json: str) -> str | None:
    """What makes this no JSON Schema at all; None if it is one."""
    schema = json.loads(schema_json)
    if isinstance(schema, dict):
        # Nothing is fetched: `jsonschema_rs` would follow an unknown `$schema` over the network.
        declared = schema.get("$schema", _DIALECTS[0])
        if not isinstance(declared, str) or declared.removesuffix("#") not in _DIALECTS:
            return f"$schema: {declared!r}, must be one of {', '.join(_DIALECTS)}"
    try:
        jsonschema_rs.meta.validate(schema)
    except (ValueError, jsonschema_rs.ReferencingError) as error:
        return str(error).splitlines()[0]
    return None


@functools.lru_cache(maxsize=_CACHED_SCHEMAS)
def _validator(schema_json: str) -> jsonschema_rs.Validator:
    def refuse(uri: str) -> NoReturn:
        raise ValueError(f"reference to {uri} outside the schema")

    return jsonschema_rs.validator_for(json.loads(schema_json), retriever=refuse)


def validate(schema_json: str, text: str) -> None:
    """Check what was decoded against its schema; the grammar alone is not trusted.

    Raises:
        StepFailed: reason OUTPUT_INVALID, with the validator's words. Retryable.
    """
    try:
        _validator(schema_json).validate(json.loads(text))
    except ValueError as error:
        detail = str(error).splitlines()[0]
        _refuse("OUTPUT_INVALID", f"decoded output: {detail}", retryable=True, detail=detail)


def _refuse(reason: str, message: str, *, retryable: bool = False, **metadata: str) -> NoReturn:
    raise StepFailed(RunError(reason, message, retryable, metadata))
