"""Decides cases with the engine in this process, as a worker does, and judges what came of it."""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks._shared import Arguments
from benchmarks._tool_cases import Case
from edge_agent.backends import create_backend
from edge_agent.backends.base import LoadOptions
from edge_agent.core import ANSWER, StepRequest, StepResult, Tool, ToolStrategy
from edge_agent.decoding import schemas
from edge_agent.decoding.steps import StepDecoder
from edge_agent.errors import StepFailed

_OUTPUT_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one case. `valid` None: nothing was completed.

    `right_arguments` None: the case does not say which ones would be right.
    """

    case: Case
    chosen: str
    right_arguments: bool | None
    valid: bool | None
    repaired: bool
    step_ms: float

    @property
    def right_tool(self) -> bool:
        """Whether the right tool was called, or none where none fits."""
        return self.chosen == self.case.tool


@contextlib.contextmanager
def loaded_decoder(arguments: Arguments) -> Iterator[StepDecoder]:
    """The engine as a daemon with default settings and one thread loads it."""
    manifest, options = arguments.manifest(), LoadOptions(**arguments.load_options())
    backend = create_backend(manifest.backend.name)
    backend.load(manifest, arguments.engine_directory, options, lambda _fraction: None)
    try:
        yield StepDecoder(backend, manifest, options.context_tokens)
    finally:
        backend.close()


def decide_all(
    decoder: StepDecoder, strategy: ToolStrategy, cases: Sequence[Case], *, warm: bool
) -> list[Outcome]:
    """All cases in order.

    `warm`: where the tools are new, another case with them is decided beforehand, so that their
    prompt is cached and what a strategy measures once for them is measured.
    """
    outcomes: list[Outcome] = []
    tools: tuple[Tool, ...] = ()
    for case in cases:
        if warm and case.tools != tools:
            _decide(decoder, strategy, next(c for c in reversed(cases) if c.tools == case.tools))
        outcomes.append(_judge(case, *_decide(decoder, strategy, case)))
        tools = case.tools
    return outcomes


def _decide(
    decoder: StepDecoder, strategy: ToolStrategy, case: Case
) -> tuple[StepResult | None, float]:
    """The decision, None where there is none, and how long it took, in milliseconds."""
    request = StepRequest(
        case.messages, case.tools, max_output_tokens=_OUTPUT_TOKENS, tool_strategy=strategy
    )
    began_s = time.monotonic()
    try:
        result = decoder.decide(request, threading.Event(), lambda _text, _tokens: None)
    except StepFailed:
        result = None
    return result, (time.monotonic() - began_s) * 1000


def _judge(case: Case, result: StepResult | None, step_ms: float) -> Outcome:
    if result is None:
        return Outcome(case, "", False if case.right else None, None, False, step_ms)
    if not result.tool_calls:
        right = False if case.right else None
        return Outcome(case, ANSWER, right, None, result.repaired, step_ms)
    call = result.tool_calls[0]
    tool = next(tool for tool in case.tools if tool.name == call.name)
    try:
        schemas.validate(tool.input_schema_json, call.arguments_json)
        valid = True
    except StepFailed:
        valid = False
    right = None if case.right is None else call.name == case.tool and case.right(call)
    return Outcome(case, call.name, right, valid, result.repaired, step_ms)
