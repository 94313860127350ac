"""The record of each step and tool call: what it was and what came of it.

Bodies are kept by policy only. Writes nothing itself: `Records` does.
"""

import dataclasses
import hashlib
import time
from typing import Literal, Protocol

import msgspec

from edge_agent.core import (
    EngineInfo,
    Message,
    RunSpec,
    StepResult,
    TextPart,
    ToolCall,
    ToolResult,
    Usage,
)
from edge_agent.records import CallRecord, Effect, Resolution, ResultClass, StepRecord

SUMMARY = "SUMMARY"
"""The route of a step that sums up a session's history, and decides nothing."""
Bodies = Literal["off", "errors", "all"]
_NOTHING = ("", "{}", "[]", "null", '""')
"""Results that look like one and say nothing."""


class Records(Protocol):
    """Where records are kept."""

    def step_started(self, run_id: str, step: int) -> None:
        """This step of a durable run begins. Does not block."""
        ...

    def step(self, record: StepRecord) -> None:
        """Keep the record of a step. Does not block; may be lost when much else is written."""
        ...

    def call(self, record: CallRecord) -> None:
        """Keep the record of a call. Does not block; may be lost when much else is written."""
        ...

    async def intend(self, record: CallRecord) -> None:
        """Keep the record of a call that is about to start: on disk when this returns.

        Raises:
            EdgeAgentError: it could not be written, so the call must not start.
        """
        ...


class NoRecords:
    """Implements `Records`: nothing is kept."""

    def step_started(self, run_id: str, step: int) -> None:
        """Nothing."""

    def step(self, record: StepRecord) -> None:
        """Nothing."""

    def call(self, record: CallRecord) -> None:
        """Nothing."""

    async def intend(self, record: CallRecord) -> None:
        """Nothing."""


class Machine(Protocol):
    """What the machine is like just now."""

    def available_bytes(self) -> int | None:
        """MemAvailable."""
        ...

    def power_mode(self) -> str | None:
        """As nvpmodel names it."""
        ...


class StepRecorder:
    """Makes the records of one run."""

    def __init__(
        self,
        run_id: str,
        spec: RunSpec,
        engine: EngineInfo | None,
        machine: Machine | None,
        bodies: Bodies,
    ) -> None:
        """Hash once what stays the same for the whole run."""
        self._run_id = run_id
        self._spec = spec
        self._digest = engine.digest if engine else ""
        self._template_hash = engine.template_hash if engine else ""
        self._machine = machine
        self._bodies = bodies
        self._tools = {tool.name: tool for tool in spec.tools}
        self._tools_hash = _hash(msgspec.json.encode(spec.tools)) if spec.tools else ""

    def begin(self, step: int, parent: int | None, attempt: int) -> StepRecord:
        """A step that is about to be decided."""
        return StepRecord(
            run_id=self._run_id,
            step=step,
            attempt=attempt,
            parent=parent,
            started_at_s=time.time(),
            duration_s=0.0,
            route="LOCAL",
            engine=self._spec.engine,
            engine_digest=self._digest,
            template_hash=self._template_hash,
            tools_hash=self._tools_hash,
            seed=self._spec.sampling.seed,
            usage=Usage(),
            finish="",
            available_before_bytes=self._machine.available_bytes() if self._machine else None,
            power_mode=self._machine.power_mode() if self._machine else None,
        )

    def decided(self, record: StepRecord, result: StepResult, message: Message) -> StepRecord:
        """The same step, once it is decided."""
        body = msgspec.json.encode(message).decode() if self._bodies == "all" else None
        return self._ended(
            record,
            finish=result.finish_reason.value,
            usage=result.usage,
            repaired=result.repaired,
            body=body,
        )

    def failed(self, record: StepRecord, reason: str, message: str) -> StepRecord:
        """The same step, ended by an error."""
        body = None if self._bodies == "off" else message
        return self._ended(record, finish=reason, body=body)

    def intended(self, step: int, call: ToolCall) -> CallRecord:
        """A call that is about to be made."""
        tool = self._tools[call.name]
        return CallRecord(
            run_id=self._run_id,
            step=step,
            call_id=call.id,
            tool=call.name,
            executor=tool.executor,
            side_effect=tool.side_effect,
            arguments_hash=_hash(call.arguments_json.encode()),
            effect=Effect.INTENDED,
            issued_at_s=time.time(),
        )

    def ended(
        self,
        record: CallRecord,
        call: ToolCall,
        result: ToolResult,
        kind: ResultClass | None = None,
        resolution: Resolution | None = None,
    ) -> CallRecord:
        """The same call with its result; `resolution`: how that is known, if not at first."""
        text = "".join(part.text for part in result.parts if isinstance(part, TextPart))
        kept = self._bodies == "all" or (self._bodies == "errors" and result.is_error)
        body = {"arguments": msgspec.Raw(call.arguments_json.encode()), "result": text}
        return dataclasses.replace(
            record,
            effect=Effect.FAILED if result.is_error or result.cancelled else Effect.DONE,
            ended_at_s=time.time(),
            result_class=kind or _class_of(result, text),
            result_bytes=len(text.encode()),
            body=msgspec.json.encode(body).decode() if kept else None,
            resolution=resolution,
        )

    def lost(self, record: CallRecord, kind: ResultClass | None = None) -> CallRecord:
        """The same call, of which nobody knows whether it acted."""
        return dataclasses.replace(
            record, effect=Effect.UNKNOWN, ended_at_s=time.time(), result_class=kind
        )

    def _ended(self, record: StepRecord, **changes: object) -> StepRecord:
        available = self._machine.available_bytes() if self._machine else None
        return dataclasses.replace(
            record,
            duration_s=time.time() - record.started_at_s,
            available_after_bytes=available,
            **changes,  # type: ignore[arg-type]  # fields of StepRecord
        )


def _class_of(result: ToolResult, text: str) -> ResultClass:
    if result.cancelled:
        return ResultClass.CANCELLED
    if result.error is not None:  # there was a result, and it was not let through
        return ResultClass.INVALID
    if result.is_error:
        return ResultClass.ERROR
    return ResultClass.EMPTY if text.strip() in _NOTHING else ResultClass.OK


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
