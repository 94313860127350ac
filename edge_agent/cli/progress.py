"""A progress bar for commands that take a while.

On a terminal one line that is redrawn; elsewhere a plain line for each further 10 percent, so that
logs stay short. Writes to the stream that it is given and nowhere else.
"""

import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self, TextIO

_BAR_CELLS: Final = 24
_REDRAW_S: Final = 0.1
_PLAIN_STEP_PERCENT: Final = 10


class ProgressBar:
    """Shows how far something is. `close` ends the line; a `with` block does that too."""

    def __init__(
        self,
        label: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = label
        self._stream = stream or sys.stderr
        self._clock = clock
        self._is_terminal = self._stream.isatty()
        self._drawn_at_s: float | None = None
        self._drawn = ""
        self._last = (0.0, "")
        self._next_percent = 0

    def update(self, fraction: float, note: str = "") -> None:
        """Show `fraction`, 0 to 1, and a few words on what is being done."""
        self._last = (fraction, note)
        if not self._is_terminal:
            self._plain()
            return
        now_s = self._clock()
        if self._drawn_at_s is None or now_s - self._drawn_at_s >= _REDRAW_S:
            self._drawn_at_s = now_s
            self._draw()

    def close(self) -> None:
        """Show the last state and end the line. Nothing more is drawn."""
        if self._is_terminal and self._drawn_at_s is not None:
            self._draw()
            self._write("\n")
            self._drawn_at_s = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _percent(self) -> int:
        return int(100 * self._last[0])

    def _plain(self) -> None:
        percent = self._percent()
        if percent < self._next_percent:
            return
        self._next_percent = percent - percent % _PLAIN_STEP_PERCENT + _PLAIN_STEP_PERCENT
        note = self._last[1]
        self._write(f"{self._label}: {percent} %{', ' if note else ''}{note}\n")

    def _draw(self) -> None:
        full = int(_BAR_CELLS * self._last[0])
        bar = "#" * full + "-" * (_BAR_CELLS - full)
        line = f"{self._label} [{bar}] {self._percent():3d} % {self._last[1]}"
        line = line[: shutil.get_terminal_size().columns - 1]
        padding = " " * max(0, len(self._drawn) - len(line))
        self._write(f"\r{line}{padding}")
        self._drawn = line

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
