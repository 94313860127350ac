"""The daemon's side of one worker process: start it, load, decide steps, end it.

Owns the process and its socket. Never decides when: the scheduler does. Runs on the daemon's loop
and must not block it.
"""

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from edge_agent import child_process
from edge_agent.core import StepRequest, StepResult
from edge_agent.engines import protocol
from edge_agent.engines.manifest import Manifest
from edge_agent.errors import LoadFailed, StepFailed, WorkerError
from edge_agent.frames import Framer

OnText = Callable[[str, int], None]
OnProgress = Callable[[float], None]

_BOOTSTRAP = Path(__file__).with_name("bootstrap.py")
_OUTPUT_LINES = 50
"""The last ones of a worker: they tell why it ended."""
_LOAD_POLL_S = 0.1
_LAST_WORDS_S = 1.0
_ALMOST_LOADED = 0.99
"""The most that reading files can show; only the worker knows when the engine is loaded."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """How workers are run; from the configuration."""

    python: str | None
    heartbeat_interval_s: float
    heartbeat_timeout_s: float
    oom_score_adj: int


@dataclass(slots=True)
class Sequence:
    """One step in the worker. `ended` is done once the worker has let go of it."""

    id: int
    on_text: OnText
    ended: "asyncio.Future[StepResult]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class EngineHost:
    """One worker process hosting one engine."""

    def __init__(self, manifest: Manifest, settings: WorkerSettings) -> None:
        """Nothing runs yet; call `start`."""
        self.manifest = manifest
        self.slots = 0
        self.context_tokens = manifest.context_tokens
        self.load_s: float | None = None
        self.backend_version = ""
        self.lost: asyncio.Future[WorkerError] = asyncio.get_running_loop().create_future()
        self._settings = settings
        self._sequences: dict[int, Sequence] = {}
        self._ids = itertools.count(1)
        self._ready: asyncio.Future[protocol.Ready] = asyncio.get_running_loop().create_future()
        self._on_progress: OnProgress = lambda _fraction: None
        self._process: asyncio.subprocess.Process | None = None
        self._channel = _Channel(self._take, self._hung_up)
        self._tasks: list[asyncio.Task[None]] = []
        self._heard_s = 0.0
        self._gone = False
        self._killed = False
        self._scratch = ""
        self.output: deque[str] = deque(maxlen=_OUTPUT_LINES)

    @property
    def pid(self) -> int:
        """The worker's process id; 0 before `start`."""
        return self._process.pid if self._process else 0

    @property
    def active(self) -> int:
        """Steps in the worker."""
        return len(self._sequences)

    @property
    def own_exit_code(self) -> int | None:
        """How the process ended, negative for a signal; None while it runs, or if we killed it."""
        return self._process.returncode if self._process and not self._killed else None

    async def start(
        self, directory: Path, options: protocol.Options, on_progress: OnProgress
    ) -> None:
        """Start the process and load the engine; returns once it takes steps.

        The caller bounds the time, and calls `stop` when this raises.

        Raises:
            LoadFailed: the worker's own words, or that its process ended.
        """
        self._on_progress = on_progress
        self.context_tokens = options.context_tokens
        ours, theirs = socket.socketpair()
        try:
            await self._spawn(theirs)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        await asyncio.get_running_loop().create_connection(lambda: self._channel, sock=ours)
        self._tasks = [asyncio.create_task(self._read_output())]
        self._channel.send(
            protocol.Load(protocol.PROTOCOL_VERSION, self.manifest, str(directory), options)
        )
        watch = asyncio.create_task(self._watch_load())
        try:
            ready = await self._ready
        finally:
            watch.cancel()
        self.slots, self.load_s = ready.slots, ready.load_s
        self.backend_version = ready.backend_version
        # Not before: native loading may hold the worker's interpreter for as long as it takes.
        self._tasks.append(asyncio.create_task(self._watch_heartbeat()))

    async def _spawn(self, theirs: socket.socket) -> None:
        python = self._settings.python or sys.executable
        arguments = (theirs.fileno(), os.getpid(), self._settings.oom_score_adj)
        environ = child_process.environment(os.environ)
        environ["TMPDIR"] = self._make_scratch()
        try:
            self._process = await asyncio.create_subprocess_exec(
                python,
                "-I",
                str(_BOOTSTRAP),
                *(str(argument) for argument in arguments),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=environ,
            )
        except OSError as error:
            raise LoadFailed(
                f"worker_python {python}: {error.strerror}", metadata={"python": python}
            ) from error

    def _make_scratch(self) -> str:
        """The worker's temporary directory: ours to remove, since it may end without a word."""
        try:
            self._scratch = tempfile.mkdtemp(prefix="edge-agent-")
        except OSError as error:
            raise LoadFailed(f"no temporary directory for the worker: {error}") from error
        return self._scratch

    def decide(self, request: StepRequest, on_text: OnText) -> Sequence:
        """Begin a step; await `ended` of what is returned, and `cancel` it to stop.

        `ended` raises StepFailed with the worker's words, or WorkerError when the process is lost.

        Raises:
            WorkerError: the process is gone already.
        """
        if self.lost.done():
            raise self.lost.result()
        sequence = Sequence(next(self._ids), on_text)
        self._channel.send(protocol.Generate(sequence.id, request))  # may be too large to send
        self._sequences[sequence.id] = sequence
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Ask the worker to stop; `ended` is done when it has."""
        sequence.on_text = _ignore
        if sequence.id in self._sequences:
            self._channel.send(protocol.Cancel(sequence.id))

    def drop_cache(self) -> None:
        """Ask the worker to give back the memory of idle prefix caches."""
        self._channel.send(protocol.DropCache())

    async def stop(self, timeout_s: float) -> None:
        """End the process; returns once it is gone.

        Raises:
            WorkerError: reason UNLOAD_UNPROVEN, it is still there after SIGKILL.
        """
        self._lose(WorkerError("the engine was unloaded", reason="ENGINE_UNLOADED"))
        process = self._process
        if process is not None:
            self._channel.send(protocol.Shutdown())
            if self.load_s is None and not self._gone:  # native loading does not listen
                self.kill()
            try:
                await asyncio.wait_for(process.wait(), timeout_s / 2)
            except TimeoutError:
                self.kill()
                await self._prove_gone(process, timeout_s / 2)
        self._channel.close()
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)
        if self._tasks:  # the first reads the output: a process's last words tell the most
            await asyncio.wait(self._tasks[:1], timeout=_LAST_WORDS_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _prove_gone(self, process: asyncio.subprocess.Process, timeout_s: float) -> None:
        try:
            await asyncio.wait_for(process.wait(), timeout_s)
        except TimeoutError:
            raise WorkerError(
                f"worker {process.pid} of {self.manifest.name} is still there after SIGKILL",
                reason="UNLOAD_UNPROVEN",
                metadata={"engine": self.manifest.name, "pid": process.pid},
            ) from None

    def kill(self) -> None:
        """End the process now; everything in it is lost."""
        if self._process is not None and self._process.returncode is None:
            self._killed = True
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)

    def _take(self, message: protocol.ToDaemon) -> None:
        self._heard_s = time.monotonic()
        match message:
            case protocol.Batch():
                self._take_batch(message)
            case protocol.Loading(fraction=fraction):
                self._on_progress(fraction)
            case protocol.Ready():
                if not self._ready.done():
                    self._ready.set_result(message)
            case protocol.Refused(error=error):
                failure = LoadFailed(error.message, reason=error.reason, metadata=error.metadata)
                self._lose(failure)
            case protocol.Hello(version=version):
                if version != protocol.PROTOCOL_VERSION:
                    self._lose(LoadFailed(f"the worker speaks protocol {version}"))
            case protocol.Pong():
                pass

    def _take_batch(self, batch: protocol.Batch) -> None:
        for delta in batch.deltas:
            sequence = self._sequences.get(delta.sequence)
            if sequence is not None:
                sequence.on_text(delta.text, delta.tokens)
        for finished in batch.finished:
            ended = self._pop(finished.sequence)
            if ended is not None:
                ended.set_result(finished.result)
        for failed in batch.failed:
            ended = self._pop(failed.sequence)
            if ended is not None:
                ended.set_exception(StepFailed(failed.error))

    def _pop(self, sequence_id: int) -> "asyncio.Future[StepResult] | None":
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is None or sequence.ended.done():
            return None
        return sequence.ended

    def _hung_up(self) -> None:
        self._gone = True
        self._lose(
            WorkerError(
                f"the worker of {self.manifest.name} ended",
                metadata={"engine": self.manifest.name, "pid": self.pid},
            )
        )

    def _lose(self, error: WorkerError) -> None:
        """The worker takes no more steps; everything in it ends with `error`. Once."""
        if self.lost.done():
            return
        self.lost.set_result(error)
        if not self._ready.done():
            refusal = error if isinstance(error, LoadFailed) else _load_failed(error)
            self._ready.set_exception(refusal)
            self._ready.exception()  # retrieved here: `start` may have been cancelled
        sequences, self._sequences = self._sequences, {}
        for sequence in sequences.values():
            if not sequence.ended.done():
                sequence.ended.set_exception(error)

    async def _read_output(self) -> None:
        """The worker's and its libraries' own output becomes log lines, bounded in length."""
        process = self._process
        if process is None or process.stdout is None:
            return
        await child_process.read_lines(process.stdout, self._log_output)

    def _log_output(self, line: str) -> None:
        self.output.append(line)
        log.info("worker_output", engine=self.manifest.name, pid=self.pid, line=line)

    async def _watch_load(self) -> None:
        """How much of the engine's files the worker has read: its library may tell nothing."""
        total_bytes = sum(spec.size_bytes for spec in self.manifest.files)
        before_bytes = _bytes_read(self.pid)
        while True:
            await asyncio.sleep(_LOAD_POLL_S)
            read_bytes = _bytes_read(self.pid) - before_bytes
            self._on_progress(min(_ALMOST_LOADED, read_bytes / total_bytes))

    async def _watch_heartbeat(self) -> None:
        """Kill a worker that has stopped answering: a hung worker is never waited for."""
        settings = self._settings
        self._heard_s = time.monotonic()
        for nonce in itertools.count():
            self._channel.send(protocol.Ping(nonce))
            await asyncio.sleep(settings.heartbeat_interval_s)
            silent_s = time.monotonic() - self._heard_s
            if silent_s > settings.heartbeat_timeout_s:
                error = WorkerError(
                    f"the worker of {self.manifest.name} did not answer for {silent_s:.1f} s",
                    reason="WORKER_HUNG",
                    metadata={"engine": self.manifest.name, "pid": self.pid, "silent_s": silent_s},
                )
                log.error("worker_hung", engine=self.manifest.name, pid=self.pid)
                self.kill()
                self._lose(error)
                return


def _bytes_read(pid: int) -> int:
    """What a process has read so far (proc(5), rchar); 0 when it can't be seen."""
    try:
        return int(Path(f"/proc/{pid}/io").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _ignore(_text: str, _tokens: int) -> None:
    """Text of a step that nobody waits for."""


def _load_failed(error: WorkerError) -> LoadFailed:
    return LoadFailed(f"{error.message} while loading", metadata=error.metadata)


class _Channel(asyncio.Protocol):
    """Frames over one end of the socketpair."""

    def __init__(
        self, take: Callable[[protocol.ToDaemon], None], hung_up: Callable[[], None]
    ) -> None:
        self._take = take
        self._hung_up = hung_up
        self._framer = Framer()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self._transport = transport

    def data_received(self, data: bytes) -> None:
        for body in self._framer.feed(data):
            self._take(protocol.to_daemon_decoder.decode(body))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's name
        self._hung_up()

    def send(self, message: protocol.ToWorker) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(protocol.encode(message))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
