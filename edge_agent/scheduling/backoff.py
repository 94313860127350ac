"""When an engine whose load failed may be tried again. Pure.

A load that fails takes seconds of the machine and the memory of others, so an engine that has
failed twice in a row is left alone for a while, longer each time. Nobody waits for that: steps get
the error that it failed with. Other files, a success or an operator begin afresh.
"""

from collections.abc import Callable, Hashable
from typing import Final

from edge_agent.errors import EdgeAgentError

_FREE_FAILURES: Final = 1
_LONGEST_S: Final = 60.0
_MOST_FAILURES: Final = 1000
_MAY_PASS: Final = frozenset({"OUT_OF_MEMORY", "FRAGMENTED", "LOAD_TIMEOUT", "STATE_NOT_WRITABLE"})
"""Reasons that time alone may mend: who asks is told when it is worth another try."""


class Backoff:
    """What is remembered of one engine's failures in a row."""

    def __init__(self) -> None:
        """None yet."""
        self._failures = 0
        self._until_s = 0.0
        self._error: EdgeAgentError | None = None
        self._files: Hashable = None

    def failed(self, error: EdgeAgentError, files: Hashable, now_s: float) -> None:
        """A load has failed with this error; `files` tells the engine's files from others."""
        if files != self._files:
            self.forgive()
        self._failures = min(self._failures + 1, _MOST_FAILURES)
        self._error, self._files = error, files
        pause_s = 0.0
        if self._failures > _FREE_FAILURES:
            pause_s = min(2.0**self._failures, _LONGEST_S)
        self._until_s = now_s + pause_s

    def forgive(self) -> None:
        """Begin afresh."""
        self._failures, self._until_s, self._error = 0, 0.0, None

    def refusal(self, now_s: float, files: Callable[[], Hashable]) -> EdgeAgentError | None:
        """The error that a new step gets now; None when the engine may be tried."""
        error, left_s = self._error, self._until_s - now_s
        if error is None or left_s <= 0 or files() != self._files:
            return None
        return type(error)(
            f"{error.message}; failed {self._failures} times in a row, not tried again for "
            f"{left_s:.1f} s",
            reason=error.reason,
            metadata={**error.metadata, "failures": self._failures, "pause_s": f"{left_s:.1f}"},
            retry_after_s=left_s if error.reason in _MAY_PASS else None,
        )
