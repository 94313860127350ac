"""From what happened in simulations to the figures that are reported. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks._sched_records import Outcome, Tally
from benchmarks._shared import percentile
from edge_agent.core import Priority

OURS = "ours"
SWAPPING = ("ping-pong", "bursts")
"""Workloads that are about bringing engines in and out."""
_STARVED_S = 3600.0

Tallies = Mapping[tuple[str, str], Mapping[str, Tally]]
"""By workload and device, then by policy."""


@dataclass(frozen=True, slots=True)
class Waits:
    """Of one class under one policy, in seconds."""

    p50_s: float
    p99_s: float
    longest_s: float
    latency_p99_s: float


def by_class(outcomes: Iterable[Outcome]) -> dict[Priority, list[Outcome]]:
    """Outcomes of each class that has any."""
    classes: dict[Priority, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        classes[outcome.step.priority].append(outcome)
    return {priority: classes[priority] for priority in Priority if classes[priority]}


def waits(outcomes: Sequence[Outcome]) -> Waits:
    """What never ended counts with how long it had waited."""
    waited = [outcome.wait_s for outcome in outcomes]
    latencies = [
        outcome.ended_s - outcome.step.asked_s if outcome.ended_s is not None else outcome.wait_s
        for outcome in outcomes
    ]
    return Waits(
        percentile(waited, 0.5), percentile(waited, 0.99), max(waited), percentile(latencies, 0.99)
    )


def outcomes_of(tallies: Tallies, policy: str) -> list[Outcome]:
    """Of the whole suite."""
    return [outcome for cell in tallies.values() for outcome in cell[policy].outcomes]


def wait_ratios(tallies: Tallies, peers: Sequence[str]) -> dict[Priority, float]:
    """For each class, our p99 wait over the suite against that of the peer with the smallest."""
    ours = by_class(outcomes_of(tallies, OURS))
    theirs = [by_class(outcomes_of(tallies, peer)) for peer in peers]
    ratios = {}
    for priority, outcomes in ours.items():
        best_s = min(waits(classes[priority]).p99_s for classes in theirs)
        ratios[priority] = _ratio(waits(outcomes).p99_s, best_s)
    return ratios


def load_ratio(tallies: Tallies, workload: str, peers: Sequence[str]) -> float:
    """Our seconds of loading on all devices against those of the peer with the fewest."""
    cells = [cell for (name, _), cell in tallies.items() if name == workload]
    totals = {policy: sum(cell[policy].load_s for cell in cells) for policy in (OURS, *peers)}
    return _ratio(totals[OURS], min(totals[peer] for peer in peers))


def starved(outcomes: Iterable[Outcome]) -> int:
    """Steps that waited for an hour, or never ended though nobody refused them for a deadline."""
    return sum(
        outcome.wait_s > _STARVED_S or (outcome.ended_s is None and not outcome.missed)
        for outcome in outcomes
    )


def urgent_misses(outcomes: Iterable[Outcome]) -> int:
    """URGENT steps that did not end by their deadline."""
    return sum(outcome.missed for outcome in outcomes if outcome.step.priority is Priority.URGENT)


def _ratio(ours: float, theirs: float) -> float:
    if theirs > 0:
        return ours / theirs
    return 1.0 if ours <= 0 else float("inf")
