"""What becomes of a run that the last daemon left unfinished. Pure.

Nothing stale acts: a run goes on by itself only where calling its tools again leaves nothing
behind; otherwise somebody who has looked at the world resumes it.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from edge_agent.core import Executor, Run, RunError, RunSpec, RunState, SideEffect
from edge_agent.records import CallRecord, Effect

MAX_DEATHS = 2
"""A step that was running when this many daemons died is taken to be what kills them."""
SEQUENCE_GAP = 1 << 20
"""Above the number of tokens that a step can have: its text deltas were shown and not written."""

_SUSPENDS = ("HALTED", "HEARTBEAT_LAPSED")
_ENDS = {
    "CANCELLED_BY_CALLER": RunState.CANCELLED,
    "CLIENT_DISCONNECTED": RunState.CANCELLED,
    "RUN_TIMEOUT": RunState.EXPIRED,
}


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A run as the ledger has it. `run` is whole, with its transcript."""

    run: Run
    spec: RunSpec
    running_step: int | None
    deaths: int
    calls: Sequence[CallRecord]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with it: `state` QUEUED (it goes on), SUSPENDED, or its end.

    `deaths` is how many daemons have died in its running step by now; `calls` are the records of
    calls that had begun, with what is known of them now.
    """

    state: RunState
    error: RunError | None = None
    deaths: int = 0
    calls: tuple[CallRecord, ...] = ()


def judge(left: Unfinished) -> Verdict:
    """What becomes of the run."""
    calls = tuple(_settled(call, left.run) for call in left.calls if call.effect is Effect.INTENDED)
    return dataclasses.replace(_judge(left, calls), calls=calls)


def _judge(left: Unfinished, calls: Sequence[CallRecord]) -> Verdict:
    run = left.run
    # Also those that an earlier daemon found out about, and died before it could end the run.
    doubtful = (*calls, *(call for call in left.calls if call.effect is Effect.UNKNOWN))
    if unknown := [call.call_id for call in doubtful if call.effect is Effect.UNKNOWN]:
        return _outcome_unknown(unknown)
    if run.state is RunState.SUSPENDED:  # before the daemon ended, so it did not die of this run
        stopping = run.error is not None and run.error.reason == "DAEMON_STOPPING"
        goes_on = stopping and acts_nowhere(left.spec)
        return Verdict(
            RunState.QUEUED if goes_on else RunState.SUSPENDED,
            None if goes_on else run.error,
            left.deaths,
        )
    begun = (*run.open_tool_calls, *run.background_tool_calls)
    if run.state is RunState.CANCELLING and begun:
        return _outcome_unknown([call.id for call in begun])
    if run.state is RunState.CANCELLING and (ended := _stopped_for(run.error)) is not None:
        return Verdict(ended, run.error, left.deaths)
    deaths = left.deaths + (left.running_step is not None)
    if deaths >= MAX_DEATHS:
        message = f"step {left.running_step} was running when {deaths} daemons died"
        metadata = {"step": str(left.running_step), "deaths": str(deaths)}
        return Verdict(RunState.FAILED, RunError("STEP_ENDS_DAEMON", message, False, metadata))
    if run.state is not RunState.CANCELLING and acts_nowhere(left.spec):
        return Verdict(RunState.QUEUED, None, deaths)
    return Verdict(RunState.SUSPENDED, restarted(), deaths)


def _stopped_for(error: RunError | None) -> RunState | None:
    """How a run ends that was stopped for this; None: it was to be suspended."""
    if error is None or error.reason in _SUSPENDS:
        return None
    return _ENDS.get(error.reason, RunState.FAILED)


def acts_nowhere(spec: RunSpec) -> bool:
    """Whether everything that the run may call leaves nothing behind."""
    return all(tool.side_effect is SideEffect.NONE for tool in spec.tools)


def restarted() -> RunError:
    """Why a run is suspended after a restart."""
    message = "the daemon was restarted; ResumeRun lets the run go on"
    return RunError("DAEMON_RESTARTED", message, retryable=True)


def _settled(call: CallRecord, run: Run) -> CallRecord:
    """A call that had begun, with what is known of it now."""
    if call.call_id in {each.id for each in run.background_tool_calls}:
        return call
    for turn in run.transcript:
        if turn.tool_call_id == call.call_id:
            effect = Effect.FAILED if turn.is_error else Effect.DONE
            return dataclasses.replace(call, effect=effect)
    once = call.side_effect is SideEffect.NON_IDEMPOTENT
    if once and call.executor is Executor.DAEMON:
        return dataclasses.replace(call, effect=Effect.UNKNOWN)
    return call


def _outcome_unknown(ids: Sequence[str]) -> Verdict:
    names = ", ".join(ids)
    message = f"the daemon ended while {names} may have acted; nobody knows what came of it"
    metadata = {"cause": "DAEMON_RESTARTED", "tool_call_ids": names}
    error = RunError("OUTCOME_UNKNOWN", message, False, metadata)
    return Verdict(RunState.OUTCOME_UNKNOWN, error)
