"""How often a tool may be called: a token bucket. Pure; the time is handed in.

A call takes one token. The bucket holds as many as may be called in a minute and fills at that
rate, so calls may come at once after a quiet time: in any `t` seconds at most
`calls_per_minute * (1 + t / 60)`.
"""

from typing import Final

_MINUTE_S: Final = 60.0


class Bucket:
    """The calls of one tool; full at first."""

    def __init__(self, calls_per_minute: int, now_s: float) -> None:
        """`calls_per_minute` is at least 1; times are monotonic."""
        self._capacity = float(calls_per_minute)
        self._tokens = self._capacity
        self._filled_s = now_s

    def take(self, now_s: float) -> float | None:
        """Take one call: None, or in how many seconds there is one to take."""
        passed_s = max(0.0, now_s - self._filled_s)
        filled = self._tokens + passed_s * self._capacity / _MINUTE_S
        self._tokens = min(self._capacity, filled)
        self._filled_s = max(self._filled_s, now_s)
        if self._tokens >= 1.0:
            self._tokens -= 1.0
            return None
        return (1.0 - self._tokens) * _MINUTE_S / self._capacity
