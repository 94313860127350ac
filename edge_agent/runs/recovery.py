"""What becomes of a run that the last daemon left unfinished. Pure.

Nothing stale acts: a run goes on by itself only where calling its tools again leaves nothing
behind; otherwise somebody who has looked at the world resumes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from edge_agent.core import Executor, Run, RunError, RunSpec, RunState, SideEffect
from edge_agent.records import CallRecord, Effect

MAX_DEATHS = 2
"""A step that was running when this many daemons died is taken to be what kills them."""
SEQUENCE_GAP = 1 << 20
"""Above the number of tokens that a step can have: its text deltas were shown and not written."""


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

    `deaths` is how many daemons have died in its running step by now; `unknown` are the calls of
    which nobody knows whether they acted.
    """

    state: RunState
    error: RunError | None = None
    deaths: int = 0
    unknown: tuple[CallRecord, ...] = ()


def judge(left: Unfinished) -> Verdict:
    """What becomes of the run."""
    run = left.run
    unknown = tuple(call for call in left.calls if _may_have_acted(call))
    if unknown:
        return _outcome_unknown([call.call_id for call in unknown], unknown)
    if run.state is RunState.SUSPENDED:  # before the daemon ended, so it did not die of this run
        return Verdict(RunState.SUSPENDED, run.error, left.deaths)
    if run.state is RunState.CANCELLING and run.open_tool_calls:
        return _outcome_unknown([call.id for call in run.open_tool_calls])
    deaths = left.deaths + (left.running_step is not None)
    if deaths >= MAX_DEATHS:
        message = f"step {left.running_step} was running when {deaths} daemons died"
        metadata = {"step": str(left.running_step), "deaths": str(deaths)}
        return Verdict(RunState.FAILED, RunError("STEP_ENDS_DAEMON", message, False, metadata))
    if run.state is not RunState.CANCELLING and acts_nowhere(left.spec):
        return Verdict(RunState.QUEUED, None, deaths)
    return Verdict(RunState.SUSPENDED, restarted(), deaths)


def acts_nowhere(spec: RunSpec) -> bool:
    """Whether everything that the run may call leaves nothing behind."""
    return all(tool.side_effect is SideEffect.NONE for tool in spec.tools)


def restarted() -> RunError:
    """Why a run is suspended after a restart."""
    message = "the daemon was restarted; ResumeRun lets the run go on"
    return RunError("DAEMON_RESTARTED", message, retryable=True)


def _may_have_acted(call: CallRecord) -> bool:
    return (
        call.effect is Effect.INTENDED
        and call.executor is Executor.DAEMON
        and call.side_effect is SideEffect.NON_IDEMPOTENT
    )


def _outcome_unknown(ids: Sequence[str], unknown: tuple[CallRecord, ...] = ()) -> Verdict:
    names = ", ".join(ids)
    message = f"the daemon ended while {names} may have acted; nobody knows what came of it"
    metadata = {"cause": "DAEMON_RESTARTED", "tool_call_ids": names}
    error = RunError("OUTCOME_UNKNOWN", message, False, metadata)
    return Verdict(RunState.OUTCOME_UNKNOWN, error, unknown=unknown)
