"""Both clients against the real API: runs with tools, streams, errors."""

import asyncio
import threading

import pytest

from edge_agent.client import AsyncClient, Client, default_address
from edge_agent.core import (
    EngineState,
    HaltScope,
    RunError,
    RunState,
    TextPart,
    Tool,
    ToolCall,
    ToolResult,
)
from edge_agent.errors import FieldViolation, InvalidRequest, NotFound, Unavailable
from edge_agent.events import CancelTool, Event, TextDelta
from tests.support.api_ports import EdgeThread

LAMP = Tool("lamp", "Switches the lamp.", '{"type":"object"}')


def calling(*calls):
    """An agent that makes these calls and answers with the results, in the order they came."""

    async def script(runs, run_id):
        runs.issue(run_id, *calls)
        await runs.until(lambda: len(runs.results) == len(calls))
        for index, word in enumerate(("all ", "done")):
            runs.emit(run_id, TextDelta(index + 1, word, 1))
        runs.finish(run_id, "all done")

    return script


def run_sync(edge, functions, on_event=None):
    tools = {name: (Tool(name, "", ""), function) for name, function in functions.items()}
    with Client(edge.api, name="robot") as client:
        return client.run("Light!", tools, on_event, timeout_s=50.0)


def run_async(edge, functions, on_event=None):
    async def main():
        tools = {name: (Tool(name, "", ""), function) for name, function in functions.items()}
        async with AsyncClient(edge.api, name="robot") as client:
            return await client.run("Light!", tools, on_event, timeout_s=50.0)

    return asyncio.run(main())


BOTH = pytest.mark.parametrize("carry", [run_sync, run_async])


def texts(results):
    return {
        result.tool_call_id: ("".join(part.text for part in result.parts), result.is_error)
        for result in results
    }


@BOTH
def test_tools_are_executed_with_their_arguments_in_order(runtime_dir, carry):
    seen = []

    def lamp(on):
        seen.append(on)
        return {"on": on} if on else "off"

    calls = [ToolCall("a", "lamp", '{"on":true}'), ToolCall("b", "lamp", '{"on":false}')]
    events: list[Event] = []
    with EdgeThread(runtime_dir, calling(*calls)) as edge:
        run = carry(edge, {"lamp": lamp}, events.append)
        results = edge.runs.results
    assert (run.state, run.answer, run.client) == (RunState.SUCCEEDED, "all done", "robot")
    assert seen == [True, False]
    assert texts(results) == {"a": ('{"on": true}', False), "b": ("off", False)}
    kinds = [type(event.body).__name__ for event in events]
    assert kinds[:2] == ["Snapshot", "ToolCallsIssued"]
    assert kinds[-3:] == ["TextDelta", "TextDelta", "RunFinished"]


@BOTH
def test_what_a_tool_raises_is_an_error_result(runtime_dir, carry):
    def lamp():
        raise OSError("bulb broken")

    calls = [
        ToolCall("a", "lamp", "{}"),
        ToolCall("b", "lamp", '{"x":1}'),
        ToolCall("c", "unheard_of", "{}"),
        ToolCall("d", "odd", "{}"),
    ]
    with EdgeThread(runtime_dir, calling(*calls)) as edge:
        carry(edge, {"lamp": lamp, "odd": lambda: {1, 2}})
        results = texts(edge.runs.results)
    assert results["a"] == ("OSError: bulb broken", True)
    assert results["b"][0].startswith("TypeError: ")
    assert results["c"] == ("unknown tool unheard_of", True)
    assert results["d"][0].startswith("TypeError: ")
    assert all(is_error for _, is_error in results.values())


@BOTH
def test_a_call_that_has_expired_is_never_started(runtime_dir, carry):
    started = []
    calls = [
        ToolCall("a", "slow", "{}", valid_for_s=30.0),
        ToolCall("b", "lamp", "{}", valid_for_s=0.000001),
    ]
    with EdgeThread(runtime_dir, calling(*calls)) as edge:
        carry(edge, {"slow": lambda: "ok", "lamp": lambda: started.append(1)})
        results = texts(edge.runs.results)
    assert started == []
    assert results == {"a": ("ok", False), "b": ("expired: not started within 1e-06 s", True)}


