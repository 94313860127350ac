"""The daemon's side of the process that speaks to MCP servers: start it, call tools, end it.

Owns that process and its socket: starts it again when it ends, with a pause, and kills it when it
is silent. Knows nothing of the allow-list. Runs on the daemon's loop and must not block it.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from edge_agent import child_process
from edge_agent.errors import DeadlineExceeded, ToolNotReady, ToolUnavailable
from edge_agent.frames import Framer
from edge_agent.tools import protocol
from edge_agent.tools.bucket import Bucket
from edge_agent.tools.pause import LONGEST_PAUSE_S, pause_s
from edge_agent.tools.settings import ServerTool, ToolsSettings

_MODULE = "edge_agent.tools.mcp_host"
_STOP_S = 5.0
_LAST_WORDS_S = 1.0
_LINES_A_MINUTE = 600

log = structlog.get_logger()


@dataclass(slots=True)
class ServerState:
    """What is known of one server. `tools` are those from the last time that it was up."""

    tools: Mapping[str, protocol.ListedTool]
    refused: Mapping[str, str]
    seen: bool = False
    up: bool = False
    why_down: str = ""


class McpProcess:
    """One process for all servers, from `start` to `stop`."""

    def __init__(
        self,
        settings: ToolsSettings,
        wanted: Mapping[str, Sequence[str]],
        on_change: Callable[[], None],
    ) -> None:
        """`wanted` are the tools that may be called, by server; nothing runs yet."""
        self._settings = settings
        self._wanted = {name: tuple(tools) for name, tools in wanted.items()}
        self.servers = {name: ServerState({}, {}) for name in wanted}
        self.problem = ""
        self._on_change = on_change
        self._calls: dict[int, asyncio.Future[protocol.Answered | protocol.Failed]] = {}
        self._ids = itertools.count(1)
        self._process: asyncio.subprocess.Process | None = None
        self._channel: _Channel | None = None
        self._task: asyncio.Task[None] | None = None
        self._heard_s = 0.0
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """The process; None while there is none."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Begin; returns at once."""
        self._task = asyncio.create_task(self._keep_running())

    async def stop(self) -> None:
        """End the process and its servers; at most some seconds."""
        self._stopping = True
        if self._channel is not None:
            self._channel.send(protocol.Shutdown())
        if self._task is not None:
            if self._process is not None:
                await asyncio.wait({self._task}, timeout=_STOP_S)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def call(
        self, source: ServerTool, arguments_json: str, timeout_s: float
    ) -> protocol.Answered:
        """What a tool says; to cancel this cancels the call.

        Raises:
            ToolNotReady: the server is not up; nothing has begun.
            ToolUnavailable: it was lost meanwhile.
            DeadlineExceeded: reason TOOL_TIMEOUT.
        """
        metadata = {"server": source.server, "tool": source.tool}
        channel = self._open_channel(source)
        call_id = next(self._ids)
        answer: asyncio.Future[protocol.Answered | protocol.Failed]
        answer = self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            channel.send(protocol.Call(call_id, source.server, source.tool, arguments_json))
            said = await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            channel.send(protocol.Cancel(call_id))
            message = f"tool {source.tool} of {source.server} gave no result within {timeout_s:g} s"
            metadata["timeout_s"] = f"{timeout_s:g}"
            raise DeadlineExceeded(message, reason="TOOL_TIMEOUT", metadata=metadata) from None
        except asyncio.CancelledError:
            channel.send(protocol.Cancel(call_id))
            raise
        finally:
            self._calls.pop(call_id, None)
        if isinstance(said, protocol.Failed):
            kind = ToolUnavailable if said.begun else ToolNotReady
            raise kind(f"tool server {source.server}: {said.why}", metadata=metadata)
        return said

    def require_up(self, source: ServerTool) -> None:
        """Nothing, where a call may be tried.

        Raises:
            ToolNotReady: the server is not up.
        """
        self._open_channel(source)

    def _open_channel(self, source: ServerTool) -> "_Channel":
        state, channel = self.servers[source.server], self._channel
        if channel is None or not state.up:
            why = state.why_down or self.problem or "it is starting"
            message = f"tool server {source.server} is not up: {why}"
            metadata = {"server": source.server, "tool": source.tool}
            raise ToolNotReady(message, metadata=metadata)
        return channel

    # --- the process ---

    async def _keep_running(self) -> None:
        failures = 0
        while True:
            began_s = time.monotonic()
            try:
                why = await self._run_once()
            except OSError as error:
                why = error.strerror or str(error)
            if self._stopping:
                return
            stable = time.monotonic() - began_s >= LONGEST_PAUSE_S
            failures = 1 if stable else failures + 1
            wait_s = pause_s(failures, self._settings.first_pause_s)
            self.problem = f"tool servers: the process that speaks to them ended: {why}"
            log.error("tool_process_ended", why=why, failures=failures, pause_s=wait_s)
            self._on_change()
            await asyncio.sleep(wait_s)

    async def _run_once(self) -> str:
        """Start the process and live with it; returns how it ended."""
        ours, theirs = socket.socketpair()
        try:
            process = await self._spawn(theirs)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._process = process
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._connect(ours)
            tasks = [
                asyncio.create_task(self._read_output(process)),
                asyncio.create_task(self._watch_heartbeat(process)),
            ]
            code = await process.wait()
        finally:
            await self._clean_up(process, tasks)
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    async def _spawn(self, theirs: socket.socket) -> asyncio.subprocess.Process:
        arguments = (theirs.fileno(), os.getpid(), self._settings.oom_score_adj)
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-m",
            _MODULE,
            *(str(argument) for argument in arguments),
            pass_fds=(theirs.fileno(),),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=child_process.environment(os.environ),
            process_group=0,  # a Ctrl-C at a terminal is for the daemon: it ends this process
        )

    async def _connect(self, ours: socket.socket) -> None:
        settings = self._settings
        channel = _Channel(self)
        await asyncio.get_running_loop().create_connection(lambda: channel, sock=ours)
        channel.send(
            protocol.Open(
                protocol.PROTOCOL_VERSION,
                servers={name: settings.servers[name] for name in self._wanted},
                wanted=self._wanted,
                max_result_bytes=settings.max_result_bytes,
                connect_timeout_s=settings.connect_timeout_s,
                look_interval_s=settings.look_interval_s,
                first_pause_s=settings.first_pause_s,
            )
        )
        self._channel = channel

    async def _clean_up(
        self, process: asyncio.subprocess.Process, tasks: list[asyncio.Task[None]]
    ) -> None:
        """Nothing of the process is left, and nobody waits for it."""
        if self._channel is not None:
            self._channel.close()
        self._process = self._channel = None
        for state in self.servers.values():
            state.up = False
        self._fail_calls("the process that speaks to it ended")
        if process.returncode is None:
            _kill(process)
            await process.wait()
        if tasks:  # the first reads the output: a process's last words tell the most
            await asyncio.wait(tasks[:1], timeout=_LAST_WORDS_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _fail_calls(self, why: str) -> None:
        calls, self._calls = self._calls, {}
        for call_id, answer in calls.items():
            if not answer.done():
                answer.set_result(protocol.Failed(call_id, why, begun=True))

    async def _read_output(self, process: asyncio.subprocess.Process) -> None:
        """What it and the servers that it started write to standard error becomes log lines.

        As many as are bearable: these are programs that we don't know.
        """
        assert process.stdout is not None  # noqa: S101 - asked for when it was started

        bucket, left_out = Bucket(_LINES_A_MINUTE, time.monotonic()), 0

        def say(line: str) -> None:
            nonlocal left_out
            if bucket.take(time.monotonic()) is not None:
                left_out += 1
                return
            if left_out:
                log.warning("tool_process_output_left_out", pid=process.pid, lines=left_out)
                left_out = 0
            log.info("tool_process_output", pid=process.pid, line=line)

        await child_process.read_lines(process.stdout, say)

    async def _watch_heartbeat(self, process: asyncio.subprocess.Process) -> None:
        """Kill a process that has stopped answering."""
        settings = self._settings
        self._heard_s = time.monotonic()
        for nonce in itertools.count():
            if self._channel is not None:
                self._channel.send(protocol.Ping(nonce))
            await asyncio.sleep(settings.heartbeat_interval_s)
            if time.monotonic() - self._heard_s > settings.heartbeat_timeout_s:
                log.error("tool_process_hung", pid=process.pid)
                _kill(process)
                return

    # --- what the process says ---

    def take(self, message: protocol.ToDaemon) -> None:
        """One message."""
        self._heard_s = time.monotonic()
        match message:
            case protocol.Listed():
                self._listed(message)
            case protocol.Down(server=server, why=why):
                self._down(self.servers[server], server, why)
            case protocol.Answered(id=call_id) | protocol.Failed(id=call_id):
                answer = self._calls.get(call_id)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case protocol.Hello(version=version) if version != protocol.PROTOCOL_VERSION:
                self.problem = f"tool servers: their process speaks protocol {version}"
            case _:
                pass

    def _down(self, state: ServerState, server: str, why: str) -> None:
        if state.up or state.why_down != why:  # else it is another try that has failed likewise
            log.warning("tool_server_down", server=server, why=why)
        state.up, state.why_down = False, why
        self._on_change()

    def _listed(self, message: protocol.Listed) -> None:
        state = self.servers[message.server]
        state.tools = {tool.name: tool for tool in message.tools}
        state.refused = message.refused
        state.up, state.seen, state.why_down = True, True, ""
        self.problem = ""
        log.info("tool_server_up", server=message.server, tools=sorted(state.tools))
        self._on_change()


def _kill(process: asyncio.subprocess.Process) -> None:
    """End the process and its group now; servers go with it (see `launch`)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class _Channel(asyncio.Protocol):
    """Frames over one end of the socketpair."""

    def __init__(self, owner: McpProcess) -> None:
        self._owner = owner
        self._framer = Framer()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self._transport = transport

    def data_received(self, data: bytes) -> None:
        for body in self._framer.feed(data):
            self._owner.take(protocol.to_daemon_decoder.decode(body))

    def send(self, message: protocol.ToProcess) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(protocol.encode(message))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
