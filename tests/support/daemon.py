"""A real daemon in a process of its own, on private sockets."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

ENGINE = "smollm2-135m-instruct"
BASE_CONFIG = f"runs: {{default_engine: {ENGINE}}}\nworker: {{threads: 1}}\n"
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 40.0


class DaemonProcess:
    """`edge-agent serve`, its sockets, and its log as it grows."""

    def __init__(
        self, directory: Path, engine_store: Path, config: str | None, environ: Mapping[str, str]
    ) -> None:
        self.directory = directory
        self.config_path = directory / "config.yaml"
        self._is_config_named = config is not None
        if config is not None:
            self.config_path.write_text(config)
        self.api_socket = directory / "run" / "api.sock"
        self.admin_socket = directory / "run" / "admin.sock"
        self.state_dir = directory / "state"
        self.engine_store = engine_store
        self._environ = {**os.environ, **environ}
        self._lines: list[dict[str, Any]] = []
        self._arrived = threading.Condition()
        self._ended = False
        self.process = self._start()

    @property
    def command(self) -> list[str]:
        """What starts it."""
        return [
            sys.executable, "-m", "edge_agent", "serve",
            *(("--config", str(self.config_path)) if self._is_config_named else ()),
            "--runtime-dir", str(self.directory / "run"),
            "--state-dir", str(self.state_dir),
            "--engines-dir", str(self.engine_store),
        ]  # fmt: skip

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            self.command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=self._environ
        )
        assert process.stderr is not None
        self._ended = False
        threading.Thread(target=self._read, args=(process.stderr,), daemon=True).start()
        return process

    def _read(self, log: IO[bytes]) -> None:
        with log:  # closed here alone: nobody closes what another thread is reading
            for raw in log:
                try:
                    line = json.loads(raw)
                except ValueError:
                    line = {"event": "raw", "text": raw.decode(errors="replace")}
                with self._arrived:
                    self._lines.append(line)
                    self._arrived.notify_all()
        with self._arrived:
            self._ended = True
            self._arrived.notify_all()

    def wait_for(
        self, event: str, *, count: int = 1, timeout_s: float = START_TIMEOUT_S
    ) -> dict[str, Any]:
        """The `count`-th log line of this event, waiting for it."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self._lines if line.get("event") == event]

        with self._arrived:
            self._arrived.wait_for(lambda: len(found()) >= count or self._ended, timeout_s)
            lines = found()
            if len(lines) < count:
                raise AssertionError(f"no {event} in the log: {self._lines}")
            return lines[count - 1]

    def lines(self, event: str) -> list[dict[str, Any]]:
        """All log lines of this event so far."""
        with self._arrived:
            return [line for line in self._lines if line.get("event") == event]

    def wait_for_output(self) -> str:
        """All that it wrote outside of its log, once it has ended."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: self._ended, START_TIMEOUT_S)
        return "".join(line["text"] for line in self.lines("raw"))

    def configure(self, config: str) -> None:
        """Replace its configuration file; it has not read it yet."""
        self.config_path.write_text(config)

    def restart(self) -> None:
        """Start again on the same directories after the process has ended."""
        self.wait_for_output()
        with self._arrived:
            self._lines = []
        self.process = self._start()
        self.wait_for("daemon_ready")

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Signal and wait; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        return self.process.wait(STOP_TIMEOUT_S)


@contextlib.contextmanager
def running_daemon(
    engine_store: Path,
    config: str | None = BASE_CONFIG,
    environ: Mapping[str, str] | None = None,
    *,
    ready: bool = True,
) -> Iterator[DaemonProcess]:
    """A daemon that is READY, killed at the end whatever happened.

    `config` None: it is told of no file, and looks for one itself.
    """
    with tempfile.TemporaryDirectory(prefix="ea-") as directory:  # short: socket paths are bounded
        daemon = DaemonProcess(Path(directory), engine_store, config, environ or {})
        try:
            if ready:
                daemon.wait_for("daemon_ready")
            yield daemon
        finally:
            if daemon.process.poll() is None:
                daemon.process.kill()
            daemon.process.wait()
            daemon.wait_for_output()
