"""Tools of real MCP servers, through the process that speaks to them, which are killed for real."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import structlog

from edge_agent.core import Executor, SideEffect, TextPart, ToolCall, ToolResult
from edge_agent.errors import DeadlineExceeded, Overloaded, ToolNotReady, ToolUnavailable
from edge_agent.tools.settings import (
    AllowedTool,
    CommandServer,
    HttpServer,
    Server,
    ServerTool,
    ToolsSettings,
)
from edge_agent.tools.tools import DaemonTools
from tests.conftest import REPOSITORY
from tests.support.processes import children, wait_gone

SERVER = REPOSITORY / "tests" / "support" / "mcp_server.py"
OLD_SERVER = SERVER.with_name("mcp_server_2025.py")
WAIT_S = 40.0
LIMIT_BYTES = 4096
ALL = (
    *("add", "environment", "directory", "refuse", "wait_for_ever", "hang", "die", "much"),
    *("complain", "picture", "header", "vanish", "misshapen"),
)


class Notes:
    """What the server does, line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # never at its end
        self._rest = b""

    async def until(self, word: str) -> str:
        """The rest of the next line that begins with this word."""
        while True:
            line, newline, rest = self._rest.partition(b"\n")
            if not newline:
                await self._read_more()
                continue
            self._rest = rest
            first, _, more = line.decode().partition(" ")
            if first == word:
                return more

    async def _read_more(self) -> None:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._descriptor, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._descriptor)
        self._rest += os.read(self._descriptor, 4096)

    def close(self) -> None:
        os.close(self._descriptor)


class Stock:
    """The daemon's tools with one server, and what becomes of them."""

    def __init__(
        self,
        server: Server,
        tools: tuple[str, ...],
        *,
        others: Mapping[str, Server] | None = None,
        rate_limit: int | None = None,
        **settings: Any,
    ) -> None:
        others = others or {}
        self._changed = asyncio.Event()
        settings = {
            "max_result_bytes": LIMIT_BYTES,
            "first_pause_s": 0.05,
            "connect_timeout_s": 20.0,
            "look_interval_s": 1000.0,
        } | settings
        allow = {
            f"stock_{name}": AllowedTool(
                ServerTool("stock", name), SideEffect.IDEMPOTENT, 9.0, rate_limit
            )
            for name in tools
        }
        for name in others:
            allow[name] = AllowedTool(ServerTool(name, "add"), SideEffect.NONE, 9.0)
        self.tools = DaemonTools(
            ToolsSettings({"stock": server, **others}, allow, **settings),
            status=dict,
            on_change=self._changed.set,
        )

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            await self._changed.wait()
            self._changed.clear()

    async def until_up(self) -> None:
        await self.until(lambda: self.tools.tools() and not self.down())

    async def until_down(self) -> None:
        await self.until(self.down)

    def down(self) -> str:
        """Why the server is not up; empty where nothing is known against it."""
        return "".join(problem for problem in self.tools.problems() if "allow" not in problem)

    async def call(
        self, name: str, /, *, timeout_s: float = WAIT_S, **arguments: Any
    ) -> ToolResult:
        call = ToolCall("call-7", f"stock_{name}", json.dumps(arguments))
        return await self.tools.call(call, timeout_s=timeout_s)


def by_command(notes: Notes, **changed: Any) -> CommandServer:
    return CommandServer((sys.executable, str(SERVER), str(notes.path)), **changed)


@contextlib.asynccontextmanager
async def served(
    server: Server, tools: tuple[str, ...] = ALL, **settings: Any
) -> AsyncIterator[Stock]:
    stock = Stock(server, tools, **settings)
    async with asyncio.timeout(WAIT_S):
        await stock.tools.start()
        try:
            yield stock
        finally:
            await stock.tools.stop()


def text(answer: ToolResult) -> str:
    (part,) = answer.parts
    assert isinstance(part, TextPart)
    return part.text


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


@pytest.fixture
def notes(tmp_path: Path) -> Iterator[Notes]:
    notes = Notes(tmp_path / "notes")
    yield notes
    notes.close()


# --- a server that behaves: many tests share one ---


