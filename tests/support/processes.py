"""Processes as the kernel sees them."""

import contextlib
import os
import select
from pathlib import Path


def wait_gone(pid: int, timeout_s: float = 10.0) -> bool:
    """Whether the process has ended, waiting for it; it may be nobody's child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], timeout_s)[0])
    finally:
        os.close(descriptor)


def is_gone(pid: int) -> bool:
    """Whether the process has ended by now."""
    return wait_gone(pid, 0)


def children(pid: int) -> list[int]:
    """The process's children that have not ended."""
    found: list[int] = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(status.parent.name))
    return found