@BOTH
def test_a_call_that_is_cancelled_before_its_turn_is_never_started(runtime_dir, carry):
    first_runs, second_is_cancelled = threading.Event(), threading.Event()

    def first():
        first_runs.set()
        assert second_is_cancelled.wait(20)
        return "ok"

    async def script(runs, run_id):
        runs.issue(run_id, ToolCall("a", "first", "{}"), ToolCall("b", "second", "{}"))
        await asyncio.to_thread(first_runs.wait, 20)
        runs.emit(run_id, CancelTool("b", RunError("HALTED", "halted")))
        await runs.until(lambda: len(runs.results) == 2)
        runs.finish(run_id, "stopped")

    class Deaf(Exception):
        pass

    def second():
        raise Deaf

    with EdgeThread(runtime_dir, script) as edge:
        # The event is there once a watcher of the run has seen it.
        def release():
            with Client(edge.api) as client:
                for event in client.watch("run-1", 0):
                    if isinstance(event.body, CancelTool):
                        second_is_cancelled.set()
                        return

        releasing = threading.Thread(target=lambda: first_runs.wait(20) and release())
        releasing.start()
        carry(edge, {"first": first, "second": second})
        releasing.join(20)
        results = edge.runs.results
    assert [(r.tool_call_id, r.cancelled, r.is_error) for r in results] == [
        ("a", False, False),
        ("b", True, False),
    ]


def test_a_coroutine_that_is_running_is_cancelled_with_its_call(runtime_dir):
    stopped = []

    async def script(runs, run_id):
        runs.issue(run_id, ToolCall("a", "drive", "{}"))
        await asyncio.to_thread(driving.wait, 20)
        runs.emit(run_id, CancelTool("a", RunError("HALTED", "halted")))
        await runs.until(lambda: runs.results)
        runs.finish(run_id, "stopped")

    driving = threading.Event()

    async def drive():
        driving.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(True)

    with EdgeThread(runtime_dir, script) as edge:
        run = run_async(edge, {"drive": drive})
        results = edge.runs.results
    assert run.answer == "stopped"
    assert stopped == [True]
    assert results == [ToolResult("a", (TextPart("cancelled"),), cancelled=True)]


def angry(event):
    raise RuntimeError(event.run_id)


def test_what_on_event_raises_ends_the_run(runtime_dir):
    with EdgeThread(runtime_dir) as edge, Client(edge.api) as client:
        with pytest.raises(RuntimeError, match="run-1"):
            client.run("hi", on_event=angry)
        edge.until(lambda: edge.runs.run("run-1").state.ended)
        assert edge.runs.run("run-1").error.reason == "CLIENT_DISCONNECTED"


def test_what_on_event_raises_ends_the_run_of_asyncio_too(runtime_dir):
    async def main(edge):
        async with AsyncClient(edge.api) as client:
            with pytest.raises(RuntimeError, match="run-1"):
                await client.run("hi", on_event=angry)
            await asyncio.to_thread(edge.until, lambda: edge.runs.run("run-1").state.ended)

    with EdgeThread(runtime_dir) as edge:
        asyncio.run(main(edge))
        assert edge.runs.run("run-1").error.reason == "CLIENT_DISCONNECTED"


def test_a_daemon_that_refuses_is_not_taken_for_one_that_is_not_there(runtime_dir):
    with EdgeThread(runtime_dir) as edge, Client(edge.api) as client:
        with pytest.raises(Unavailable) as caught:
            client.create("hi", engine="leaves")
        assert (caught.value.reason, caught.value.retry_after_s) == ("DRAINING", 1.0)


@BOTH
def test_a_daemon_that_goes_away_in_the_middle_is_a_typed_error(runtime_dir, carry):
    edge = EdgeThread(runtime_dir)
    edge.__enter__()
    leaving = threading.Thread(target=edge.__exit__)

    def on_event(_event):
        if leaving.ident is None:
            leaving.start()

    with pytest.raises(Unavailable):
        carry(edge, {}, on_event)
    leaving.join(20)


