"""A simulated warehouse robot that gives its agent goals in plain words.

    make demo                                             # a daemon of its own, then this
    .venv/bin/python examples/warehouse_robot.py --socket PATH    # against a running daemon

The robot has a battery, a position on a map with named places, a gripper and two lamps. Its
functions are the model's tools: the daemon decides which one to call, this process executes it.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edge_agent.cli.progress import ProgressBar
from edge_agent.client import Client
from edge_agent.core import (
    Event,
    Run,
    RunState,
    StateChanged,
    StepFinished,
    TextDelta,
    Tool,
    ToolCallsIssued,
    ToolExample,
    ToolResultAccepted,
)
from edge_agent.errors import EdgeAgentError

ENGINE = "smollm2-135m-instruct"
START_TIMEOUT_S = 30.0
PLACES = {"dock": (0, 0), "office": (4, 9), "packing": (12, 3), "shelf_a": (6, 2), "shelf_b": (6, 7)}
ITEMS = ("bottle", "box", "crate")


@dataclass
class Robot:
    """The simulated machine: what its sensors would say, and what its drives would do."""

    battery_percent: float = 82.0
    place: str = "dock"
    holding: str | None = None
    lamps: dict[str, bool] = field(default_factory=lambda: {"front": False, "rear": False})

    def battery_level(self) -> dict[str, object]:
        """What the battery monitor says."""
        return {"battery_percent": round(self.battery_percent, 1)}

    def locate(self) -> dict[str, object]:
        """Where the robot is."""
        x, y = PLACES[self.place]
        return {"place": self.place, "x_m": x, "y_m": y}

    def drive_to(self, place: str) -> dict[str, object]:
        """Drive; costs battery by distance."""
        (x, y), (to_x, to_y) = PLACES[self.place], PLACES[place]
        distance_m = abs(x - to_x) + abs(y - to_y)
        self.battery_percent -= 0.2 * distance_m
        self.place = place
        return {"arrived_at": place, "distance_m": distance_m}

    def pick_up(self, item: str) -> dict[str, object]:
        """Close the gripper around an item."""
        if self.holding:
            raise RuntimeError(f"the gripper already holds the {self.holding}")
        self.holding = item
        return {"holding": item}

    def put_down(self) -> dict[str, object]:
        """Open the gripper."""
        if not self.holding:
            raise RuntimeError("the gripper is empty")
        item, self.holding = self.holding, None
        return {"put_down": item, "at": self.place}

    def set_lamp(self, lamp: str, on: bool) -> dict[str, object]:  # noqa: FBT001 - by keyword
        """Switch a lamp."""
        self.lamps[lamp] = on
        return {"lamp": lamp, "on": on}

    def list_places(self) -> list[str]:
        """The map's named places."""
        return sorted(PLACES)