class Shared:
    """A server that lives as long as the module, on a loop of its own."""

    def __init__(self, path: Path) -> None:
        self._runner = asyncio.Runner()
        self.notes = Notes(path / "notes")
        os.environ["STOCK_SECRET"] = "of the daemon"
        self.stock = self.run(self._start(path))

    async def _start(self, path: Path) -> Stock:
        server = by_command(self.notes, environment={"SHELF": "7"}, directory=str(path))
        stock = Stock(server, (*ALL, "nowhere"))
        await stock.tools.start()
        await stock.until_up()
        return stock

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        async def bounded() -> Any:
            async with asyncio.timeout(WAIT_S):
                return await work

        return self._runner.run(bounded())

    def call(self, name: str, /, **arguments: Any) -> ToolResult:
        answer = self.run(self.stock.call(name, **arguments))
        assert isinstance(answer, ToolResult)
        return answer

    def stop(self) -> None:
        self.run(self.stock.tools.stop())
        self._runner.close()
        self.notes.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    shared = Shared(tmp_path_factory.mktemp("stock"))
    yield shared
    shared.stop()


class TestServer:
    def test_its_tools_are_as_it_describes_and_as_the_allow_list_says(self, shared: Shared):
        tool = shared.stock.tools.tools()["stock_add"]
        assert tool.description == "Add two numbers."
        assert json.loads(tool.input_schema_json)["required"] == ["a", "b"]
        assert tool.side_effect is SideEffect.IDEMPOTENT
        assert tool.executor is Executor.DAEMON
        assert tool.timeout_s == 9.0

    def test_a_call_gets_its_result(self, shared: Shared):
        answer = shared.call("add", a=2, b=40)
        assert answer == ToolResult("call-7", (TextPart("42"),))

    def test_many_calls_go_side_by_side(self, shared: Shared):
        async def all_at_once() -> list[str]:
            calls = (shared.stock.call("add", a=n, b=1) for n in range(50))
            return [text(answer) for answer in await asyncio.gather(*calls)]

        assert shared.run(all_at_once()) == [str(n + 1) for n in range(50)]

    def test_its_own_error_is_a_result(self, shared: Shared):
        answer = shared.call("refuse")
        assert answer.is_error
        assert "the shelf is empty" in text(answer)

    def test_arguments_that_it_refuses_are_its_own_error(self, shared: Shared):
        assert shared.call("add", a="many").is_error

    def test_what_is_no_text_is_named_in_words(self, shared: Shared):
        answer = shared.call("picture")
        assert text(answer).splitlines() == [
            "look:",
            "[an image that is not shown: image/png, 3 bytes]",
            "[a sound that is not played: audio/wav, 6 bytes]",
            "[a link to a resource: file:///map]",
            "[a resource that is not shown: file:///list, of no stated type]",
        ]

    def test_a_result_above_the_limit_is_an_error_that_names_it(self, shared: Shared):
        assert text(shared.call("much", size_bytes=LIMIT_BYTES)) == "x" * LIMIT_BYTES
        answer = shared.call("much", size_bytes=LIMIT_BYTES + 1)
        assert answer.is_error
        assert f"{LIMIT_BYTES + 1} bytes, at most 4KiB" in text(answer)
        assert answer.error is not None
        assert answer.error.reason == "RESULT_TOO_LARGE"

    def test_gets_the_environment_and_directory_of_the_configuration_alone(self, shared: Shared):
        assert text(shared.call("environment", name="SHELF")) == "7"
        assert text(shared.call("environment", name="STOCK_SECRET")) == "(unset)"
        assert Path(text(shared.call("directory"))) == shared.notes.path.parent

    def test_what_it_has_not_is_absent_and_a_problem(self, shared: Shared):
        tools = shared.stock.tools
        assert {"stock_nowhere", "stock_misshapen"} & set(tools.tools()) == set()
        misshapen, nowhere = tools.problems()
        assert misshapen.startswith("tools.allow.stock_misshapen: its input schema is none")
        assert nowhere == "tools.allow.stock_nowhere: server stock has no tool nowhere"

    @pytest.mark.parametrize("name", ["nowhere", "misshapen"])
    def test_a_call_of_what_it_has_not_is_refused_with_the_reason(self, shared: Shared, name: str):
        with pytest.raises(ToolNotReady, match=f"tools.allow.stock_{name}"):
            shared.call(name)

    def test_a_call_that_takes_too_long_is_cancelled_there(self, shared: Shared):
        async def too_long() -> None:
            with pytest.raises(DeadlineExceeded) as caught:
                await shared.stock.call("wait_for_ever", timeout_s=0.2)
            assert caught.value.reason == "TOOL_TIMEOUT"
            assert caught.value.metadata["tool"] == "wait_for_ever"
            await shared.notes.until("began")
            await shared.notes.until("cancelled")

        shared.run(too_long())

    def test_a_cancelled_call_is_over_at_once_and_cancelled_there(self, shared: Shared):
        async def cancel() -> None:
            call = asyncio.create_task(shared.stock.call("wait_for_ever"))
            await shared.notes.until("began")
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await shared.notes.until("cancelled")

        shared.run(cancel())

    def test_the_daemon_has_not_loaded_what_speaks_to_it(self):
        code = "import sys, edge_agent.tools.tools; print({'mcp', 'anyio'} & set(sys.modules))"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        assert said.stdout == b"set()\n"


