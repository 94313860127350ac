"""What is kept of a run beside its events: a record of each step and tool call, text as logged.

Frozen values only; `ledger` keeps them, `runs` makes them, `edge-agent trace` shows them. Times
named `..._at_s` are Unix times, for people. Hashes are the first 16 hexadecimal digits of SHA-256.
"""

import enum
from dataclasses import dataclass

from edge_agent.core import Executor, SideEffect, Usage


class Effect(enum.StrEnum):
    """How far a call has come: INTENDED before it starts, committed where it acts once only.

    UNKNOWN: whoever executed it is gone, and nobody knows whether it acted.
    """

    INTENDED = "INTENDED"
    DONE = "DONE"
    FAILED = "FAILED"
    UNKNOWN = "UNKNOWN"


class ResultClass(enum.StrEnum):
    """What kind of result a tool call had."""

    OK = "OK"
    EMPTY = "EMPTY"
    ERROR = "ERROR"
    TIMEOUT = "TIMEOUT"
    DENIED = "DENIED"
    INVALID = "INVALID"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, slots=True)
class LoggedText:
    """Neighbouring text deltas of one step, numbered from `first` without a gap.

    Delta n ends at character `ends[n]` of `text` and was `tokens[n]` tokens.
    """

    step: int
    first: int
    text: str
    ends: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One attempt at one step of a run.

    `parent` is the step whose results this one goes on from; `attempt` counts from 1 and rises when
    a restart makes the step run again. `finish` is the finish reason, or the reason of the error
    that it ended with. `body` is what the step decided, as JSON, where the policy keeps it.
    """

    run_id: str
    step: int
    attempt: int
    parent: int | None
    started_at_s: float
    duration_s: float
    route: str
    engine: str
    engine_digest: str
    template_hash: str
    tools_hash: str
    seed: int | None
    usage: Usage
    finish: str
    repaired: bool = False
    available_before_bytes: int | None = None
    available_after_bytes: int | None = None
    power_mode: str | None = None
    body: str | None = None


@dataclass(frozen=True, slots=True)
class Resolution:
    """What ended the doubt about a call; `client` is empty for the call's own `verify` tool."""

    client: str
    evidence: str
    resolved_at_s: float


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One tool call of a run. `body` is its arguments and result, as JSON, where it is kept."""

    run_id: str
    step: int
    call_id: str
    tool: str
    executor: Executor
    side_effect: SideEffect
    arguments_hash: str
    effect: Effect
    issued_at_s: float
    ended_at_s: float | None = None
    result_class: ResultClass | None = None
    result_bytes: int | None = None
    body: str | None = None
    resolution: Resolution | None = None
