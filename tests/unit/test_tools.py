"""The daemon's own tools without a server: the allow-list, limits, built-ins, results."""

import asyncio
import dataclasses
import json
import sys
from collections.abc import Coroutine, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core import Executor, SideEffect, TextPart, Tool, ToolCall, ToolResult
from edge_agent.errors import NotFound, Overloaded, ToolNotReady
from edge_agent.tools import builtin
from edge_agent.tools.results import bounded, result
from edge_agent.tools.settings import (
    CLOCK,
    DEVICE_STATUS,
    AllowedTool,
    Builtin,
    CommandServer,
    ServerTool,
    ToolsSettings,
)
from edge_agent.tools.tools import DaemonTools

NOON = datetime(2026, 11, 25, 12, 0, 30, tzinfo=timezone(timedelta(hours=9)))
STATUS = {"memory": {"available_bytes": 3, "total_bytes": None}, "power_mode": None}


class Seconds:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def built_in(name: str, **changed: Any) -> AllowedTool:
    return dataclasses.replace(AllowedTool(Builtin(name), SideEffect.NONE, 30.0), **changed)


def tools_of(
    allow: Mapping[str, AllowedTool], clock: Seconds | None = None, **settings: Any
) -> DaemonTools:
    return DaemonTools(
        ToolsSettings(allow=allow, **settings),
        status=lambda: STATUS,
        monotonic_s=clock or Seconds(),
        now=lambda: NOON,
        uptime_s=lambda: 61.4,
    )


def run(work: Coroutine[Any, Any, ToolResult]) -> ToolResult:
    return asyncio.run(work)


def call(tools: DaemonTools, name: str, arguments_json: str = "{}") -> ToolResult:
    return run(tools.call(ToolCall("call-1", name, arguments_json), timeout_s=5.0))


def text(answer: ToolResult) -> str:
    (part,) = answer.parts
    assert isinstance(part, TextPart)
    return part.text


class TestAllowList:
    def test_is_what_the_model_sees(self):
        entry = built_in(CLOCK, side_effect=SideEffect.IDEMPOTENT, timeout_s=7.0)
        tools = tools_of({"what_time": dataclasses.replace(entry, needs_approval=True)})
        assert tools.tools() == {
            "what_time": Tool(
                "what_time",
                builtin.DESCRIPTIONS[CLOCK],
                builtin.NO_ARGUMENTS,
                timeout_s=7.0,
                side_effect=SideEffect.IDEMPOTENT,
                executor=Executor.DAEMON,
                needs_approval=True,
            )
        }

    def test_nothing_else_is_called(self):
        tools = tools_of({"what_time": built_in(CLOCK)})
        with pytest.raises(NotFound) as caught:
            call(tools, CLOCK)
        assert caught.value.reason == "TOOL_NOT_LISTED"
        assert caught.value.metadata == {"tool": CLOCK}

    def test_without_one_there_is_nothing_and_nothing_wrong(self):
        tools = tools_of({})
        assert tools.tools() == {}
        assert tools.problems() == ()
        assert tools.pid is None

    def test_names_every_builtin_that_can_be_configured(self):
        for name in (CLOCK, DEVICE_STATUS):
            assert name in builtin.DESCRIPTIONS


class TestRateLimit:
    def test_refuses_before_anything_is_called_and_says_when(self):
        clock = Seconds()
        tools = tools_of({"clock": built_in(CLOCK, rate_limit=2)}, clock)
        assert not call(tools, "clock").is_error
        assert not call(tools, "clock").is_error
        clock.now_s += 10.0
        with pytest.raises(Overloaded) as caught:
            call(tools, "clock")
        assert caught.value.reason == "TOOL_RATE_LIMITED"
        assert caught.value.retry_after_s == pytest.approx(20.0)
        assert caught.value.metadata == {"tool": "clock", "rate_limit": "2", "wait_s": "20.0"}
        clock.now_s += 20.0
        assert not call(tools, "clock").is_error

    def test_is_each_tools_own(self):
        allow = {"a": built_in(CLOCK, rate_limit=1), "b": built_in(CLOCK, rate_limit=1)}
        tools = tools_of(allow)
        call(tools, "a")
        assert not call(tools, "b").is_error

    def test_none_is_no_limit(self):
        tools = tools_of({"clock": built_in(CLOCK)})
        assert [call(tools, "clock").is_error for _ in range(200)] == [False] * 200

    def test_arguments_that_are_none_cost_nothing(self):
        tools = tools_of({"clock": built_in(CLOCK, rate_limit=1)})
        assert call(tools, "clock", "[1]").is_error
        assert not call(tools, "clock").is_error


