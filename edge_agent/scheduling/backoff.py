"""When an engine whose load failed may be tried again. Pure.

A load that fails takes seconds of the machine and the memory of others, so an engine that has
failed twice in a row is left alone for a while, longer each time. Nobody waits for that: steps get
the error that it failed with. Other files, a success or an operator begin afresh.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final

from edge_agent.errors import EdgeAgentError

_FREE_FAILURES: Final = 1
_LONGEST_S: Final = 60.0
_MAY_PASS: Final = frozenset({"OUT_OF_MEMORY", "FRAGMENTED", "LOAD_TIMEOUT", "STATE_NOT_WRITABLE"})
"""Reasons that time alone may mend: who asks is told when it is worth another try."""


@dataclass(frozen=True, slots=True)
class _Failed:
    """The last failure: the how manieth in a row with these files, and until when nobody tries."""

    error: EdgeAgentError
    files: Hashable
    times: int
    until_s: float


class Backoff:
    """What is remembered of one engine's failures in a row."""

    def __init__(self) -> None:
        """None yet."""
        self._last: _Failed | None = None

    def failed(self, error: EdgeAgentError, files: Hashable, now_s: float) -> None:
        """A load has failed with this error; `files` tells the engine's files from others."""
        last = self._last
        times = last.times + 1 if last is not None and last.files == files else 1
        pause_s = min(2**times, _LONGEST_S) if times > _FREE_FAILURES else 0.0
        self._last = _Failed(error, files, times, now_s + pause_s)

    def forgive(self) -> None:
        """Begin afresh."""
        self._last = None

    def refusal(self, now_s: float, files: Callable[[], Hashable]) -> EdgeAgentError | None:
        """The error that a new step gets now; None when the engine may be tried."""
        last = self._last
        if last is None or now_s >= last.until_s or files() != last.files:
            return None
        error, left_s = last.error, last.until_s - now_s
        return type(error)(
            f"{error.message}; failed {last.times} times in a row, not tried again for "
            f"{left_s:.1f} s",
            reason=error.reason,
            metadata={**error.metadata, "failures": last.times, "pause_s": f"{left_s:.1f}"},
            retry_after_s=left_s if error.reason in _MAY_PASS else None,
        )
