"""`edge-agent status --watch` as a person and a program meet it: a process of its own."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from edge_agent.cli.main import main
from edge_agent.telemetry.sampler import Sampler
from tests.support import sysroots
from tests.support.api_ports import EdgeThread

TIMEOUT_S = 30


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The root of an Orin Nano."""
    sysroots.orin_nano(tmp_path)
    return tmp_path


def edge_of(runtime_dir: Path, machine: Path) -> EdgeThread:
    """An API that tells of this machine."""

    class Edge(EdgeThread):
        def __enter__(self):
            edge = super().__enter__()
            edge.daemon.sampler = Sampler(machine, clock=lambda: 0.0)
            edge.daemon.sampler.sample(0.0)
            return edge

    return Edge(runtime_dir)


@pytest.fixture
def edge(runtime_dir, machine):
    with edge_of(runtime_dir, machine) as edge:
        yield edge


class Watching:
    """The command in a process. Ended by Ctrl-C, which is a good end."""

    def __init__(self, socket: str, *options: str, **streams: int) -> None:
        command = [sys.executable, "-m", "edge_agent", "status", "--watch", "--socket", socket]
        self.process = subprocess.Popen(
            [*command, "--interval", "100ms", *options],
            stdout=streams.get("stdout", subprocess.PIPE),
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": ":".join(sys.path), "COLUMNS": "80", "LINES": "24"},
        )

    def lines(self) -> Iterator[str]:
        assert self.process.stdout
        for line in self.process.stdout:
            yield line.decode().rstrip("\n")

    def interrupt(self) -> tuple[int, str]:
        """The exit code and what stands on stderr."""
        self.process.send_signal(signal.SIGINT)
        _, err = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, err.decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=TIMEOUT_S)


def block(lines: Iterator[str]) -> list[str]:
    """Up to the next empty line."""
    found = []
    for line in lines:
        if not line:
            break
        found.append(line)
    return found


def test_where_nobody_sees_it_redrawn_each_interval_is_a_block(edge):
    with Watching(edge.api) as watching:
        lines = watching.lines()
        first, second = block(lines), block(lines)
        assert watching.interrupt() == (0, "")
    assert first[0] == "daemon   READY  pid 4711, up 12s, version 9.8.7"
    assert any(line.startswith("memory   5.0 GiB of 7.4 GiB available") for line in first)
    assert second == first
    assert not any("\x1b" in line for line in first)


def test_as_json_each_snapshot_is_a_line(edge):
    with Watching(edge.api, "--json") as watching:
        lines = watching.lines()
        for _ in range(2):
            found = json.loads(next(lines))
            assert found["status"]["pid"] == 4711
            assert found["engines"][0]["name"] == "small"
            available = found["telemetry"]["memory"]["available_bytes"]
            assert (available["value"], available["source"], available["status"]) == (
                5_242_880 * 1024,
                "/proc/meminfo",
                "ok",
            )
        assert watching.interrupt() == (0, "")


def test_on_a_terminal_it_is_redrawn_in_place(edge):
    ours, theirs = pty.openpty()
    with Watching(edge.api, stdout=theirs) as watching:
        os.close(theirs)
        seen = b""
        while seen.count(b"daemon   READY") < 3:
            seen += os.read(ours, 4096)
        assert watching.interrupt() == (0, "")
    os.close(ours)
    _, first, second, *_ = seen.decode().split("\x1b[J")
    count = first.count("\n")
    assert count == len(first.splitlines()) - 1  # the last one moves up
    assert first.endswith(f"\x1b[{count}A\r")
    assert second.startswith("daemon   READY")


def test_the_loss_of_the_daemon_is_said_and_it_comes_back(runtime_dir, machine):
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(contextlib.ExitStack())
        edge = daemon.enter_context(edge_of(runtime_dir, machine))
        watching = stack.enter_context(Watching(edge.api))
        lines = watching.lines()
        block(lines)
        daemon.close()
        lost = block(lines)
        while not lost[0].startswith("lost: "):  # views that were on their way
            lost = block(lines)
        assert lost[1] == "trying again every 1 s"
        stack.enter_context(edge_of(runtime_dir, machine))
        found = block(lines)
        while not found[0].startswith("daemon   READY"):
            found = block(lines)
        assert watching.interrupt() == (0, "")


def test_the_loss_is_said_to_programs_on_stderr(runtime_dir, machine):
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(contextlib.ExitStack())
        edge = daemon.enter_context(edge_of(runtime_dir, machine))
        watching = stack.enter_context(Watching(edge.api, "--json"))
        next(watching.lines())
        daemon.close()
        assert watching.process.stderr
        told = json.loads(watching.process.stderr.readline())
        assert told["error"]["reason"]
        assert watching.interrupt()[0] == 0


def test_without_a_daemon_at_the_start_it_is_an_error(runtime_dir, capsys):
    assert main(["status", "--watch", "--socket", str(runtime_dir / "api.sock")]) == 1
    assert "no daemon answers" in capsys.readouterr().err


def test_an_interval_is_checked_where_it_is_read(runtime_dir, edge, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["status", "--watch", "--interval", "5", "--socket", edge.api])
    assert ended.value.code == 2
    assert "'5', must be a duration with a unit" in capsys.readouterr().err
    assert main(["status", "--watch", "--interval", "10ms", "--socket", edge.api]) == 1
    assert "interval: 0.01s is below the limit of 0.1s" in capsys.readouterr().err
