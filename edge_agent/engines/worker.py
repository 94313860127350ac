"""A worker's own main: one process, one loaded engine, one socket to the daemon.

The main thread reads the socket and answers pings; each sequence is decided in a thread of its
own; one thread writes. The process ends when the daemon does, whatever it is doing.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from edge_agent import child_process
from edge_agent.backends import create_backend
from edge_agent.backends.base import Backend, Cancelled, LoadOptions
from edge_agent.core import RunError
from edge_agent.decoding.steps import StepDecoder
from edge_agent.engines import protocol, seal
from edge_agent.engines.outbox import Outbox
from edge_agent.errors import EdgeAgentError, StepFailed
from edge_agent.frames import Framer

_RECEIVE_BYTES = 256 * 1024


class Worker:
    """Serves one daemon over `channel` until it hangs up."""

    def __init__(self, channel: socket.socket, load: protocol.Load) -> None:
        """Prepare to load what `load` says."""
        self._channel = channel
        self._load = load
        options = load.options
        self._outbox = Outbox(
            channel.sendall,
            backlog_tokens=options.backlog_tokens,
            backlog_s=options.backlog_s,
        )
        self._pool = ThreadPoolExecutor(options.slots, thread_name_prefix="sequence")
        self._cancels: dict[int, threading.Event] = {}
        self._lock = threading.Lock()
        self._backend: Backend | None = None
        self._decoder: StepDecoder | None = None

    def serve(self, framer: Framer) -> None:
        """Load in the background and take messages until the daemon hangs up or says so."""
        threading.Thread(target=self._write, name="outbox", daemon=True).start()
        threading.Thread(target=self._load_engine, name="load", daemon=True).start()
        while data := self._channel.recv(_RECEIVE_BYTES):
            for body in framer.feed(data):
                message = protocol.to_worker_decoder.decode(body)
                if isinstance(message, protocol.Shutdown):
                    return
                self._take(message)

    def _take(self, message: protocol.ToWorker) -> None:
        match message:
            case protocol.Ping(nonce=nonce):
                self._outbox.message(protocol.Pong(nonce))
            case protocol.Generate(sequence=sequence):
                cancel = threading.Event()
                with self._lock:
                    self._cancels[sequence] = cancel
                self._pool.submit(self._decide, message, cancel)
            case protocol.Cancel(sequence=sequence):
                with self._lock:
                    pending = self._cancels.get(sequence)
                if pending is not None:
                    pending.set()
            case protocol.DropCache():
                if self._backend is not None:
                    self._backend.drop_cache()

    def _write(self) -> None:
        try:
            with contextlib.suppress(OSError):  # the daemon is gone: the main thread sees it too
                self._outbox.run()
        except Exception:  # noqa: BLE001 - the worker's owner loop: nobody would ever hear from it
            _die()

    def _load_engine(self) -> None:
        load, options = self._load, self._load.options
        started_s = time.monotonic()
        try:
            backend: Backend = create_backend(load.manifest.backend.name)
            directory = Path(load.directory)
            seal.require_unchanged(directory, load.manifest)
            backend.load(
                load.manifest,
                directory,
                LoadOptions(
                    slots=options.slots,
                    context_tokens=options.context_tokens,
                    threads=options.threads,
                    prefill_batch_tokens=options.prefill_batch_tokens,
                ),
                lambda fraction: self._outbox.message(protocol.Loading(fraction)),
            )
            version = backend.version()
        except EdgeAgentError as error:
            self._outbox.message(protocol.Refused(error.as_run_error()))
            return
        except Exception as error:  # noqa: BLE001 - the worker's owner loop: report, never hang
            text = f"{type(error).__name__}: {error}"
            self._outbox.message(protocol.Refused(RunError("ENGINE_LOAD_FAILED", text)))
            return
        self._backend = backend
        self._decoder = StepDecoder(backend, load.manifest, options.context_tokens)
        load_s = time.monotonic() - started_s
        self._outbox.message(protocol.Ready(options.slots, load_s, version))

    def _decide(self, message: protocol.Generate, cancel: threading.Event) -> None:
        sequence, outbox = message.sequence, self._outbox
        overflow = False

        def on_text(text: str, tokens: int) -> None:
            nonlocal overflow
            if not outbox.delta(sequence, text, tokens):
                overflow = True
                cancel.set()

        try:
            decoder = self._loaded_decoder()
            outbox.finished(sequence, decoder.decide(message.request, cancel, on_text))
        except Cancelled:
            outbox.failed(sequence, _slow_daemon() if overflow else _cancelled())
        except EdgeAgentError as error:
            outbox.failed(sequence, error.as_run_error())
        except Exception as error:  # noqa: BLE001 - the worker's owner loop: one step, not all
            text = f"{type(error).__name__}: {error}"
            outbox.failed(sequence, RunError("ENGINE_FAILED", text, retryable=True))
        finally:
            with self._lock:
                del self._cancels[sequence]

    def _loaded_decoder(self) -> StepDecoder:
        if self._decoder is None:
            raise StepFailed(RunError("ENGINE_NOT_READY", "the engine is not loaded", True))
        return self._decoder


def _cancelled() -> RunError:
    return RunError("CANCELLED", "the step was cancelled")


def _slow_daemon() -> RunError:
    return RunError("BACKLOG_FULL", "the daemon did not read the step's text in time", True)


def main(fd: int, parent_pid: int, oom_score_adj: int) -> None:
    """Run a worker over the inherited socket `fd`; does not return."""
    # SIGINT at a terminal goes to the whole group; ending workers is the daemon's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child_process.follow_parent(parent_pid)
    child_process.volunteer(oom_score_adj)
    channel = socket.socket(fileno=fd)
    channel.sendall(protocol.encode(protocol.Hello(protocol.PROTOCOL_VERSION)))
    framer = Framer()
    try:
        load = _first_message(channel, framer)
        if load is not None:
            Worker(channel, load).serve(framer)
    except Exception:  # noqa: BLE001 - the worker's owner loop
        _die()
    # Native threads must not get a chance to hang the exit.
    os._exit(0)


def _die() -> NoReturn:
    """End the process at once, with the exception as its last words for the daemon's log."""
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)


def _first_message(channel: socket.socket, framer: Framer) -> protocol.Load | None:
    while data := channel.recv(_RECEIVE_BYTES):
        for body in framer.feed(data):
            message = protocol.to_worker_decoder.decode(body)
            if isinstance(message, protocol.Load):
                if message.version == protocol.PROTOCOL_VERSION:
                    return message
                text = f"protocol {message.version}, this worker speaks {protocol.PROTOCOL_VERSION}"
                refusal = protocol.Refused(RunError("PROTOCOL_MISMATCH", text))
                channel.sendall(protocol.encode(refusal))
            return None
    return None
