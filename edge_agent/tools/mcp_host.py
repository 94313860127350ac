"""The process that speaks to MCP servers: `python -I -m edge_agent.tools.mcp_host FD PARENT OOM`.

Owns the connections and the servers that it starts; the only module that imports mcp. Decides
nothing about who may call what or for how long: the daemon does. Ends when the daemon does, and its
servers with it.
"""

import asyncio
import contextlib
import json
import logging
import os
import resource
import socket
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, Final, Self

import anyio
import httpx2
from anyio.abc import TaskGroup
from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for
from mcp import Client, MCPError, types
from mcp.client import Transport
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage
from mcp.types import CONNECTION_CLOSED

from edge_agent import __version__, child_process
from edge_agent.frames import Framer
from edge_agent.tools import protocol
from edge_agent.tools.pause import LONGEST_PAUSE_S, pause_s
from edge_agent.tools.results import bounded
from edge_agent.tools.settings import CommandServer, HttpServer, Server

_RECEIVE_BYTES: Final = 256 * 1024
_MEMORY_BYTES: Final = 256 * 1024 * 1024
"""A server that answers without end costs this much, never the robot's memory."""
_STACK_BYTES: Final = 1024 * 1024
_MOST_PAGES: Final = 100
_MAX_SCHEMA_BYTES: Final = 64 * 1024
_MAX_DESCRIPTION_CHARACTERS: Final = 4096
_WHY_CHARACTERS: Final = 300

Streams = tuple[Any, Any]
Tell = Callable[[protocol.ToDaemon], None]


class Link:
    """One server: connected, looked at, called, and connected anew once it is lost."""

    def __init__(self, name: str, opening: protocol.Open, tell: Tell) -> None:
        """Nothing is connected yet; see `run`."""
        self._name = name
        self._server = opening.servers[name]
        self._wanted = opening.wanted[name]
        self._opening = opening
        self._tell = tell
        self._client: Client | None = None
        self._listed: protocol.Listed | None = None
        self._patience = anyio.CancelScope()
        self._wake = asyncio.Event()
        self._calls = 0
        self._doubted = False

    async def run(self) -> None:
        """Keep the server connected until cancelled."""
        failures = 0
        while True:
            began_s = anyio.current_time()
            why = await self._serve_once()
            stable = anyio.current_time() - began_s >= LONGEST_PAUSE_S
            failures = 1 if stable else failures + 1
            self._tell(protocol.Down(self._name, why))
            await anyio.sleep(pause_s(failures, self._opening.first_pause_s))

    async def _serve_once(self) -> str:
        """Connect, and stay so; returns why it is over."""
        self._listed = None
        try:
            with anyio.CancelScope() as self._patience:
                await self._serve()
        except Exception as error:  # noqa: BLE001 - the link's owner loop: one server, not all
            return _why(error)
        finally:
            self._client = None
        return f"no answer within {self._opening.connect_timeout_s:g} s"

    async def _serve(self) -> None:
        """Ends by an error, or by the end of patience."""
        self._be_patient(for_s=self._opening.connect_timeout_s)
        async with Client(
            _transport(self._server, self._opening.connect_timeout_s, self._wake.set),
            cache=None,
            client_info=types.Implementation(name="edge-agent", version=__version__),
        ) as client:
            while True:
                self._be_patient(for_s=self._opening.connect_timeout_s)
                await self._list(client)
                self._client = client
                self._be_patient(for_s=None)
                await self._wait()

    async def _wait(self) -> None:
        """Until it is time to look at the server again.

        Never while calls are open: a server that does one thing at a time is busy, not lost.
        """
        while True:
            with anyio.move_on_after(self._opening.look_interval_s):
                await self._wake.wait()
            self._wake.clear()
            if not self._calls:
                self._doubted = False
                return

    def _be_patient(self, *, for_s: float | None) -> None:
        self._patience.deadline = float("inf") if for_s is None else anyio.current_time() + for_s

    async def _list(self, client: Client) -> None:
        """Tell the daemon which of the wanted tools there are, where that has changed."""
        found: dict[str, types.Tool] = {}
        cursor: str | None = None
        for _ in range(_MOST_PAGES):
            page = await client.list_tools(cursor=cursor)
            found |= {tool.name: tool for tool in page.tools if tool.name in self._wanted}
            cursor = page.next_cursor
            if cursor is None:
                break
        wrong = {name: problem for name, tool in found.items() if (problem := _problem(tool))}
        tools = tuple(_listed(tool) for name, tool in found.items() if name not in wrong)
        listed = protocol.Listed(self._name, tools, wrong)
        if listed != self._listed:
            self._listed = listed
            self._tell(listed)

    async def call(self, call: protocol.Call) -> None:
        """Call a tool and tell the daemon what came of it; to cancel this cancels the call."""
        client = self._client
        if client is None:
            self._tell(protocol.Failed(call.id, "the server is not up", begun=False))
            return
        self._calls += 1
        good = False
        try:
            answer = await self._answer(client, call)
            good = isinstance(answer, protocol.Answered) and not answer.is_error
            self._tell(answer)
        finally:
            self._calls -= 1
            self._doubted |= not good
            if self._doubted and not self._calls:
                self._wake.set()

    async def _answer(self, client: Client, call: protocol.Call) -> protocol.ToDaemon:
        try:
            result = await client.call_tool(call.tool, json.loads(call.arguments_json))
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                return protocol.Failed(call.id, f"the server is lost: {error.message}", begun=True)
            return self._answered(call, error.message, is_error=True)
        except (anyio.ClosedResourceError, anyio.BrokenResourceError):
            return protocol.Failed(call.id, "the server is lost", begun=True)
        except Exception as error:  # noqa: BLE001 - whatever a server says: one call, not all
            return self._answered(call, _why(error), is_error=True)
        return self._answered(call, _text(result), is_error=result.is_error)

    def _answered(self, call: protocol.Call, text: str, *, is_error: bool) -> protocol.Answered:
        instead = bounded(text, self._opening.max_result_bytes)
        if instead is not None:
            return protocol.Answered(call.id, instead, is_error=True, too_large=True)
        return protocol.Answered(call.id, text, is_error)


