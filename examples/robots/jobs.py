"""What a robot goes on with in the background, and for which call of which run.

The daemon is told that a call is done: once a tool has stopped it, or because its run is stopped.
Stops and moves nothing else.
"""

import contextlib
import threading

from edge_agent.client import Client
from edge_agent.core import Run
from edge_agent.errors import EdgeAgentError
from edge_agent.events import CancelTool, Event, StepFinished, ToolResultAccepted
from examples.robots.robot import CannotDo, Robot


class Jobs:
    """Those of one robot, whichever runs began them. Each run may be followed in its own thread."""

    def __init__(self, client: Client, robot: Robot) -> None:
        """Nothing goes on."""
        self._client = client
        self._robot = robot
        self._lock = threading.Lock()
        self._called: dict[tuple[str, str], str] = {}
        self._going: dict[str, tuple[str, str]] = {}

    def see(self, event: Event) -> None:
        """Take note of what happens to a run, and tell the daemon what that has ended."""
        match event.body:
            case StepFinished(message=message):
                with self._lock:
                    for call in message.tool_calls:
                        self._called[event.run_id, call.id] = call.name
            case ToolResultAccepted(result=result, goes_on=goes_on):
                key = event.run_id, result.tool_call_id
                name = self._called.pop(key, "")
                if goes_on:
                    with self._lock:
                        self._going[name] = key
                elif not result.is_error and not result.cancelled:
                    for each in self._robot.stops.get(name, ()):
                        self._done(each)
            case CancelTool(tool_call_id=call_id):
                self._stop((event.run_id, call_id))

    def of(self, run_id: str) -> list[str]:
        """The tools whose calls by this run go on."""
        with self._lock:
            return [name for name, (run, _call) in self._going.items() if run == run_id]

    def cancel_all(self) -> list[Run]:
        """Cancel the runs whose jobs go on; `see` then stops these."""
        with self._lock:
            runs = {run for run, _call in self._going.values()}
        return [self._client.cancel(run) for run in runs]

    def _stop(self, key: tuple[str, str]) -> None:
        """Stop in the world what a call has begun, if it goes on."""
        with self._lock:
            names = [name for name, going in self._going.items() if going == key]
        for name in names:
            stop = next(stop for stop, ended in self._robot.stops.items() if name in ended)
            with contextlib.suppress(CannotDo):
                self._robot.tools[stop][1]()
            self._done(name)

    def _done(self, name: str) -> None:
        with self._lock:
            key = self._going.pop(name, None)
        if key is not None:
            with contextlib.suppress(EdgeAgentError):  # its run has ended meanwhile
                self._client.update_tool(*key, done=True)
