"""Becomes an MCP server: `python -I -m edge_agent.tools.launch PARENT_PID PROGRAM ARGUMENT...`.

So that no server outlives the process that speaks to it, whatever ends that one.
"""

import os
import resource
import sys

from edge_agent import child_process


def main(parent_pid: int, command: list[str]) -> None:
    """Does not return, unless the program can't be started."""
    child_process.follow_parent(parent_pid)
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))  # the parent's own bound is not for it
    os.execv(command[0], command)  # noqa: S606 - the operator's configuration names the program


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), sys.argv[2:])
    except OSError as error:
        sys.exit(f"{sys.argv[2]}: {error.strerror}")
