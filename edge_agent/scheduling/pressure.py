"""How tight memory is and how warm the machine, and what follows from it. Pure.

A level is left only well above the floor where it was entered, so that it does not flap. Stalls
(PSI) and heat never kill anything: they stop loads and lower concurrency.
"""

import enum
import math

from edge_agent.scheduling.values import Heat, MachineView, Rules

_LEAVE_SHARE, _LEAVE_MOST_BYTES = 0.25, 256 << 20
"""A floor counts as left a quarter above it, or so many bytes where that is less."""
_LEAVE_STALLED_FACTOR = 0.5
_FULL_STALLED_SHARE = 0.5
"""`full` means that every task waited: half of the limit for `some` is as bad."""


_PLACES = {Heat.UNKNOWN: 0.75, Heat.WARM: 0.75, Heat.THROTTLED: 0.5}
"""Share of the places that is given out while the machine is warm."""


class Level(enum.IntEnum):
    """NORMAL: engines load. SOFT: none loads, idle ones go. HARD: workers are killed."""

    NORMAL = enum.auto()
    SOFT = enum.auto()
    HARD = enum.auto()


def next_level(before: Level, machine: MachineView, rules: Rules) -> Level:
    """The level now. Memory that nobody knows is not tight: the ledger alone decides then."""
    available = machine.memory.available_bytes

    def below(floor_bytes: int, level: Level) -> bool:
        margin = min(floor_bytes * _LEAVE_SHARE, _LEAVE_MOST_BYTES) if before >= level else 0
        return available is not None and available < floor_bytes + margin

    if below(rules.hard_floor_bytes, Level.HARD):
        return Level.HARD
    if below(rules.soft_floor_bytes, Level.SOFT) or _stalled(before, machine, rules):
        return Level.SOFT
    return Level.NORMAL


def parallel_steps(slots: int, heat: Heat) -> int:
    """How many steps an engine with so many slots may decide at once, URGENT ones apart."""
    return slots if heat is Heat.NOMINAL else max(1, math.ceil(slots * _PLACES[heat]))


def slowdown(heat: Heat) -> float:
    """By what measured times are multiplied while the machine is warm."""
    return {Heat.NOMINAL: 1.0, Heat.UNKNOWN: 1.25, Heat.WARM: 1.25, Heat.THROTTLED: 2.0}[heat]


def _stalled(before: Level, machine: MachineView, rules: Rules) -> bool:
    factor = _LEAVE_STALLED_FACTOR if before >= Level.SOFT else 1.0
    limit = rules.soft_stalled_percent * factor
    some, full = machine.stalled_some_percent, machine.stalled_full_percent
    return (some is not None and some > limit) or (
        full is not None and full > limit * _FULL_STALLED_SHARE
    )