def _why(error: BaseException) -> str:
    """The innermost error in words, bounded."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return said[:_WHY_CHARACTERS]


def _problem(tool: types.Tool) -> str | None:
    """What is wrong with how the server describes a tool."""
    schema = tool.input_schema
    size_bytes = len(json.dumps(schema))
    if size_bytes > _MAX_SCHEMA_BYTES:
        return f"its input schema has {size_bytes} bytes, at most {_MAX_SCHEMA_BYTES}"
    if schema.get("type") != "object":
        return 'its input schema is not of type "object"'
    try:
        validator_for(schema).check_schema(schema)
    except SchemaError as error:
        return f"its input schema is none: {error.message}"[:_WHY_CHARACTERS]
    return None


def _listed(tool: types.Tool) -> protocol.ListedTool:
    description = (tool.description or "")[:_MAX_DESCRIPTION_CHARACTERS]
    return protocol.ListedTool(tool.name, description, json.dumps(tool.input_schema))


def _text(result: types.CallToolResult) -> str:
    """What the model gets: text as it is, all else named."""
    if not result.content and result.structured_content is not None:
        return json.dumps(result.structured_content)
    return "\n".join(_part(part) for part in result.content)


def _part(part: types.ContentBlock) -> str:
    match part:
        case types.TextContent(text=text):
            return text
        case types.ImageContent(mime_type=kind, data=data):
            return f"[an image that is not shown: {kind}, {len(data) * 3 // 4} bytes]"
        case types.AudioContent(mime_type=kind, data=data):
            return f"[a sound that is not played: {kind}, {len(data) * 3 // 4} bytes]"
        case types.ResourceLink(uri=uri):
            return f"[a link to a resource: {uri}]"
        case types.EmbeddedResource(resource=embedded):
            kind = embedded.mime_type or "of no stated type"
            return f"[a resource that is not shown: {embedded.uri}, {kind}]"


# --- how servers are reached ---


class _Watched:
    """The stream of what a server says; `lost` is called at its end."""

    def __init__(self, inner: Any, lost: Callable[[], None]) -> None:
        self._inner = inner
        self._lost = lost

    async def receive(self) -> SessionMessage | Exception:
        try:
            received: SessionMessage | Exception = await self._inner.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            self._lost()
            raise
        return received

    async def aclose(self) -> None:
        await self._inner.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.aclose()


def _transport(server: Server, timeout_s: float, lost: Callable[[], None]) -> Transport:
    match server:
        case CommandServer():
            return _started(server, lost)
        case HttpServer():
            return _over_http(server, timeout_s)


@contextlib.asynccontextmanager
async def _started(
    server: CommandServer, lost: Callable[[], None]
) -> AsyncGenerator[Streams, None]:
    """A server of our own; its standard error is ours."""
    if not os.access(server.command[0], os.X_OK):
        raise FileNotFoundError(f"{server.command[0]}: no program that can be executed")
    launch = ["-I", "-m", "edge_agent.tools.launch", str(os.getpid())]
    parameters = StdioServerParameters(
        command=sys.executable,
        args=[*launch, *server.command],
        env=dict(server.environment),
        cwd=server.directory,
        encoding_error_handler="replace",
    )
    async with stdio_client(parameters) as (read, write):
        yield _Watched(read, lost), write


@contextlib.asynccontextmanager
async def _over_http(server: HttpServer, timeout_s: float) -> AsyncGenerator[Streams, None]:
    """A server of somebody else's. Answers may take as long as the daemon waits for them."""
    patience = httpx2.Timeout(timeout_s, read=None)
    headers = _read_headers(server.headers_file)
    async with (
        # Nothing from the environment: neither proxies nor keys.
        httpx2.AsyncClient(headers=headers, timeout=patience, trust_env=False) as http,
        streamable_http_client(server.url, http_client=http) as streams,
    ):
        yield streams


