"""Keeps the daemon's own pages in memory, so that its guard can act when little is left."""

import ctypes
import os

import structlog

_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
"""mlockall(2). On fault: only what is touched, or each thread's stack would take 8 MB."""

log = structlog.get_logger()


def lock() -> bool:
    """Lock this process's pages, now and later; workers are not affected, since they are exec'ed.

    False where the limit RLIMIT_MEMLOCK forbids it: logged, and the daemon goes on.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) == 0:
        return True
    log.info("memory_not_locked", error=os.strerror(ctypes.get_errno()))
    return False
