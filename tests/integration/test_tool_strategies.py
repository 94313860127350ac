"""Each tool strategy with the embedded engine: what comes of it can be called, or is words."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.backends import create_backend
from edge_agent.backends.base import LoadOptions
from edge_agent.core import (
    FinishReason,
    Message,
    Role,
    StepRequest,
    StepResult,
    TextPart,
    Tool,
    ToolExample,
    ToolStrategy,
)
from edge_agent.decoding.schemas import validate
from edge_agent.decoding.steps import StepDecoder
from edge_agent.engines.manifest import MANIFEST_NAME, decode_manifest
from edge_agent.errors import StepFailed
from tests.conftest import ENGINE

LAMP = Tool(
    "set_lamp",
    "Switch the lamp.",
    '{"type":"object","properties":{"on":{"type":"boolean"}},"required":["on"],'
    '"additionalProperties":false}',
    (ToolExample("Lights out.", '{"on": false}'),),
)
BATTERY = Tool(
    "get_battery",
    "Tell how full the battery is.",
    '{"type":"object","properties":{},"additionalProperties":false}',
    (ToolExample("How much charge is left?", "{}"),),
)
TOOLS = {tool.name: tool for tool in (LAMP, BATTERY)}
OPTIONS = LoadOptions(slots=4, context_tokens=1024, threads=1, prefill_batch_tokens=64)


@pytest.fixture(scope="module")
def decoder(engine_store: Path) -> Iterator[StepDecoder]:
    directory = engine_store / ENGINE
    manifest = decode_manifest((directory / MANIFEST_NAME).read_bytes())
    backend = create_backend(manifest.backend.name)
    backend.load(manifest, directory, OPTIONS, lambda _fraction: None)
    yield StepDecoder(backend, manifest, OPTIONS.context_tokens)
    backend.close()


def decide(decoder: StepDecoder, goal: str, strategy: ToolStrategy) -> StepResult:
    request = StepRequest(
        (Message(Role.USER, (TextPart(goal),)),),
        tuple(TOOLS.values()),
        max_output_tokens=64,
        tool_strategy=strategy,
    )
    return decoder.decide(request, threading.Event(), lambda _text, _tokens: None)


@pytest.mark.parametrize("goal", ["Turn on the lamp.", "What is your battery level?"])
@pytest.mark.parametrize("strategy", ToolStrategy)
def test_a_goal_becomes_calls_that_satisfy_their_schemas_or_words(decoder, strategy, goal):
    """A model this weak may fail at writing natively: then the error says that."""
    reason, result = "", None
    try:
        result = decide(decoder, goal, strategy)
    except StepFailed as failed:
        reason = failed.error.reason
    if result is None:
        assert strategy is ToolStrategy.NATIVE
        assert reason in ("OUTPUT_INVALID", "OUTPUT_TRUNCATED")
        return
    for call in result.tool_calls:
        validate(TOOLS[call.name].input_schema_json, call.arguments_json)
    assert bool(result.tool_calls) is (result.finish_reason is FinishReason.TOOL_CALLS)
    assert result.tool_calls or result.text


@pytest.mark.parametrize("strategy", [ToolStrategy.RANKED, ToolStrategy.RANKED_FULL])
def test_a_ranked_goal_reaches_its_tool_and_says_how_sure_it_is(decoder, strategy):
    result = decide(decoder, "Turn on the lamp.", strategy)
    assert [call.name for call in result.tool_calls] == ["set_lamp"]
    assert result.tool_margin is not None
    assert 0.0 < result.tool_margin <= 1.0
