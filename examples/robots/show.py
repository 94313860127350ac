"""Runs a simulated robot: gives its goals to a daemon and shows what happens, for people.

make demo ROBOT=quadruped       # a daemon of its own, then this
.venv/bin/python examples/robots/show.py --robot arm --socket PATH    # a running daemon
"""

import argparse
import contextlib
import importlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edge_agent.cli.progress import ProgressBar
from edge_agent.client import Client
from edge_agent.core import Run, RunState
from edge_agent.errors import EdgeAgentError
from edge_agent.events import (
    Event,
    RunFinished,
    StateChanged,
    StepFinished,
    TextDelta,
    ToolCallsIssued,
    ToolResultAccepted,
)
from examples.robots.jobs import Jobs
from examples.robots.robot import Goal, Robot

ENGINE = "smollm2-135m-instruct"
ROBOTS = ("warehouse", "quadruped", "arm", "ros2_operator")
START_TIMEOUT_S = 30.0
RUN_TIMEOUT_S = 300.0
"""The first goal is slow where other work shares the cores: all tools are read then."""


def make_robot(name: str) -> Robot:
    """A fresh robot, from the module of that name beside this one."""
    robot: Robot = importlib.import_module(f"examples.robots.{name}").robot()
    return robot


class Screen:
    """Prints a run's events for people, as they come, up to its first answer.

    `answered` is set then, or at the run's end: what it has begun may go on in the background.
    """

    def __init__(self, jobs: Jobs) -> None:
        self.called: list[str] = []
        self.answered = threading.Event()
        self._jobs = jobs
        self._bar: ProgressBar | None = None
        self._writing = False

    def show(self, event: Event) -> None:
        """One event."""
        self._jobs.see(event)
        if not self.answered.is_set():
            self._print(event)

    def _print(self, event: Event) -> None:
        match event.body:
            case StateChanged(state=RunState.LOADING, load_progress=progress):
                self._bar = self._bar or ProgressBar(f"  loading {ENGINE}", sys.stdout)
                self._bar.update(progress or 0.0)
            case StateChanged(state=RunState.RUNNING):
                self._end_bar()
            case ToolCallsIssued(tool_calls=calls):
                for call in calls:
                    print(f"  tool call    {call.name}({call.arguments_json})", flush=True)
            case ToolResultAccepted(result=result):
                text = "".join(getattr(part, "text", "") for part in result.parts)
                print(f"  tool {'error ' if result.is_error else 'result'}  {text}")
            case TextDelta(text=text):
                print(text if self._writing else f"  answer       {text}", end="", flush=True)
                self._writing = True
            case StepFinished(message=message):
                self._end_step([call.name for call in message.tool_calls], event.run_id)
            case RunFinished(run=run):
                print(f"  {summary(run)}")

    def _end_step(self, called: Sequence[str], run_id: str) -> None:
        self.called += called
        if self._writing:
            print()
        self._writing = False
        if not called and (going := self._jobs.of(run_id)):
            print(f"  (goes on in the background: {', '.join(going)})")
            self.answered.set()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.update(1.0)
            self._bar.close()
            self._bar = None


def give_goals(client: Client, robot: Robot, at_most: int | None = None) -> None:
    """One run for each goal; prints the events and, last, how the model did."""
    goals, jobs = robot.goals[:at_most], Jobs(client, robot)
    right = 0
    with ThreadPoolExecutor(len(goals)) as pool:
        try:
            for number, goal in enumerate(goals, start=1):
                print(f"\n[{number}/{len(goals)}] goal: {goal.text}", flush=True)
                right += _reached(client, robot, goal, jobs, pool)
        finally:
            jobs.cancel_all()
    print(
        f"\n{right} of {len(goals)} goals reached the right tool first. The embedded model has 135 "
        "million parameters:\nit shows how runs work and is far too weak to drive a robot. Every "
        "call it made satisfied its\ntool's schema; whether it was the right call is the model's "
        "own doing."
    )


def _reached(
    client: Client, robot: Robot, goal: Goal, jobs: Jobs, pool: ThreadPoolExecutor
) -> bool:
    """Give one goal, up to its answer; whether the right tool was called first."""
    screen = Screen(jobs)
    run = pool.submit(
        client.run,
        goal.text,
        robot.tools,
        screen.show,
        engine=ENGINE,
        max_steps=robot.max_steps,
        max_output_tokens=robot.max_output_tokens,
        timeout_s=RUN_TIMEOUT_S,
    )
    run.add_done_callback(lambda _run: screen.answered.set())
    screen.answered.wait()
    if run.done():
        run.result()  # raises what it raised
    return screen.called[:1] == [goal.first_tool]


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


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A simulated robot and its goals.")
    parser.add_argument("--robot", choices=ROBOTS, default=ROBOTS[0], help="default: %(default)s")
    parser.add_argument("--goals", type=int, metavar="N", help="give it the first N goals only")
    parser.add_argument(
        "--socket", help="a running daemon's api.sock (default: where it usually is)"
    )
    parser.add_argument("--start-daemon", action="store_true", help="use a daemon of its own")
    parser.add_argument(
        "--engines-dir", type=Path, default=Path("build/engines"), help="that daemon's engine store"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Give a robot's goals to a daemon; returns the exit code."""
    options = parse_arguments(arguments)
    robot = make_robot(options.robot)
    try:
        with contextlib.ExitStack() as stack:
            address = options.socket
            if options.start_daemon:
                address = str(stack.enter_context(own_daemon(options.engines_dir)))
            client = stack.enter_context(Client(address, name=robot.name))
            status = client.status()
            print(f"edge-agent {status.version} (pid {status.pid}) on {client.address}")
            print(f"{robot.name}: {len(robot.tools)} tools")
            give_goals(client, robot, options.goals)
    except EdgeAgentError as error:
        print(f"error: {error.message} ({error.reason})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