# --- servers and processes that end ---


def test_a_server_that_dies_in_a_call_is_started_again(notes: Notes):
    async def story() -> None:
        async with served(by_command(notes)) as stock:
            await stock.until_up()
            with pytest.raises(ToolUnavailable) as caught:
                await stock.call("die")
            assert caught.value.reason == "TOOL_LOST"
            await stock.until_down()
            assert "stock_add" in stock.tools.tools()  # as they were
            with pytest.raises(ToolNotReady):
                await stock.call("add", a=1, b=1)
            await stock.until_up()
            assert text(await stock.call("add", a=1, b=1)) == "2"

    run(story())


def test_calls_of_a_server_that_is_down_cost_nothing_of_its_rate(notes: Notes):
    async def story() -> None:
        async with served(by_command(notes), ("add",), rate_limit=1) as stock:
            await stock.until_up()
            os.kill(int(await notes.until("pid")), signal.SIGKILL)
            await stock.until_down()
            for _ in range(3):
                with pytest.raises(ToolNotReady):
                    await stock.call("add", a=1, b=1)
            await stock.until_up()
            assert text(await stock.call("add", a=1, b=1)) == "2"
            with pytest.raises(Overloaded):
                await stock.call("add", a=1, b=1)

    run(story())


def test_a_tool_that_vanishes_unseen_is_a_problem_from_the_next_look_on(notes: Notes):
    async def story() -> None:
        settings = {"look_interval_s": 0.05}
        async with served(by_command(notes), ("add", "vanish"), **settings) as stock:
            await stock.until_up()
            await stock.call("vanish")
            await stock.until(lambda: "stock_add" not in stock.tools.tools())

    run(story())


def test_a_server_that_hangs_is_ended_and_started_again(notes: Notes):
    async def story() -> None:
        async with served(by_command(notes), connect_timeout_s=5.0) as stock:
            await stock.until_up()
            hanging = int(await notes.until("pid"))
            with pytest.raises(DeadlineExceeded):
                await stock.call("hang", timeout_s=0.5)
            await stock.until_down()
            assert "no answer within 5 s" in stock.down()
            await stock.until_up()
            assert wait_gone(hanging)
            assert text(await stock.call("add", a=1, b=1)) == "2"

    run(story())


def test_a_server_that_does_one_thing_at_a_time_is_not_disturbed_at_work(notes: Notes):
    async def story() -> None:
        settings = {"connect_timeout_s": 6.0, "look_interval_s": 0.05}
        async with served(by_command(notes), ("work",), **settings) as stock:
            await stock.until_up()
            assert text(await stock.call("work", for_s=7.5)) == "done"

    run(story())


def test_the_process_that_speaks_to_servers_may_be_killed_and_takes_them_along(notes: Notes):
    async def story() -> None:
        async with served(by_command(notes)) as stock:
            await stock.until_up()
            server, process = int(await notes.until("pid")), stock.tools.pid
            assert process is not None
            call = asyncio.create_task(stock.call("hang"))
            await notes.until("hangs")
            os.kill(process, signal.SIGKILL)
            with pytest.raises(ToolUnavailable) as caught:
                await call
            assert caught.value.reason == "TOOL_LOST"
            assert wait_gone(server)
            await stock.until_down()
            assert "SIGKILL" in stock.down()
            await stock.until_up()
            assert stock.tools.pid != process
            assert text(await stock.call("add", a=1, b=1)) == "2"

    run(story())


