"""A Halt in the middle of what robots do, and how they go on after it, over real sockets."""

import signal

import pytest

from edge_agent.core import HaltScope, RunState, ToolResult
from edge_agent.errors import Halted
from edge_agent.events import (
    ApprovalRequested,
    CancelTool,
    StateChanged,
    StepFinished,
    ToolCallsIssued,
)
from tests.support.daemon import BASE_CONFIG, running_daemon
from tests.support.driving import Caller, robot_tools
from tests.support.scripted_worker import install

WALK = ("walk_to", {"waypoint": "gate"})
TURN = ("turn_by", {"degrees": 90})


@pytest.fixture
def daemon(tmp_path):
    store = tmp_path / "engines"
    with running_daemon(store, install(store, "cancel_confirm: 10s")) as running:
        running.wait_for("engine_loaded")
        yield running


@pytest.fixture
def alice(daemon):
    with Caller(daemon, "alice") as client:
        yield client


@pytest.fixture
def carol(daemon):
    with Caller(daemon, "carol") as client:
        yield client


@pytest.fixture
def guard(daemon):
    """Any other client: everybody may call Halt."""
    with Caller(daemon, "guard") as client:
        yield client


def call_is_open(alice, _carol):
    run_id = alice.begin([WALK], [TURN], durable=True)
    alice.issued(run_id, "walk_to")
    return run_id


def waits_for_the_legs(alice, carol):
    carol.issued(carol.begin([WALK]), "walk_to")
    run_id = alice.begin([WALK], [TURN], durable=True)
    alice.until(run_id, StepFinished, lambda _step: True)
    return run_id


def patrol_goes_on(alice, _carol):
    return alice.background(durable=True)[0]


def waits_for_approval(alice, _carol):
    tools = robot_tools("quadruped", walk_to={"needs_approval": True})
    run_id = alice.begin([WALK], [TURN], tools=tools, durable=True)
    alice.until(run_id, ApprovalRequested, lambda _asked: True)
    return run_id


def confirm(client, run_id):
    """Stop what the run has begun, as its driver; returns which calls that are."""
    begun = client.get(run_id)
    calls = [call.id for call in (*begun.open_tool_calls, *begun.background_tool_calls)]
    client.submit_tool_results(run_id, [ToolResult(each, (), cancelled=True) for each in calls])
    return calls


def serve(client, run_id, after):
    """Drive: do whatever the run asks for, up to its end; returns what was called."""
    called = []
    for event in client.since(run_id, after):
        match event.body:
            case ToolCallsIssued(tool_calls=calls):
                called += [call.name for call in calls]
                for call in calls:
                    client.done(run_id, call.id)
            case ApprovalRequested(tool_calls=calls):
                for call in calls:
                    client.decide_tool_call(run_id, call.id, approved=True)
    return called


SITUATIONS = [
    (call_is_open, ["turn_by"]),
    (waits_for_the_legs, ["walk_to", "turn_by"]),
    (patrol_goes_on, []),
    (waits_for_approval, ["walk_to", "turn_by"]),
]


@pytest.mark.parametrize(("begin", "later"), SITUATIONS)
def test_nothing_is_called_until_it_is_cleared_and_the_run_resumed(
    alice, carol, guard, begin, later
):
    run_id = begin(alice, carol)
    halt = guard.halt(HaltScope.CLIENT, "alice", "somebody stands there")
    shown = alice.get(run_id)
    stopped = [] if shown.state is RunState.SUSPENDED else confirm(alice, run_id)
    halted = alice.reached(run_id, RunState.SUSPENDED)
    for run in carol.list([RunState.WAITING_TOOL]):  # the way is free from here on
        if run.client == "carol":
            carol.done(run.id, "call-1")
    with pytest.raises(Halted):
        alice.resume(run_id)
    guard.clear_halt(halt.halt.id)
    stood = alice.get(run_id).sequence
    alice.resume(run_id)
    called = serve(alice, run_id, stood)
    run = alice.get(run_id)

    bodies = [event.body for event in alice.since(run_id, 0) if event.sequence <= stood]
    told = [body.tool_call_id for body in bodies if isinstance(body, CancelTool)]
    meanwhile = [
        event.body for event in alice.since(run_id, shown.sequence) if event.sequence <= stood
    ]
    assert (halt.runs_stopped, halt.recorded) == (1, True)
    assert told == stopped
    assert halted.error.reason == "HALTED"
    assert not any(isinstance(body, ToolCallsIssued) for body in meanwhile)
    assert called == later
    assert run.state is RunState.SUCCEEDED
    assert alice.status().holds == ()


@pytest.mark.parametrize("begin", [call_is_open, waits_for_the_legs, patrol_goes_on])
def test_a_halt_outlives_a_kill_and_nothing_moves_after_it(daemon, alice, carol, guard, begin):
    run_id = begin(alice, carol)
    halt = guard.halt(HaltScope.CLIENT, "alice")
    shown = alice.get(run_id).sequence
    daemon.stop(signal.SIGKILL)
    daemon.restart()
    run = alice.get(run_id)
    with pytest.raises(Halted) as refused:
        alice.begin([WALK])
    assert run.state in (RunState.SUSPENDED, RunState.OUTCOME_UNKNOWN)
    assert refused.value.metadata["halt_id"] == halt.halt.id
    if run.state is RunState.OUTCOME_UNKNOWN:
        after = [event.body for event in alice.since(run_id, min(shown, run.sequence))]
        assert not any(isinstance(body, ToolCallsIssued) for body in after)


def test_a_halt_of_a_tool_ends_the_run_that_would_call_it_and_no_other(alice, carol, guard):
    guard.halt(HaltScope.TOOL, "turn_by", "the hall is narrow")
    turns, walks = alice.begin([TURN]), carol.begin([WALK])
    run = alice.ended(turns)
    assert (run.state, run.error.reason) == (RunState.FAILED, "HALTED")
    assert carol.issued(walks, "walk_to").fence is not None


def test_the_real_model_calls_nothing_after_a_halt_whatever_it_chose(engine_store):
    """Two runs of the embedded model; a Halt of everything as soon as one has decided."""
    moving = tuple(tool for tool in robot_tools("quadruped") if tool.resources)[:2]
    with (
        running_daemon(engine_store, BASE_CONFIG) as daemon,
        Caller(daemon, "dogs") as dogs,
        Caller(daemon, "guard") as guard,
    ):
        goals = ("Stand up.", "Lie down.")
        runs = [dogs.create(goal, moving, max_output_tokens=32, durable=True).id for goal in goals]
        dogs.until(runs[0], StepFinished, lambda _step: True)
        guard.halt(HaltScope.ALL, reason="everybody stop")
        shown = {run_id: dogs.get(run_id).sequence for run_id in runs}
        for run_id in runs:
            if dogs.get(run_id).state is RunState.CANCELLING:
                confirm(dogs, run_id)
            assert not any(
                isinstance(event.body, ToolCallsIssued) and event.sequence > shown[run_id]
                for event in up_to_its_stop(dogs, run_id)
            )


def up_to_its_stop(client, run_id):
    """The events of a run, until it is suspended or has ended."""
    for event in client.watch(run_id, 0):
        yield event
        body = event.body
        if isinstance(body, StateChanged) and body.state is RunState.SUSPENDED:
            return
