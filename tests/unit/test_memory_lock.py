"""The daemon's pages stay in memory, where that is allowed."""

import os
import subprocess
import sys

import pytest

LOCK = (
    "import os, sys; from edge_agent import memory_lock; {}\n"
    "print('locked', memory_lock.lock(), open('/proc/self/status').read())"
)
AS_NOBODY = (
    "import resource; resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536));"
    "os.getuid() or os.setuid(65534)"
)


def lock(before: str) -> tuple[bool, int]:
    """Whether a process could lock its pages, and how many kB of it are locked."""
    done = subprocess.run(
        [sys.executable, "-c", LOCK.format(before)], capture_output=True, text=True, check=True
    )
    size = next(line for line in done.stdout.splitlines() if line.startswith("VmLck:"))
    return "locked True" in done.stdout, int(size.split()[1])


@pytest.mark.skipif(os.getuid() != 0, reason="needs root's right to lock memory")
def test_all_pages_are_locked():
    done, locked_kb = lock("pass")
    assert done
    assert locked_kb > 1000


def test_a_limit_that_is_too_low_is_said_and_harms_nothing():
    assert lock(AS_NOBODY) == (False, 0)