def test_a_silent_process_is_killed_and_started_again(notes: Notes):
    async def story() -> None:
        settings = {"heartbeat_interval_s": 0.1, "heartbeat_timeout_s": 3.0}
        async with served(by_command(notes), ("add",), **settings) as stock:
            await stock.until_up()
            process = stock.tools.pid
            assert process is not None
            os.kill(process, signal.SIGSTOP)
            await stock.until_down()
            await stock.until_up()
            assert stock.tools.pid != process

    run(story())


def test_stopping_ends_the_process_and_its_servers_even_one_that_hangs(notes: Notes):
    async def story() -> None:
        async with served(by_command(notes)) as stock:
            await stock.until_up()
            server, process = int(await notes.until("pid")), stock.tools.pid
            assert process is not None
            assert server in children(process)
            hanging = asyncio.create_task(stock.call("hang"))
            await notes.until("hangs")
            await stock.tools.stop()
            with pytest.raises(ToolUnavailable):
                await hanging
            assert wait_gone(process)
            assert wait_gone(server)
            assert stock.tools.pid is None

    run(story())


def test_a_tool_that_vanishes_is_a_problem_from_its_next_call_on(notes: Notes):
    async def story() -> None:
        async with served(by_command(notes), ("add", "vanish")) as stock:
            await stock.until_up()
            await stock.call("vanish")
            assert (await stock.call("add", a=1, b=1)).is_error
            await stock.until(lambda: "stock_add" not in stock.tools.tools())
            assert stock.tools.problems() == (
                "tools.allow.stock_add: server stock has no tool add",
            )

    run(story())


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("/nowhere/at/all",), "FileNotFoundError: /nowhere/at/all: no program"),
        (("/bin/false",), "Connection closed"),
        (("/bin/echo", "hello"), "Connection closed"),
        (("/bin/sleep", "1000"), "no answer within 1 s"),
    ],
    ids=["missing", "ends", "speaks otherwise", "silent"],
)
def test_what_is_no_server_is_a_problem_and_the_start_does_not_wait(
    command: tuple[str, ...], why: str
):
    async def story() -> None:
        settings = {"connect_timeout_s": 1.0, "first_pause_s": 30.0}
        async with served(CommandServer(command), ("add",), **settings) as stock:
            assert stock.tools.problems() == ()
            with pytest.raises(ToolNotReady, match="starting"):
                await stock.call("add", a=1, b=1)
            await stock.until_down()
            assert stock.down().startswith("tool server stock is not up: ")
            assert why in stock.down()
            assert stock.tools.tools() == {}

    run(story())


def test_what_a_server_writes_to_standard_error_is_in_the_log(notes: Notes):
    async def story() -> None:
        async with served(by_command(notes), ("add",)) as stock:
            await stock.until_up()

    with structlog.testing.capture_logs() as logs:
        run(story())
    lines = [entry["line"] for entry in logs if entry["event"] == "tool_process_output"]
    assert "stock server here" in lines


def test_a_server_that_complains_without_end_fills_no_log(notes: Notes):
    async def story() -> None:
        async with served(by_command(notes), ("complain",)) as stock:
            await stock.until_up()
            await stock.call("complain", lines=20_000)

    with structlog.testing.capture_logs() as logs:
        run(story())
    assert 100 < sum(entry["event"] == "tool_process_output" for entry in logs) < 1000


def test_a_server_of_the_older_protocol_and_of_other_hands_is_served_as_well(notes: Notes):
    async def story() -> None:
        server = CommandServer((sys.executable, str(OLD_SERVER), str(notes.path)))
        async with served(server, ("add", "wait_for_ever", "refuse_call")) as stock:
            await stock.until_up()
            assert len(stock.tools.tools()) == 3  # on two pages
            assert text(await stock.call("add", a=1, b=1)) == '{"sum": 2}'
            refused = await stock.call("refuse_call")
            assert refused.is_error
            assert text(refused) == "no such shelf"
            with pytest.raises(DeadlineExceeded):
                await stock.call("wait_for_ever", timeout_s=0.2)
            assert await notes.until("began") == await notes.until("cancelled")

    run(story())


