"""`edge-agent runs`, and durable runs at `edge-agent run`: what they print and do."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import structlog

from edge_agent.cli.main import main
from edge_agent.cli.runs import describe
from edge_agent.client import Client
from edge_agent.core import (
    Executor,
    Message,
    Role,
    Run,
    RunError,
    RunState,
    SideEffect,
    TextPart,
    ToolCall,
    ToolResult,
    ToolStrategy,
)
from edge_agent.events import (
    ApprovalDecided,
    ApprovalRequested,
    DaemonToolStarted,
    Event,
    MessagesAdded,
    StateChanged,
    ToolResultAccepted,
)
from tests.support import api_ports
from tests.support.api_ports import EdgeThread

ORDER = ToolCall("call-1", "order_part", '{"part":"bolt"}')
RESTARTED = RunError("DAEMON_RESTARTED", "the daemon was restarted; ResumeRun lets the run go on")
NOW_S = 1_000_000.0


def message(text):
    return Message(Role.USER, (TextPart(text),))


def stored(number, state, **fields):
    return Run(
        f"{number}" * 32, "", "warehouse-robot-seven", "", "small", state, NOW_S - 61, **fields
    )


async def suspend(runs, run_id):
    runs.emit(run_id, StateChanged(RunState.SUSPENDED, cause=RESTARTED))


async def wait_for_approval(runs, run_id):
    runs.emit(run_id, ApprovalRequested(1, (ORDER,)))


async def everything_waits(runs, run_id):
    """A run that is suspended, then asks, then has the daemon act."""
    await suspend(runs, run_id)
    runs.emit(run_id, MessagesAdded((message("The door is open."),)))
    await wait_for_approval(runs, run_id)
    runs.emit(run_id, ApprovalDecided("call-1", True, "boss", "cheap"))
    runs.emit(run_id, DaemonToolStarted(1, ORDER))
    runs.emit(run_id, ToolResultAccepted(ToolResult("call-1", (TextPart("ordered"),))))
    runs.finish(run_id, "Ordered.")


async def answer(runs, run_id):
    runs.finish(run_id, "Yes.")


@pytest.fixture(autouse=True)
def daemon_logs():
    """Where they would be in real life: not among what the command prints."""
    with structlog.testing.capture_logs() as lines:
        yield lines


@pytest.fixture
def suspended(runtime_dir, monkeypatch):
    """A daemon with one suspended run of another client's."""
    with EdgeThread(runtime_dir, suspend) as edge, Client(edge.api) as client:
        monkeypatch.setenv("EDGE_AGENT_SOCKET", edge.api)
        client.create("Open the door.")
        edge.until(lambda: edge.runs.run("run-1").state is RunState.SUSPENDED)
        yield edge


def events(edge) -> list[Event]:
    with Client(edge.api) as client:
        client.cancel("run-1")
        return list(client.watch("run-1", 0))


def test_a_waiting_run_says_what_it_waits_for_and_which_command_helps(runtime_dir, capfd):
    with EdgeThread(runtime_dir, everything_waits) as edge:
        assert main(["run", "Order a bolt.", "--socket", edge.api]) == 0
    out, err = capfd.readouterr()
    assert out == "Ordered.\n"
    assert err.splitlines()[:-1] == [
        f"!! suspended: {RESTARTED.message}",
        "   edge-agent runs resume run-1",
        "   said: The door is open.",
        '?? order_part {"part":"bolt"} waits for approval:',
        "   edge-agent runs approve run-1 call-1",
        "   edge-agent runs deny run-1 call-1",
        "   approved by boss: cheap",
        '-> order_part {"part":"bolt"} (executed by the daemon)',
        "<- ordered",
    ]


@pytest.mark.parametrize("durable", [True, False])
def test_only_a_durable_run_is_said_to_be_kept_when_the_daemon_goes_away(runtime_dir, durable):
    with EdgeThread(runtime_dir, wait_for_approval) as edge:
        words = ["run", "Order!", "--socket", edge.api, *(["--durable"] if durable else [])]
        command = [sys.executable, "-m", "edge_agent.cli.main", *words]
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert child.stderr is not None
        assert child.stderr.readline().startswith("?? order_part")
    with child:
        _, err = child.communicate(timeout=20)
    assert child.returncode == 1
    assert "error: " in err
    kept = "the run is kept: `edge-agent runs list` shows it once the daemon is back\n"
    assert (kept in err) is durable


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize(
    ("words", "asked"), [("--durable", True), ("--no-durable", False), ("", None)]
)
def test_a_run_says_whether_it_is_durable_or_leaves_it_to_the_daemon(
    runtime_dir, monkeypatch, default, words, asked
):
    monkeypatch.setattr(api_ports, "LIMITS", replace(api_ports.LIMITS, durable=default))
    with EdgeThread(runtime_dir, answer) as edge:
        assert main(["run", "hi", "--socket", edge.api, *words.split()]) == 0
        assert edge.runs.specs["run-1"].durable is (default if asked is None else asked)


def test_a_tools_file_says_what_a_call_leaves_behind_and_who_executes_it(runtime_dir, tmp_path):
    path = tmp_path / "tools.yaml"
    path.write_text(
        "- {name: lamp, side_effect: IDEMPOTENT, needs_approval: true, result: ok}\n"
        "- {name: arm, resources: [arm, gripper], verify: look}\n"
        "- {name: look, side_effect: NONE}\n"
    )
    with EdgeThread(runtime_dir, answer) as edge:
        assert main(["run", "hi", "--socket", edge.api, "--tools", str(path)]) == 0
        lamp, arm, _look = edge.runs.specs["run-1"].tools
    assert (lamp.side_effect, lamp.needs_approval) == (SideEffect.IDEMPOTENT, True)
    assert (arm.side_effect, arm.needs_approval) == (SideEffect.NON_IDEMPOTENT, False)
    assert arm.executor is Executor.CALLER
    assert (arm.resources, arm.verify) == (("arm", "gripper"), "look")