@pytest.mark.parametrize("arguments_json", ["", "[]", "{", '"x"', "null"])
def test_arguments_that_are_no_object_are_the_models_error(arguments_json: str):
    answer = call(tools_of({"clock": built_in(CLOCK)}), "clock", arguments_json)
    assert answer.is_error
    assert "no JSON object" in text(answer)
    assert answer.tool_call_id == "call-1"


class TestBuiltins:
    def test_the_clock_says_local_and_utc_time_with_the_weekday(self):
        said = json.loads(text(call(tools_of({"clock": built_in(CLOCK)}), "clock")))
        assert said["utc"] == "2026-11-25T03:00:30+00:00"
        assert datetime.fromisoformat(said["local"]) == NOON
        assert said["weekday"] == NOON.astimezone().strftime("%A")
        assert said["uptime_s"] == 61
        assert said["time_zone"] == NOON.astimezone().tzname()

    def test_the_clocks_of_this_machine_are_its_own(self):
        assert builtin.machine_uptime_s() > 0
        assert abs(builtin.now_utc().timestamp() - datetime.now().timestamp()) < 60  # noqa: DTZ005

    def test_the_device_status_is_what_the_daemon_knows_and_null_where_it_does_not(self):
        tools = tools_of({"device": built_in(DEVICE_STATUS)})
        assert json.loads(text(call(tools, "device"))) == STATUS


class TestResults:
    def test_a_result_as_large_as_allowed_is_taken_and_one_byte_more_is_an_error(self):
        asked = ToolCall("c", "t", "{}")
        assert text(result(asked, "é" * 32, is_error=False, max_bytes=64)) == "é" * 32
        answer = result(asked, "é" * 32 + "x", is_error=False, max_bytes=64)
        assert answer.is_error
        assert "65 bytes" in text(answer)
        assert "64B" in text(answer)
        assert "runs.max_tool_result_size" in text(answer)

    def test_a_tools_own_error_stays_one(self):
        answer = result(ToolCall("c", "t", "{}"), "broken", is_error=True, max_bytes=64)
        assert answer == ToolResult("c", (TextPart("broken"),), is_error=True)

    def test_a_builtin_is_bounded_too(self):
        tools = tools_of({"device": built_in(DEVICE_STATUS)}, max_result_bytes=20)
        answer = call(tools, "device")
        assert answer.is_error
        assert answer.error is not None
        assert answer.error.reason == "RESULT_TOO_LARGE"

    @given(st.text(max_size=40), st.integers(min_value=1, max_value=80))
    def test_only_what_fits_is_let_through(self, said: str, max_bytes: int):
        fits = len(said.encode(errors="replace")) <= max_bytes
        assert (bounded(said, max_bytes) is None) == fits


class TestWithoutMcp:
    @pytest.fixture
    def tools(self, monkeypatch: pytest.MonkeyPatch) -> DaemonTools:
        monkeypatch.setitem(sys.modules, "mcp", None)  # as where it is not installed
        allow = {
            "clock": built_in(CLOCK),
            "add": AllowedTool(ServerTool("stock", "add"), SideEffect.NONE, 30.0),
        }
        return tools_of(allow, servers={"stock": CommandServer(("/bin/true",))})

    def test_says_what_to_install(self, tools: DaemonTools):
        (problem,) = tools.problems()
        assert "edge-agent[mcp]" in problem

    def test_everything_else_works(self, tools: DaemonTools):
        assert list(tools.tools()) == ["clock"]
        assert not call(tools, "clock").is_error

        async def start_and_stop() -> None:
            await tools.start()
            await tools.stop()

        asyncio.run(start_and_stop())

    def test_a_call_of_a_servers_tool_is_refused_and_says_why(self, tools: DaemonTools):
        with pytest.raises(ToolNotReady, match=r"edge-agent\[mcp\]") as caught:
            call(tools, "add")
        assert caught.value.reason == "TOOL_NOT_READY"
