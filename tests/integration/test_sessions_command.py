"""`edge-agent sessions`, and what `edge-agent run` says of a history that was shortened."""

import json

import pytest
import structlog

from edge_agent.cli.main import main
from edge_agent.cli.sessions import describe
from edge_agent.core import Message, Overflow, Role, Session, TextPart, ToolCall
from edge_agent.events import HistoryShortened
from tests.support.api_ports import EdgeThread

NOW_S = 1_000_000.0
HISTORY = (
    Message(Role.USER, (TextPart("In short: hello."),), is_summary=True),
    Message(Role.USER, (TextPart("Go"),)),
    Message(Role.ASSISTANT, (), (ToolCall("1/call-1", "move", '{"x":1}'),)),
    Message(Role.TOOL, (TextPart("ok"),), (), "1/call-1"),
    Message(Role.ASSISTANT, (TextPart("Gone"),)),
)
TOUR = Session("tour", "robot", Overflow.SUMMARISE, NOW_S - 90, NOW_S - 61, 3, HISTORY, "run-4")


@pytest.fixture(autouse=True)
def daemon_logs():
    """Where they would be in real life: not among what the command prints."""
    with structlog.testing.capture_logs() as lines:
        yield lines


@pytest.fixture
def edge(runtime_dir, monkeypatch):
    with EdgeThread(runtime_dir) as running:
        monkeypatch.setenv("EDGE_AGENT_SOCKET", running.api)
        running.runs.sessions.append(TOUR)
        yield running


def test_sessions_have_a_row_each():
    head, row = describe([TOUR], NOW_S)
    assert head.split("  ")[0] == "CLIENT"
    assert row.split() == ["robot", "tour", "3", "1m", "1s", "SUMMARISE", "run-4"]
    assert describe([], NOW_S) == ["no sessions"]


def test_all_clients_sessions_are_listed(edge, capfd):
    assert main(["sessions", "list"]) == 0
    assert "tour" in capfd.readouterr().out
    assert main(["sessions", "list", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)[0]["id"] == "tour"


def test_a_history_is_shown_turn_by_turn(edge, capfd):
    assert main(["sessions", "show", "robot", "tour"]) == 0
    assert [line.split(maxsplit=1) for line in capfd.readouterr().out.splitlines()] == [
        ["summary", "In short: hello."],
        ["user", "Go"],
        ["assistant", 'move {"x":1}'],
        ["tool", "ok"],
        ["assistant", "Gone"],
    ]


def test_a_session_is_deleted(edge, capfd):
    assert main(["sessions", "delete", "robot", "tour"]) == 0
    assert capfd.readouterr().out == "session tour of robot: deleted\n"
    assert edge.runs.sessions == []


def test_a_run_tells_what_made_room(runtime_dir, capfd):
    async def shorten(runs, run_id):
        runs.emit(run_id, HistoryShortened(1, 2, 4, 6, "They spoke."))
        runs.finish(run_id, "Yes.")

    with EdgeThread(runtime_dir, shorten) as edge:
        assert main(["run", "Go", "--socket", edge.api]) == 0
    assert "history: 2 messages dropped, 4 summed up" in capfd.readouterr().err