def make_tools(robot: Robot) -> dict[str, tuple[Tool, Callable[..., object]]]:
    """The robot's functions as the model sees them: schema, and one worked example each."""

    def tool(
        function: Callable[..., object],
        description: str,
        example: str,
        arguments: dict[str, object] | None = None,
        **properties: object,
    ) -> tuple[Tool, Callable[..., object]]:
        schema = {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
        examples = (ToolExample(example, json.dumps(arguments or {})),)
        name = function.__name__
        return Tool(name, description, json.dumps(schema), examples), function

    tools = (
        tool(robot.battery_level, "Read the battery level in percent.", "How much power is left?"),
        tool(robot.locate, "Read where the robot is on the map.", "Where are you now?"),
        tool(
            robot.drive_to,
            "Drive the robot to a named place.",
            "Go over to the office.",
            {"place": "office"},
            place={"enum": sorted(PLACES)},
        ),
        tool(
            robot.pick_up,
            "Close the gripper around an item and lift it.",
            "Grab the bottle.",
            {"item": "bottle"},
            item={"enum": list(ITEMS)},
        ),
        tool(robot.put_down, "Lower the held item and open the gripper.", "Set down what you hold."),
        tool(
            robot.set_lamp,
            "Switch a lamp on the robot.",
            "Turn on the front light.",
            {"lamp": "front", "on": True},
            lamp={"enum": sorted(robot.lamps)},
            on={"type": "boolean"},
        ),
        tool(robot.list_places, "List the places on the map.", "Which places do you know?"),
    )
    return {each.name: (each, function) for each, function in tools}


GOALS = (
    ("How full is your battery?", "battery_level"),
    ("Where are you right now?", "locate"),
    ("Pick up the crate.", "pick_up"),
    ("Drive to the packing station.", "drive_to"),
    ("Put down the crate.", "put_down"),
    ("Switch on the rear lamp.", "set_lamp"),
    ("Please go to shelf A.", "drive_to"),
    ("Take the box.", "pick_up"),
    ("Return to the dock.", "drive_to"),
    ("Turn the front lamp off.", "set_lamp"),
)


class Screen:
    """Prints a run's events for people, as they come."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self._bar: ProgressBar | None = None
        self._writing = False

    def show(self, event: Event) -> None:
        """One event."""
        match event.body:
            case StateChanged(state=RunState.LOADING, load_progress=progress):
                self._bar = self._bar or ProgressBar(f"  loading {ENGINE}", sys.stdout)
                self._bar.update(progress or 0.0)
            case StateChanged(state=RunState.RUNNING):
                self._end_bar()
            case ToolCallsIssued(tool_calls=calls):
                for call in calls:
                    self.called.append(call.name)
                    print(f"  tool call    {call.name}({call.arguments_json})")
            case ToolResultAccepted(result=result):
                text = "".join(getattr(part, "text", "") for part in result.parts)
                print(f"  tool {'error ' if result.is_error else 'result'}  {text}")
            case TextDelta(text=text):
                print(text if self._writing else f"  answer       {text}", end="", flush=True)
                self._writing = True
            case StepFinished():
                if self._writing:
                    print()
                self._writing = False

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.update(1.0)
            self._bar.close()
            self._bar = None


def give_goals(client: Client, robot: Robot) -> None:
    """One run for each goal; prints the events and, last, how the model did."""
    tools = make_tools(robot)
    right = 0
    for number, (goal, expected) in enumerate(GOALS, start=1):
        print(f"\n[{number}/{len(GOALS)}] goal: {goal}")
        screen = Screen()
        run = client.run(
            goal, tools, screen.show, engine=ENGINE, max_steps=3, max_output_tokens=64, timeout_s=120
        )
        right += screen.called[:1] == [expected]
        print(f"  {summary(run)}")
    print(
        f"\n{right} of {len(GOALS)} goals reached the right tool first. The embedded model has 135 "
        "million parameters:\nit shows how runs work and is far too weak to drive a robot. Every "
        "call it made satisfied its\ntool's schema; whether it was the right call is the model's "
        "own doing."
    )


def summary(run: Run) -> str:
    """One line about a finished run."""
    usage = run.usage
    parts = [run.state.value.lower()]
    if run.error is not None:
        parts.append(f"{run.error.reason}: {run.error.message}")
    if usage.tokens_per_second is not None:
        parts.append(f"{usage.tokens_per_second:.0f} tokens/s")
    if usage.ttft_ms is not None:
        parts.append(f"first token after {usage.ttft_ms:.0f} ms")
    parts.append(f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached)")
    return "(" + ", ".join(parts) + ")"


@contextlib.contextmanager
def own_daemon(engines_dir: Path) -> Iterator[Path]:
    """A daemon on a private socket for as long as the block runs; gives the socket."""
    with tempfile.TemporaryDirectory(prefix="edge-agent-") as directory:
        base = Path(directory)
        log_path = base / "daemon.log"
        command = [
            sys.executable, "-m", "edge_agent", "serve",
            "--runtime-dir", str(base / "run"),
            "--state-dir", str(base / "state"),
            "--engines-dir", str(engines_dir.resolve()),
        ]  # fmt: skip
        with log_path.open("wb") as log:
            daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log, stdout=log)
        try:
            _wait_until_ready(daemon, base / "run" / "api.sock", log_path)
            yield base / "run" / "api.sock"
        finally:
            daemon.terminate()
            daemon.wait(START_TIMEOUT_S)


def _wait_until_ready(daemon: "subprocess.Popen[bytes]", socket: Path, log_path: Path) -> None:
    """Until the daemon answers.

    Raises:
        RuntimeError: it ended, or did not answer in time; with its log.
    """
    deadline_s = time.monotonic() + START_TIMEOUT_S
    ended = threading.Event()
    while daemon.poll() is None and time.monotonic() < deadline_s:
        if socket.exists():
            with contextlib.suppress(EdgeAgentError), Client(str(socket)) as client:
                client.status()
                return
        ended.wait(0.05)
    raise RuntimeError(f"the daemon did not start:\n{log_path.read_text(errors='replace')}")


def main() -> int:
    """Give the goals to a daemon; returns the exit code."""
    parser = argparse.ArgumentParser(description="A simulated warehouse robot and its goals.")
    parser.add_argument("--socket", help="a running daemon's api.sock (default: where it usually is)")
    parser.add_argument("--start-daemon", action="store_true", help="use a daemon of its own")
    parser.add_argument(
        "--engines-dir", type=Path, default=Path("build/engines"), help="that daemon's engine store"
    )
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        address = options.socket
        if options.start_daemon:
            address = str(stack.enter_context(own_daemon(options.engines_dir)))
        client = stack.enter_context(Client(address, name="warehouse-robot"))
        status = client.status()
        print(f"edge-agent {status.version} (pid {status.pid}) on {client.address}")
        give_goals(client, Robot())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except EdgeAgentError as error:
        sys.exit(f"error: {error.message} ({error.reason})")
