"""What can't be served is refused at once, with the arithmetic. Pure."""

from dataclasses import dataclass

from edge_agent.core import EngineState
from edge_agent.errors import DeadlineExceeded, LoadFailed, Overloaded
from edge_agent.scheduling.eviction import TooLarge
from edge_agent.scheduling.pace import Pace
from edge_agent.scheduling.pressure import slowdown
from edge_agent.scheduling.residents import Resident
from edge_agent.scheduling.values import EngineFacts, Heat, QueuedStep

_SURE_SHARE = 0.8
"""Refused only where even this share of the estimate is too long: an estimate is no measurement."""
_DRAIN_SHARE = 0.1
"""Told to come back when a tenth of what waits has been served."""
_RETRY_BOUNDS_S = (0.1, 60.0)
_DEFAULT_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a step will take at least, in seconds."""

    load_s: float
    prefill_s: float
    decode_s: float

    @property
    def sure_s(self) -> float:
        """What it will take even if much goes better than usual."""
        return (self.load_s + self.prefill_s + self.decode_s) * _SURE_SHARE


def estimate(
    step: QueuedStep,
    facts: EngineFacts,
    resident: Resident | None,
    pace: Pace,
    heat: Heat,
    now_s: float,
) -> Estimate | None:
    """The least that a step takes if it is served before all others; None: nothing was measured."""
    prefill_s = pace.prefill_s(step.prompt_tokens)
    decode_s = pace.decode_s(step.output_tokens)
    if prefill_s is None or decode_s is None:
        return None
    load_s = facts.load_s
    if resident is not None and resident.state is EngineState.LOADING:
        load_s = max(0.0, load_s - (now_s - resident.asked_s))
    elif resident is not None and resident.state is not EngineState.STOPPING:
        load_s = 0.0
    factor = slowdown(heat)
    return Estimate(load_s, prefill_s * factor, decode_s * factor)


def unmeetable(step: QueuedStep, needs: Estimate, left_s: float) -> DeadlineExceeded:
    """The deadline can't be met."""
    total_s = needs.load_s + needs.prefill_s + needs.decode_s
    sums = " + ".join(
        f"{name} {seconds:.1f} s"
        for name, seconds in (
            ("load", needs.load_s),
            ("prefill", needs.prefill_s),
            ("decode", needs.decode_s),
        )
    )
    return DeadlineExceeded(
        f"engine {step.engine}: {sums} = {total_s:.1f} s, but only {left_s:.1f} s are left",
        reason="DEADLINE_UNMEETABLE",
        metadata={
            "engine": step.engine,
            "load_s": f"{needs.load_s:.3f}",
            "prefill_s": f"{needs.prefill_s:.3f}",
            "decode_s": f"{needs.decode_s:.3f}",
            "left_s": f"{left_s:.3f}",
        },
    )


def overloaded(waiting: int, limit: int, steps_per_s: float | None) -> Overloaded:
    """Too many wait; worth another try once a tenth of them has been served as measured."""
    least, most = _RETRY_BOUNDS_S
    retry_s = _DEFAULT_RETRY_S
    if steps_per_s:
        retry_s = min(most, max(least, waiting * _DRAIN_SHARE / steps_per_s))
    return Overloaded(
        f"{waiting} steps wait already, at most {limit}",
        metadata={"waiting_steps": waiting, "limit": limit},
        retry_after_s=retry_s,
    )


def too_large(found: TooLarge) -> LoadFailed:
    """The engine can't ever fit here as things are configured."""
    beside = f" beside the pinned {', '.join(found.pinned)}" if found.pinned else ""
    return LoadFailed(
        f"engine {found.engine} needs {found.needed_bytes} bytes to load; "
        f"at most {found.most_bytes} can be free for it{beside}",
        reason="ENGINE_TOO_LARGE",
        metadata={
            "engine": found.engine,
            "needed_bytes": found.needed_bytes,
            "available_bytes": found.most_bytes,
            "pinned": ", ".join(found.pinned),
        },
    )