# --- over HTTP ---


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def http_server(notes: Notes, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, str(SERVER), str(notes.path), str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


class _Endless(BaseHTTPRequestHandler):
    """Answers with JSON that has no end."""

    def do_POST(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b" " * 65536)

    def log_message(self, *_arguments: object) -> None:
        pass


@contextlib.contextmanager
def endless_server() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Endless) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def most_memory_mib(pid: int) -> int:
    """The most that the process ever had in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10


class TestHttp:
    def test_a_call_carries_the_headers_of_the_file_and_no_log_does(
        self, notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # not to be used
        monkeypatch.setenv("NO_PROXY", "")
        headers = tmp_path / "headers"
        headers.write_text("# the key\n\nX-Stock-Key: hidden-7\nAccept-Language: de\n")
        port = free_port()

        async def story() -> None:
            server = HttpServer(f"http://127.0.0.1:{port}/mcp", str(headers))
            async with served(server, ("add", "header")) as stock:
                await stock.until_up()
                assert text(await stock.call("add", a=20, b=3)) == "23"
                assert text(await stock.call("header", name="x-stock-key")) == "hidden-7"
                assert text(await stock.call("header", name="accept-language")) == "de"

        with structlog.testing.capture_logs() as logs, http_server(notes, port):
            run(story())
        assert "hidden-7" not in str(logs)

    def test_a_server_that_dies_in_a_call_is_reached_again_once_it_is_back(self, notes: Notes):
        port = free_port()

        async def story() -> None:
            server = HttpServer(f"http://127.0.0.1:{port}/mcp")
            async with served(server, ("add", "wait_for_ever")) as stock:
                with http_server(notes, port) as process:
                    await stock.until_up()
                    call = asyncio.create_task(stock.call("wait_for_ever"))
                    await notes.until("began")
                    process.kill()
                    with pytest.raises(ToolUnavailable) as caught:
                        await call
                    assert caught.value.reason == "TOOL_LOST"
                    await stock.until_down()
                with http_server(notes, port):
                    await stock.until_up()
                    assert text(await stock.call("add", a=1, b=1)) == "2"

        run(story())

    def test_a_call_that_takes_too_long_is_cancelled_there(self, notes: Notes):
        port = free_port()

        async def story() -> None:
            server = HttpServer(f"http://127.0.0.1:{port}/mcp")
            async with served(server, ("wait_for_ever",)) as stock:
                await stock.until_up()
                with pytest.raises(DeadlineExceeded):
                    await stock.call("wait_for_ever", timeout_s=0.5)
                await notes.until("cancelled")

        with http_server(notes, port):
            run(story())

    def test_an_answer_without_end_costs_its_server_and_no_other(self, notes: Notes):
        async def story() -> None:
            with endless_server() as port:
                others = {"endless": HttpServer(f"http://127.0.0.1:{port}/mcp")}
                settings = {"others": others, "first_pause_s": 30.0}
                async with served(by_command(notes), ("add",), **settings) as stock:
                    await stock.until(lambda: "server endless is not up" in stock.down())
                    await stock.until(lambda: "stock_add" in stock.tools.tools())
                    assert text(await stock.call("add", a=1, b=1)) == "2"
                    assert stock.tools.pid is not None
                    assert most_memory_mib(stock.tools.pid) < 350

        run(story())

    def test_nobody_there_is_a_problem(self):
        async def story() -> None:
            server = HttpServer(f"http://127.0.0.1:{free_port()}/mcp")
            async with served(server, ("add",), first_pause_s=30.0) as stock:
                await stock.until_down()
                assert "ConnectError" in stock.down()

        run(story())

    @pytest.mark.parametrize(
        ("content", "why"),
        [(None, "FileNotFoundError"), ("X-Key hidden-7\n", "headers_file, line 1")],
    )
    def test_a_file_of_headers_that_is_none_is_a_problem_that_tells_nothing_of_it(
        self, tmp_path: Path, content: str | None, why: str
    ):
        headers = tmp_path / "headers"
        if content is not None:
            headers.write_text(content)

        async def story() -> None:
            server = HttpServer("http://127.0.0.1:1/mcp", str(headers))
            async with served(server, ("add",), first_pause_s=30.0) as stock:
                await stock.until_down()
                assert why in stock.down()
                assert "hidden" not in stock.down()

        run(story())
