"""What every child process of the daemon has in common: its environment, its output, its end.

Knows nothing of what a child does. Needs the standard library alone, since a worker may run in an
environment of its own.
"""

import ctypes
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:  # a worker has no use for it
    import asyncio

_OURS_ALONE: Final = {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "CREDENTIALS_DIRECTORY"}
"""What the service manager gives to the daemon: no child speaks for it or reads its keys."""
_LINE_BYTES: Final = 4096
_PR_SET_PDEATHSIG: Final = 1


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a child gets of the daemon's environment."""
    return {key: value for key, value in environ.items() if key not in _OURS_ALONE}


async def read_lines(stream: "asyncio.StreamReader", take: Callable[[str], None]) -> None:
    """Hand over a child's output line by line, bounded in length, until it ends."""
    rest = b""
    while chunk := await stream.read(_LINE_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) >= _LINE_BYTES:
            lines, rest = [*lines, rest], b""
        for line in lines:
            _hand_over(line, take)
    _hand_over(rest, take)


def _hand_over(raw: bytes, take: Callable[[str], None]) -> None:
    line = raw.decode(errors="replace").rstrip()
    if line:
        take(line)


def follow_parent(parent_pid: int) -> None:
    """In the child: end when the parent does, whatever this process is doing or becomes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)


def volunteer(oom_score_adj: int) -> None:
    """In the child: be killed before others when memory runs out (proc(5), oom_score_adj)."""
    Path("/proc/self/oom_score_adj").write_text(str(oom_score_adj))
