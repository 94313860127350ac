"""Engines in memory for tests of runs: each step waits until its test says what was decided."""

import asyncio
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_agent.core import (
    EngineInfo,
    EngineState,
    FinishReason,
    Limits,
    Message,
    Role,
    RunSpec,
    RunState,
    SideEffect,
    StepOrigin,
    StepRequest,
    StepResult,
    TextPart,
    Tool,
    ToolCall,
    ToolResult,
    Usage,
)
from edge_agent.errors import NotFound
from edge_agent.runs.halts import HaltLatch
from edge_agent.runs.runs import Runs
from edge_agent.runs.settings import RunSettings

ENGINE = "scripted"
STEP_TIMEOUT_S = 10.0
"""A test that waits for a step that never comes says so."""

USAGE = Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=5, decode_s=0.5, ttft_ms=20.0)


@dataclass(eq=False)
class Step:
    """One step that a run has asked for. Its test decides it, once."""

    engine: str
    request: StepRequest
    origin: StepOrigin
    on_text: Callable[[str, int], None]
    on_state: Callable[[RunState, float | None], None]
    outcome: "asyncio.Future[StepResult]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def open(self) -> bool:
        """Nobody has decided it, and the run still waits for it."""
        return not self.outcome.done()

    def say(self, *pieces: str) -> None:
        """Stream text."""
        for piece in pieces:
            self.on_text(piece, 1)

    def answer(self, text: str, finish: FinishReason = FinishReason.STOP) -> None:
        """Decide on an answer."""
        self.outcome.set_result(StepResult(text, (), finish, USAGE))

    def call(self, *calls: tuple[str, str]) -> None:
        """Decide on calls of these tools with these arguments."""
        made = tuple(ToolCall("", name, arguments) for name, arguments in calls)
        self.outcome.set_result(StepResult("", made, FinishReason.TOOL_CALLS, USAGE, 0.5))

    def fail(self, error: Exception) -> None:
        """End without a decision."""
        self.outcome.set_exception(error)


def _ignore_text(_text: str, _tokens: int) -> None:
    """Of a step that nobody waits for."""


def _ignore_state(_state: RunState, _progress: float | None) -> None:
    """Of a step that nobody waits for."""


class ScriptedEngines:
    """`Engines`: knows one engine, and hands every step of it to the test."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._asked: asyncio.Queue[Step] = asyncio.Queue()

    def engine(self, name: str) -> EngineInfo:
        """An installed engine."""
        if name != ENGINE:
            raise NotFound(f"no engine {name!r}", reason="ENGINE_NOT_FOUND")
        return EngineInfo(
            name=name,
            digest="0" * 64,
            backend="scripted",
            state=EngineState.READY,
            context_tokens=2048,
            max_output_tokens=1024,
            load_peak_bytes=1,
            steady_bytes=1,
            capabilities=("text", "tools"),
            licence="Apache-2.0",
        )

    async def decide(
        self,
        engine: str,
        request: StepRequest,
        origin: StepOrigin,
        *,
        on_text: Callable[[str, int], None],
        on_state: Callable[[RunState, float | None], None],
    ) -> StepResult:
        """Decide as the test says; cancelling this lets go of the step."""
        step = Step(engine, request, origin, on_text, on_state)
        self.steps.append(step)
        self._asked.put_nowait(step)
        try:
            return await step.outcome
        finally:
            step.on_text, step.on_state = _ignore_text, _ignore_state

    async def next(self) -> Step:
        """The next step that a run asks for, running."""
        async with asyncio.timeout(STEP_TIMEOUT_S):
            step = await self._asked.get()
        step.on_state(RunState.RUNNING, None)
        return step

    def open(self) -> list[Step]:
        """All steps that wait for a decision."""
        return [step for step in self.steps if step.open]


SETTINGS = RunSettings(
    tool_timeout_s=60.0,
    tool_call_valid_for_s=5.0,
    cancel_confirm_s=60.0,
    max_active=8,
    retention_s=3600.0,
    max_retained=100,
)

MOVE = Tool("move", "Move.", '{"type":"object"}', side_effect=SideEffect.IDEMPOTENT)
SPEAK = Tool("speak", "Speak.", '{"type":"object"}', side_effect=SideEffect.IDEMPOTENT)


def spec(text: str = "Go", tools: Iterable[Tool] = (MOVE, SPEAK), **changes: Any) -> RunSpec:
    """What a caller asks for; `max_steps` and `max_tool_calls` are its limits."""
    limits = Limits(changes.pop("max_steps", 8), changes.pop("max_tool_calls", 8))
    fields: dict[str, Any] = {"engine": ENGINE, "timeout_s": 60.0, **changes}
    message = Message(Role.USER, (TextPart(text),))
    return RunSpec((message,), limits=limits, tools=tuple(tools), **fields)


def result(call_id: str, text: str = "ok", **more: Any) -> ToolResult:
    """What came of a call."""
    return ToolResult(call_id, (TextPart(text),), **more)


def new_runs(directory: Path, **settings: Any) -> tuple[Runs, ScriptedEngines]:
    """An owner of runs whose engine the test plays."""
    engines = ScriptedEngines()
    latch = HaltLatch(directory / "halts.json")
    return Runs(engines, latch, dataclasses.replace(SETTINGS, **settings)), engines


async def settle() -> None:
    """Let everything run that needs no more than the loop."""
    for _ in range(20):
        await asyncio.sleep(0)
