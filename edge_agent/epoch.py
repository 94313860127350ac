"""Which start of the daemon this is: a number that is higher at every start.

Owns its file. Fencing tokens begin with it (Kleppmann 2016, "How to do distributed locking").
"""

from pathlib import Path

import structlog

from edge_agent import durable

log = structlog.get_logger()


def next_epoch(path: Path, now_s: float) -> int:
    """The number of this start; on disk when this returns. Blocks.

    Where the file can't be read or written it is the Unix time in seconds, which is above every
    count of starts; after that it is counted from there.
    """
    try:
        last = int(path.read_text())
    except FileNotFoundError:
        last = 0
    except (OSError, ValueError) as error:
        log.warning("epoch_unreadable", path=str(path), error=str(error))
        last = int(now_s)
    try:
        durable.replace(path, f"{last + 1}\n".encode())
    except OSError as error:
        log.warning("epoch_not_written", path=str(path), error=str(error))
        return max(last + 1, int(now_s))
    return last + 1
