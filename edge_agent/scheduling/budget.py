"""How much memory is left for another engine, and which engines would have to go for it. Pure.

The ledger of reservations: each engine is committed with its load peak while it loads and with its
steady need afterwards, whatever it has touched so far. What others use is what is gone and not
held by an engine; the rest of the robot gets its reserve, or what it really uses and a floor,
whichever is more.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edge_agent.scheduling.values import Memory, Rules


@dataclass(frozen=True, slots=True)
class Reservation:
    """One engine's entry: `committed_bytes` may still be touched, `held_bytes` are known to be."""

    committed_bytes: int
    held_bytes: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine that may be unloaded: what that frees, and what it is expected to cost."""

    name: str
    frees_bytes: int
    cost: float


def others_bytes(memory: Memory, ledger: Iterable[Reservation]) -> int | None:
    """What everything but the engines uses now; None when nobody knows."""
    if memory.available_bytes is None:
        return None
    held = sum(entry.held_bytes for entry in ledger)
    return max(0, memory.total_bytes - memory.available_bytes - held)


def kept_bytes(memory: Memory, ledger: Sequence[Reservation], rules: Rules) -> int:
    """What engines must leave alone: the reserve, or what others use and the soft floor."""
    others = others_bytes(memory, ledger)
    used = 0 if others is None else others
    return max(rules.reserve_bytes, used + rules.soft_floor_bytes)


def room_bytes(memory: Memory, ledger: Sequence[Reservation], rules: Rules) -> int:
    """What another engine may take; negative when too much is committed already."""
    committed = sum(entry.committed_bytes for entry in ledger)
    room = memory.total_bytes - kept_bytes(memory, ledger, rules) - committed
    if rules.budget_bytes is not None:
        room = min(room, rules.budget_bytes - committed)
    return room


def ceiling_bytes(memory: Memory, rules: Rules) -> int:
    """The most that an engine could ever get here, with nothing else loaded and others at rest."""
    most = memory.total_bytes - max(rules.reserve_bytes, rules.soft_floor_bytes)
    return most if rules.budget_bytes is None else min(most, rules.budget_bytes)


def choose_victims(
    candidates: Sequence[Candidate], missing_bytes: int, missing_places: int
) -> tuple[Candidate, ...] | None:
    """The set that frees enough bytes and places at the least cost; None when no set does.

    Branch and bound over all subsets, the cheapest candidates first: at most eight engines are
    resident. Among equals the one with fewer engines, then with fewer bytes, then by name.
    """
    order = sorted(candidates, key=lambda each: (each.cost, each.name))
    best: tuple[tuple[float, int, int, tuple[str, ...]], tuple[Candidate, ...]] | None = None

    def extend(at: int, chosen: tuple[Candidate, ...], cost: float, freed: int) -> None:
        nonlocal best
        if freed >= missing_bytes and len(chosen) >= missing_places:
            rank = (cost, len(chosen), freed, tuple(sorted(each.name for each in chosen)))
            if best is None or rank < best[0]:
                best = (rank, chosen)
            return  # more victims never cost less, and fewer are better
        rest = order[at:]
        most = freed + sum(each.frees_bytes for each in rest)
        if most < missing_bytes or len(chosen) + len(rest) < missing_places:
            return
        for after, each in enumerate(rest, at + 1):
            more = (*chosen, each)
            cost = math.fsum(victim.cost for victim in more)  # exact: a sum by steps is not
            if best is not None and cost > best[0][0]:
                return  # so are all that come after it
            extend(after, more, cost, freed + each.frees_bytes)

    extend(0, (), 0.0, 0)
    return best[1] if best else None
