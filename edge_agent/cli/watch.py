"""`edge-agent status --watch`: the daemon and its machine until Ctrl-C, over its restarts too.

On a terminal one view that is redrawn in place; elsewhere a block of lines at each interval; with
--json one object a line.
"""

import argparse
import contextlib
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Final, TextIO

from edge_agent.cli.live_view import live_view
from edge_agent.cli.output import connect, print_error, print_json
from edge_agent.core import EngineInfo
from edge_agent.errors import EdgeAgentError, Unavailable
from edge_agent.status import DaemonStatus
from edge_agent.telemetry.snapshot import TelemetrySnapshot

RECONNECT_S: Final = 1.0
_UP: Final = "\x1b[{}A"
_ERASE_BELOW: Final = "\r\x1b[J"


class Screen:
    """Where the view goes: redrawn on a terminal, appended elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._drawn = 0

    def show(self, lines: Sequence[str]) -> None:
        """Put these lines in the place of those before."""
        if not self._is_terminal:
            self._write("\n".join([*lines, "", ""]))
            return
        rows = shutil.get_terminal_size().lines - 1
        shown = lines[:rows]
        up = _UP.format(self._drawn) if self._drawn else ""
        self._write(up + _ERASE_BELOW + "\n".join([*shown, ""]))
        self._drawn = len(shown)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def watch(args: argparse.Namespace) -> int:
    """Show it until Ctrl-C, which is a good end.

    Raises:
        EdgeAgentError: there is no daemon at the start, or it refuses; what comes later is shown.
    """
    screen = Screen(sys.stdout)
    has_seen, last_problem = False, ""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            try:
                with connect(args) as client:
                    for telemetry in client.watch_telemetry(args.interval):
                        _show(args, screen, client.status(), client.engines(), telemetry)
                        has_seen, last_problem = True, ""
                raise Unavailable("the daemon has ended the stream", reason="STREAM_CUT_SHORT")
            except EdgeAgentError as error:
                if not has_seen:
                    raise
                if error.message != last_problem:
                    _tell(args, screen, error)
                last_problem = error.message
            time.sleep(RECONNECT_S)
    return 0


def _show(
    args: argparse.Namespace,
    screen: Screen,
    status: DaemonStatus,
    engines: tuple[EngineInfo, ...],
    telemetry: TelemetrySnapshot,
) -> None:
    if args.json:
        print_json({"status": status, "engines": engines, "telemetry": telemetry})
        return
    screen.show(live_view(status, engines, telemetry, shutil.get_terminal_size().columns))


def _tell(args: argparse.Namespace, screen: Screen, error: EdgeAgentError) -> None:
    if args.json:
        print_error(error, as_json=True)
        return
    screen.show([f"lost: {error.message}", f"trying again every {RECONNECT_S:g} s"])