@pytest.mark.parametrize(
    ("words", "strategy"),
    [("", None), ("--tool-strategy ranked_full", ToolStrategy.RANKED_FULL)],
)
def test_how_tools_are_chosen_is_the_callers_to_say(runtime_dir, words, strategy):
    with EdgeThread(runtime_dir, answer) as edge:
        assert main(["run", "hi", "--socket", edge.api, *words.split()]) == 0
        assert edge.runs.specs["run-1"].tool_strategy is strategy


def test_what_the_daemon_defines_is_not_defined_in_a_tools_file(tmp_path, capfd):
    path = tmp_path / "tools.yaml"
    path.write_text(
        "- {name: clock, executor: DAEMON, description: mine, side_effect: NONE}\n"
        "- {name: lamp, executor: daemon, side_effect: some, needs_approval: 1}\n"
    )
    assert main(["run", "hi", "--tools", str(path)]) == 1
    assert capfd.readouterr().err.splitlines() == [
        f"error: {path}: 5 errors in the tools",
        "  [0].description: the daemon has its own for this tool",
        "  [0].side_effect: the daemon has its own for this tool",
        "  [1].executor: must be CALLER or DAEMON",
        "  [1].side_effect: must be NONE, IDEMPOTENT or NON_IDEMPOTENT",
        "  [1].needs_approval: must be true or false",
    ]


def test_runs_are_a_table_that_fits_with_the_reasons_below():
    runs = (
        stored(1, RunState.WAITING_APPROVAL, steps=1, unapproved_tool_calls=(ORDER,)),
        stored(2, RunState.SUSPENDED, steps=2, error=RESTARTED, open_tool_calls=(ORDER,)),
        stored(3, RunState.SUCCEEDED, steps=3, answer="Yes."),
    )
    lines = describe(runs, NOW_S, 80)
    assert lines == [
        "RUN                               STATE             STEPS  AGE    CLIENT",
        "11111111111111111111111111111111  WAITING_APPROVAL  1      1m 1s  warehouse-rob…",
        '  call-1 waits for approval: order_part {"part":"bolt"}',
        "22222222222222222222222222222222  SUSPENDED         2      1m 1s  warehouse-rob…",
        '  call-1 waits for its result: order_part {"part":"bolt"}',
        "  DAEMON_RESTARTED: the daemon was restarted; ResumeRun lets the run go on",
        "33333333333333333333333333333333  SUCCEEDED         3      1m 1s  warehouse-rob…",
    ]
    assert all(len(line) <= 80 for line in lines)
    assert describe(runs, NOW_S, 200)[1].endswith("  warehouse-robot-seven")


def test_runs_are_listed_for_people_and_programs(suspended, capfd):
    assert main(["runs", "list"]) == 0
    assert main(["runs", "list", "--state", "suspended", "--json"]) == 0
    assert main(["runs", "list", "--state", "FAILED", "--state", "CANCELLED"]) == 0
    _head, row, programs, none = capfd.readouterr().out.splitlines()
    assert row.split()[:2] == ["run-1", "SUSPENDED"]
    assert [run["id"] for run in json.loads(programs)] == ["run-1"]
    assert none == "no runs"


def test_a_state_that_does_not_exist_is_wrong_usage_and_names_those_that_do(capfd):
    with pytest.raises(SystemExit) as caught:
        main(["runs", "list", "--state", "sleeping"])
    assert caught.value.code == 2
    assert "'sleeping' is no state: QUEUED, LOADING" in capfd.readouterr().err


def test_resume_lets_a_run_go_on_with_what_is_said(suspended, capfd):
    assert main(["runs", "resume", "run-1", "--say", "It is open."]) == 0
    assert capfd.readouterr().out == "run run-1: QUEUED\n"
    assert main(["runs", "resume", "run-1"]) == 1
    err = capfd.readouterr().err
    assert "hint: `edge-agent runs list --state SUSPENDED` shows which are" in err
    assert MessagesAdded((message("It is open."),)) in [event.body for event in events(suspended)]


def test_cancel_ends_a_run(suspended, capfd):
    assert main(["runs", "cancel", "run-1"]) == 0
    assert capfd.readouterr().out == "run run-1: CANCELLED\n"
    assert suspended.runs.run("run-1").state is RunState.CANCELLED
    assert main(["runs", "cancel", "run-2", "--json"]) == 1
    assert json.loads(capfd.readouterr().err)["error"]["message"] == "no run run-2"


@pytest.mark.parametrize(("word", "approved"), [("approve", True), ("deny", False)])
def test_a_call_is_decided_on_the_admin_socket(suspended, capfd, word, approved):
    assert main(["runs", word, "run-1", "call-1", "--reason", "I say so"]) == 0
    assert capfd.readouterr().out == "run run-1: SUSPENDED\n"
    decided = [e.body for e in events(suspended) if isinstance(e.body, ApprovalDecided)]
    assert [(each.approved, each.reason) for each in decided] == [(approved, "I say so")]


def test_another_clients_call_is_not_decided_on_the_api_socket(suspended, capfd):
    assert main(["runs", "approve", "run-1", "call-1", "--socket", suspended.api]) == 1
    assert "hint: call admin.sock: --socket admin" in capfd.readouterr().err
