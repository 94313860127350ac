"""The heartbeat of a client: what was agreed on, and how far its silence has come by a moment.

Pure. Owns no clock: times are handed in, as seconds since the last beat.
"""

from dataclasses import dataclass
from enum import IntEnum


class Lapse(IntEnum):
    """How far a client's silence has come."""

    NONE = 0
    NOTICED = 1
    SUSPENDED = 2
    CANCELLED = 3


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a client asks to happen when it falls silent.

    `window_s` is how long each beat may take; the other two count from the lapse, which is when the
    window is over. None: does not happen.
    """

    window_s: float
    suspend_after_s: float | None = None
    cancel_after_s: float | None = None

    def lapses(self) -> tuple[tuple[Lapse, float], ...]:
        """What a silence comes to, in order, and after how many seconds of it."""
        delays = (
            (Lapse.NOTICED, 0.0),
            (Lapse.SUSPENDED, self.suspend_after_s),
            (Lapse.CANCELLED, self.cancel_after_s),
        )
        return tuple((lapse, self.window_s + s) for lapse, s in delays if s is not None)

    def reached(self, silent_s: float) -> Lapse:
        """What a silence of this many seconds has come to."""
        return max((lapse for lapse, at_s in self.lapses() if at_s <= silent_s), default=Lapse.NONE)

    def after(self, lapse: Lapse) -> tuple[tuple[Lapse, float], ...]:
        """As `lapses`, without what has happened already."""
        return tuple(each for each in self.lapses() if each[0] > lapse)
