"""Which loaded engine makes room for another. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Resident:
    """A loaded engine, as the choice sees it; `last_used_s` on the monotonic clock."""

    name: str
    busy_steps: int
    last_used_s: float


def choose_victim(residents: Iterable[Resident], maximum: int) -> str | None:
    """The engine to unload before another is loaded; None while there is room.

    An idle engine goes before a busy one, which is drained and never killed; among equals the one
    that was used longest ago.
    """
    loaded = list(residents)
    if len(loaded) < maximum:
        return None
    return min(loaded, key=lambda each: (each.busy_steps > 0, each.last_used_s, each.name)).name