def test_to_stop_reading_cancels_the_run(runtime_dir):
    with EdgeThread(runtime_dir) as edge, Client(edge.api) as client:
        events = client.execute("hi")
        next(events)
        events.close()  # type: ignore[attr-defined]
        edge.until(lambda: edge.runs.run("run-1").state.ended)
        assert edge.runs.run("run-1").error.reason == "CLIENT_DISCONNECTED"


def test_the_calls_of_the_blocking_client(runtime_dir):
    with EdgeThread(runtime_dir) as edge, Client(edge.api, name="r") as client:
        run = client.create("hi", request_id="q", agent="a", tools=[LAMP])
        assert client.create("hi", request_id="q", agent="a", tools=[LAMP]).id == run.id
        assert edge.runs.specs[run.id].tools == (LAMP,)
        assert client.get(run.id) == run
        others = [client.create(f"{i}").id for i in range(120)]
        assert [each.id for each in client.list()] == [*reversed(others), run.id]
        assert list(client.list([RunState.FAILED])) == []
        assert client.cancel(run.id).state is RunState.CANCELLED
        assert [type(event.body).__name__ for event in client.watch(run.id)] == ["Snapshot"]
        outcome = client.halt(HaltScope.AGENT, "a", "why")
        assert client.status().halts == (outcome.halt,)
        client.clear_halt(outcome.halt.id)
        assert client.status().halts == ()
        assert [engine.name for engine in client.engines()] == ["small"]
        with Client(edge.admin) as admin:
            assert admin.load("small").state is EngineState.READY
            assert admin.unload("small").state is EngineState.INSTALLED
        with pytest.raises(NotFound) as caught:
            client.submit_tool_results(run.id, [ToolResult("never", ())])
        assert caught.value.metadata == {"id": "never"}


def test_the_calls_of_the_asyncio_client(runtime_dir):
    async def main(edge):
        async with AsyncClient(edge.api, name="r") as client:
            run = await client.create("hi", request_id="q")
            assert await client.get(run.id) == run
            others = [(await client.create(f"{i}")).id for i in range(120)]
            assert [each.id async for each in client.list()] == [*reversed(others), run.id]
            assert (await client.cancel(run.id)).state is RunState.CANCELLED
            seen = [type(event.body).__name__ async for event in client.watch(run.id)]
            assert seen == ["Snapshot"]
            outcome = await client.halt(HaltScope.AGENT, "a", "why")
            assert (await client.status()).halts == (outcome.halt,)
            await client.clear_halt(outcome.halt.id)
            assert [engine.name for engine in await client.engines()] == ["small"]
            with pytest.raises(NotFound):
                await client.submit_tool_results(run.id, [ToolResult("never", ())])
            events = client.execute("hi")
            first = await anext(events)
            await events.aclose()  # type: ignore[attr-defined]
            return first.run_id

    with EdgeThread(runtime_dir) as edge:
        run_id = asyncio.run(main(edge))
        edge.until(lambda: edge.runs.run(run_id).state.ended)


def test_violations_reach_python(runtime_dir):
    with EdgeThread(runtime_dir) as edge, Client(edge.api) as client:
        with pytest.raises(InvalidRequest) as caught:
            client.create("", max_steps=0)
        assert caught.value.violations == (
            FieldViolation("spec.messages[0].parts", "has no text"),
            FieldViolation("spec.limits.max_steps", "0 is not in 1 to 8"),
        )


def test_nobody_at_the_address_is_said_plainly(runtime_dir):
    address = f"{runtime_dir}/none.sock"
    with Client(address) as client, pytest.raises(Unavailable) as caught:
        client.status()
    assert caught.value.reason == "DAEMON_UNREACHABLE"
    assert caught.value.message == f"no daemon answers at {address}"


@pytest.mark.parametrize(
    ("environ", "address"),
    [
        ({"EDGE_AGENT_SOCKET": "/x/y.sock", "XDG_RUNTIME_DIR": "/run/user/1"}, "/x/y.sock"),
        ({"XDG_RUNTIME_DIR": "/run/user/1"}, "/run/user/1/edge-agent/api.sock"),
        ({}, "/run/edge-agent/api.sock"),
    ],
)
def test_where_the_daemon_is(environ, address):
    assert default_address(environ) == address
