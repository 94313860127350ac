"""`edge-agent trace`: a run's steps and tool calls as a timeline, over a restart too."""

import json

import pytest
import structlog

from edge_agent.cli.main import main
from edge_agent.cli.trace import describe
from edge_agent.client import Client
from edge_agent.core import Executor, Run, RunError, RunState, SideEffect, Tool, Usage
from edge_agent.events import ApprovalRequested
from edge_agent.records import CallRecord, Effect, ResultClass, StepRecord
from tests.support.api_ports import EdgeThread
from tests.support.daemon import BASE_CONFIG, ENGINE, running_daemon

CONFIG = f"""{BASE_CONFIG}preload: [{ENGINE}]
tools:
  allow:
    clock: {{builtin: clock, side_effect: NONE, needs_approval: true}}
    device_status: {{builtin: device_status, side_effect: NONE, needs_approval: true}}
"""
TOOLS = [Tool(name, "", "", executor=Executor.DAEMON) for name in ("clock", "device_status")]
GONE = "the run itself is not kept any more; these are its records"
STARTED_S = 1000.0


def step(number, at_s, finish, **fields):
    return StepRecord(
        run_id="r",
        step=number,
        parent=None,
        started_at_s=at_s,
        duration_s=1.2344,
        route="LOCAL",
        engine="small",
        engine_digest="d",
        template_hash="t",
        tools_hash="h",
        seed=None,
        finish=finish,
        **{"attempt": 1, "usage": Usage(1428, 1419, 12, 0.05, 2.5, 1.0, 280.4), **fields},
    )


def call(number, at_s, effect, **fields):
    return CallRecord(
        run_id="r",
        step=1,
        call_id=f"call-{number}",
        tool="fetch_part",
        executor=Executor.CALLER,
        side_effect=SideEffect.NON_IDEMPOTENT,
        arguments_hash="a",
        effect=effect,
        issued_at_s=at_s,
        **fields,
    )


STEPS = (
    step(1, STARTED_S + 0.004, "TOOL_CALLS", body='{"role":"ASSISTANT"}'),
    step(2, STARTED_S + 9.5, "DAEMON_STOPPING", usage=Usage()),
    step(2, STARTED_S + 3600, "STOP", attempt=2),
)
CALLS = (
    call(
        1,
        STARTED_S + 2,
        Effect.FAILED,
        ended_at_s=STARTED_S + 2.5,
        result_class=ResultClass.TIMEOUT,
        result_bytes=12,
        body="late",
    ),
    call(2, STARTED_S + 3, Effect.INTENDED),
)
ENDED = Run(
    "5" * 32,
    "",
    "robot",
    "",
    "small",
    RunState.FAILED,
    STARTED_S,
    steps=1,
    error=RunError("RUN_TIMEOUT", "the run did not end within its timeout of 3600 s, it says"),
)


@pytest.fixture(autouse=True)
def daemon_logs():
    """Where they would be in real life: not among what the command prints."""
    with structlog.testing.capture_logs() as lines:
        yield lines


def test_a_timeline_tells_what_happened_when_within_the_width_of_a_terminal():
    lines = describe(ENDED, STEPS, CALLS, 80)
    assert lines == [
        "run 55555555555555555555555555555555: FAILED",
        "  of robot, 1 step on small",
        "  RUN_TIMEOUT: the run did not end within its timeout of 3600 s, it says",
        "AT          TOOK    QUEUE  LOAD    TTFT   TOKENS   CACHED  WHAT",
        "+0.004s     1234ms  50ms   2500ms  280ms  1428+12  1419    step 1: TOOL_CALLS",
        "+2.000s     500ms                                          fetch_part call-1:",
        "                                                             FAILED TIMEOUT, 12",
        "                                                             bytes",
        "+3.000s     -                                              fetch_part call-2:",
        "                                                             INTENDED",
        "+9.500s     1234ms  0ms    0ms     -      0+0      0       step 2:",
        "                                                             DAEMON_STOPPING",
        "+3600.000s  1234ms  50ms   2500ms  280ms  1428+12  1419    step 2 attempt 2:",
        "                                                             STOP",
        'step 1: {"role":"ASSISTANT"}',
        "call-1: late",
    ]
    assert all(len(line) <= 80 for line in lines)


def test_records_outlive_their_run_and_count_from_the_first():
    lines = describe(None, (STEPS[1],), (CALLS[0],), 120)
    assert lines[0] == GONE
    assert [line.split()[0] for line in lines[2:4]] == ["+0.000s", "+7.500s"]


def test_a_run_of_which_nothing_is_on_record_says_so(runtime_dir, capfd):
    with EdgeThread(runtime_dir) as edge, Client(edge.api) as client:
        run_id = client.create("Hello").id
        assert main(["trace", run_id, "--socket", edge.api]) == 0
        assert main(["trace", "nobody", "--socket", edge.api]) == 1
    out, err = capfd.readouterr()
    assert out.splitlines()[-1] == "nothing is on record"
    assert err == "error: no run nobody\n"


def asked_for_the_time(client: Client, *, durable: bool) -> str:
    """A run that waits for the approval of its call of the clock."""
    run = client.create(
        "Call the tool clock.", TOOLS, max_tool_calls=1, max_output_tokens=20, durable=durable
    )
    asked = (event.body for event in client.watch(run.id, 0))
    assert any(isinstance(body, ApprovalRequested) for body in asked)
    return run.id


def ended(client: Client, run_id: str) -> None:
    for _event in client.watch(run_id, 0):
        pass


def test_a_runs_steps_and_calls_are_shown_and_stay_over_a_restart(engine_store, capfd):
    with running_daemon(engine_store, CONFIG) as daemon:
        socket, admin = str(daemon.api_socket), str(daemon.admin_socket)
        with Client(socket, name="robot") as client:
            kept, passing = (
                asked_for_the_time(client, durable=durable) for durable in (True, False)
            )
            assert main(["runs", "approve", kept, "call-1", "--socket", admin]) == 0
            assert main(["runs", "deny", passing, "call-1", "--socket", admin]) == 0
            ended(client, kept)
            ended(client, passing)
        capfd.readouterr()
        assert main(["trace", kept, "--socket", socket]) == 0
        before = capfd.readouterr().out
        assert main(["trace", passing, "--socket", socket, "--json"]) == 0
        denied = json.loads(capfd.readouterr().out)
        daemon.stop()
        daemon.restart()
        assert main(["trace", kept, "--socket", socket]) == 0
        assert capfd.readouterr().out == before
        assert main(["trace", passing, "--socket", socket]) == 0
        assert capfd.readouterr().out.splitlines()[0] == GONE
        assert main(["runs", "cancel", passing, "--socket", socket]) == 1
        assert "hint: `edge-agent runs list` shows which there are" in capfd.readouterr().err
    told = " ".join(before.split())
    assert f"run {kept}: SUCCEEDED of robot, 2 steps on {ENGINE}" in told
    assert "step 1: TOOL_CALLS" in told
    assert "clock call-1: DONE OK, " in told
    assert denied["tool_calls"][0]["result_class"] == "DENIED"
    assert [each["step"] for each in denied["steps"]] == [1, 2]


def test_without_a_run_the_newest_is_traced(runtime_dir, capfd):
    with EdgeThread(runtime_dir) as edge, Client(edge.api) as client:
        assert main(["trace", "--socket", edge.api]) == 1
        client.create("Hello")
        newest = client.create("Hello again").id
        assert main(["trace", "--socket", edge.api]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines()[0] == f"run {newest}: QUEUED"
    assert "error: there are no runs\n" in err