def _read_headers(path: str | None) -> dict[str, str]:
    """The headers in a file of lines `Name: value`; errors never hold what is in it."""
    headers = {}
    for number, line in enumerate(Path(path).read_text().splitlines() if path else (), start=1):
        name, colon, value = line.partition(":")
        if not line.strip() or line.startswith("#"):
            continue
        if not colon or not name.strip():
            raise ValueError(f"headers_file, line {number}: must be `Name: value`")
        headers[name.strip()] = value.strip()
    return headers


# --- the process ---


class Process:
    """Serves one daemon until it hangs up."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Nothing is connected yet."""
        self._reader = reader
        self._writer = writer
        self._framer = Framer()
        self._links: dict[str, Link] = {}
        self._calls: dict[int, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        """Connect to the servers and take calls until the daemon hangs up or says so."""
        self._tell(protocol.Hello(protocol.PROTOCOL_VERSION))
        async with anyio.create_task_group() as tasks:
            await self._read(tasks)
            tasks.cancel_scope.cancel()

    def _tell(self, message: protocol.ToDaemon) -> None:
        self._writer.write(protocol.encode(message))

    async def _read(self, tasks: TaskGroup) -> None:
        while data := await self._reader.read(_RECEIVE_BYTES):
            for body in self._framer.feed(data):
                message = protocol.to_process_decoder.decode(body)
                if isinstance(message, protocol.Shutdown):
                    return
                if isinstance(message, protocol.Open) and not self._open(message, tasks):
                    return
                self._take(message)

    def _open(self, opening: protocol.Open, tasks: TaskGroup) -> bool:
        if opening.version != protocol.PROTOCOL_VERSION:
            return False
        self._links = {name: Link(name, opening, self._tell) for name in opening.servers}
        for link in self._links.values():
            tasks.start_soon(link.run)
        return True

    def _take(self, message: protocol.ToProcess) -> None:
        match message:
            case protocol.Ping(nonce=nonce):
                self._tell(protocol.Pong(nonce))
            case protocol.Call(id=call_id, server=server):
                task = asyncio.create_task(self._links[server].call(message))
                self._calls[call_id] = task
                task.add_done_callback(lambda _task: self._calls.pop(call_id))
            case protocol.Cancel(id=call_id) if call_id in self._calls:
                self._calls[call_id].cancel()


def _bound_memory() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    threading.stack_size(_STACK_BYTES)  # the usual 8 MiB of each thread would count too
    bound = _MEMORY_BYTES if most == resource.RLIM_INFINITY else min(_MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, most))


def main(fd: int, parent_pid: int, oom_score_adj: int) -> None:
    """Run over the inherited socket `fd`; does not return."""
    child_process.follow_parent(parent_pid)
    child_process.volunteer(oom_score_adj)
    _bound_memory()
    # It logs what servers say, which is nothing for a log; what goes wrong is told to the daemon.
    logging.getLogger("mcp").setLevel(logging.CRITICAL + 1)

    async def serve() -> None:
        reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=fd))
        await Process(reader, writer).serve()

    asyncio.run(serve())
    os._exit(0)  # whatever a library's threads are doing


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:4]))
