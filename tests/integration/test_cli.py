"""The command line against the real API: what it prints, and its exit codes."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import structlog

from edge_agent import __version__
from edge_agent.cli.explain import describe
from edge_agent.cli.main import COMMANDS, main
from edge_agent.cli.status import engine_lines
from edge_agent.client import Client
from edge_agent.core import (
    EngineState,
    FinishReason,
    Message,
    Priority,
    Role,
    RunError,
    RunState,
    TextPart,
    ToolCall,
    Usage,
)
from edge_agent.events import CancelTool, StateChanged, StepFinished, TextDelta
from edge_agent.status import StepWait, WaitReason
from tests.support.api_ports import EdgeThread, MemoryDaemon, MemoryEngines, MemoryRuns

TOOLS = """
- name: lamp
  description: Switches the lamp.
  input_schema: {type: object, properties: {"on": {type: boolean}}}
  examples: [{goal: Light!, arguments: {"on": true}, result: ok}]
  result: It is on.
"""


async def light(runs, run_id):
    """An agent that switches the lamp, then says so."""
    runs.issue(run_id, ToolCall("c1", "lamp", '{"on":true}'))
    await runs.until(lambda: runs.results)
    for word in ("The lamp ", "is on."):
        runs.emit(run_id, TextDelta(2, word, 2))
    runs.finish(run_id, "The lamp is on.", Usage(12, 0, 4, decode_s=0.5, ttft_ms=20.0))


async def talk(runs, run_id):
    for progress in (0.0, 0.5, 1.0):
        runs.emit(run_id, StateChanged(RunState.LOADING, progress))
    runs.emit(run_id, StateChanged(RunState.RUNNING))
    runs.emit(run_id, TextDelta(1, "Paris", 1))
    runs.finish(run_id, "Paris")


async def wait_for_ever(_runs, _run_id):
    """An agent that never gets a step."""


async def fail(runs, run_id):
    await runs.cancel(run_id, RunError("WORKER_LOST", "the worker is gone", retryable=True))


@pytest.fixture(autouse=True)
def daemon_logs():
    """Where they would be in real life: not among what the command prints."""
    with structlog.testing.capture_logs() as lines:
        yield lines


@pytest.fixture
def tools(tmp_path):
    path = tmp_path / "tools.yaml"
    path.write_text(TOOLS)
    return str(path)


def test_run_streams_the_answer_to_stdout_and_the_rest_to_stderr(runtime_dir, tools, capfd):
    with EdgeThread(runtime_dir, light) as edge:
        code = main(["run", "Light!", "--tools", tools, "--socket", edge.api, "--timeout", "30s"])
        spec = edge.runs.specs["run-1"]
    out, err = capfd.readouterr()
    assert (code, out) == (0, "The lamp is on.\n")
    assert '-> lamp {"on":true}\n<- It is on.\n' in err
    assert "4 tokens in 0 steps, 8.0 tokens/s, first token after 20 ms" in err
    assert (spec.timeout_s, spec.agent) == (30.0, "edge-agent run")
    assert spec.tools[0].examples[0].arguments_json == '{"on": true}'


def test_loading_is_remarked_once_where_nobody_watches(runtime_dir, capfd):
    with EdgeThread(runtime_dir, talk) as edge:
        assert main(["run", "hi", "--socket", edge.api]) == 0
    out, err = capfd.readouterr()
    assert out == "Paris\n"
    assert err.splitlines()[0] == "loading the engine"
    assert err.count("loading") == 1


def test_run_without_streaming_prints_the_answer_alone(runtime_dir, capfd):
    with EdgeThread(runtime_dir, talk) as edge:
        assert main(["run", "hi", "--socket", edge.api, "--no-stream"]) == 0
    out, err = capfd.readouterr()
    assert (out, "tokens" in err) == ("Paris\n", False)


def test_run_as_json_prints_one_event_a_line(runtime_dir, tools, capfd):
    with EdgeThread(runtime_dir, light) as edge:
        assert main(["run", "hi", "--tools", tools, "--socket", edge.api, "--json"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["type"] for line in lines][:2] == ["Snapshot", "ToolCallsIssued"]
    assert lines[-1]["body"]["run"]["answer"] == "The lamp is on."


def test_run_as_json_without_streaming_prints_the_run(runtime_dir, capfd):
    with EdgeThread(runtime_dir, talk) as edge:
        assert main(["run", "hi", "--socket", edge.api, "--json", "--no-stream"]) == 0
    assert json.loads(capfd.readouterr().out)["answer"] == "Paris"


def test_a_run_that_fails_exits_1_and_says_what_to_do(runtime_dir, capfd):
    with EdgeThread(runtime_dir, fail) as edge:
        assert main(["run", "hi", "--socket", edge.api]) == 1
    err = capfd.readouterr().err
    assert "error: the run ended CANCELLED: the worker is gone" in err
    assert "hint: try again" in err


def test_a_tool_without_a_result_and_nobody_to_ask_is_an_error_result(
    runtime_dir, tmp_path, monkeypatch
):
    path = tmp_path / "tools.yaml"
    path.write_text("- {name: lamp, description: d}\n")
    with Path(os.devnull).open() as nobody, EdgeThread(runtime_dir, light) as edge:
        monkeypatch.setattr(sys, "stdin", nobody)
        assert main(["run", "hi", "--tools", str(path), "--socket", edge.api]) == 0
        (result,) = edge.runs.results
    assert result.is_error
    assert "nobody is at the terminal" in result.parts[0].text


def test_a_person_at_the_terminal_is_the_tool(runtime_dir, tmp_path):
    path = tmp_path / "tools.yaml"
    path.write_text("- {name: lamp, description: d}\n")
    ours, theirs = os.openpty()
    with EdgeThread(runtime_dir, light) as edge, os.fdopen(ours, "r+b", buffering=0) as terminal:
        command = [sys.executable, "-m", "edge_agent.cli.main", "run", "hi", "--tools", str(path)]
        child = subprocess.Popen(
            [*command, "--socket", edge.api],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        os.close(theirs)
        with child:
            asked = b""
            assert child.stderr is not None
            while not asked.endswith(b"returns: "):
                asked += child.stderr.read(1)
            terminal.write(b"bright\n")
            out, _ = child.communicate(timeout=20)
        (result,) = edge.runs.results
    assert b'lamp({"on": true}) returns: ' in asked
    assert (child.returncode, out) == (0, b"The lamp is on.\n")
    assert (result.parts[0].text, result.is_error) == ("bright", False)


def test_lines_without_a_goal_are_one_conversation(runtime_dir, tmp_path, capfd, monkeypatch):
    async def answer(runs, run_id):
        message = Message(Role.ASSISTANT, (TextPart(f"{run_id} says"),))
        runs.emit(run_id, StepFinished(1, message, Usage(), FinishReason.STOP))
        runs.finish(run_id, f"{run_id} says", transcript=(message,))

    (tmp_path / "lines").write_text("first\n\nsecond\n")
    with (tmp_path / "lines").open() as lines, EdgeThread(runtime_dir, answer) as edge:
        monkeypatch.setattr(sys, "stdin", lines)
        assert main(["run", "--socket", edge.api]) == 0
        said = [message.text for message in edge.runs.specs["run-2"].messages]
    assert said == ["first", "run-1 says", "second"]
    assert capfd.readouterr().out == "run-1 says\nrun-2 says\n"


def test_a_failed_run_is_no_part_of_the_conversation(runtime_dir, tmp_path, capfd, monkeypatch):
    (tmp_path / "lines").write_text("first\nsecond\n")
    with (tmp_path / "lines").open() as lines, EdgeThread(runtime_dir, fail) as edge:
        monkeypatch.setattr(sys, "stdin", lines)
        assert main(["run", "--socket", edge.api]) == 1
        said = [message.text for message in edge.runs.specs["run-2"].messages]
    assert said == ["second"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("edge-agent", "che"), "check-config"),
        (("edge-agent", "run", "--eng"), "--engine"),
        (("edge-agent", "engines", "ver"), "verify"),
        (("edge-agent", "engines", "unp"), "unpin"),
        (("edge-agent", "exp"), "explain"),
        (("edge-agent", "run", "--dur"), "--durable"),
        (("edge-agent", "runs", "app"), "approve"),
        (("edge-agent", "runs", "li"), "list"),
        (("edge-agent", "tra"), "trace"),
    ],
)
def test_the_completion_script_completes_in_bash(words, expected, capfd):
    assert main(["completion", "bash"]) == 0
    script = capfd.readouterr().out
    ask = (
        f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
        '_shtab_edge_agent; echo "${COMPREPLY[@]}"'
    )
    command = ["bash", "-c", f"{script}\n{ask}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected]


def test_ctrl_c_cancels_the_run_and_exits_130(runtime_dir):
    async def wait(runs, run_id):
        runs.emit(run_id, CancelTool("none", RunError("R", "now")))

    with EdgeThread(runtime_dir, wait) as edge:
        command = [sys.executable, "-m", "edge_agent.cli.main", "run", "hi", "--socket", edge.api]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
            assert child.stderr is not None
            assert child.stderr.readline() == "!! stop none: now\n"
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=20)
        edge.until(lambda: edge.runs.run("run-1").state.ended)
    assert child.returncode == 130
    assert "Traceback" not in err


def test_every_error_in_a_tools_file_is_named(tmp_path, capfd):
    path = tmp_path / "tools.yaml"
    path.write_text(
        "- {nme: lamp, result: 3}\n- 7\n- {name: a, examples: [{goal: 1, x: 2}]}\n"
        "- {name: b, input_schema: {properties: {on: {}}}}\n"
    )
    assert main(["run", "hi", "--tools", str(path)]) == 1
    err = capfd.readouterr().err
    for line in (
        "[0].name: is missing",
        "[0].nme: unknown key, did you mean name?",
        "[0].result: must be a text",
        "[1]: must be a mapping",
        "[2].examples[0].goal: must be a text",
        "[2].examples[0].x: unknown key, known: goal, arguments, result",
        "[3].input_schema.properties: the key true is no text: put the key in quotes",
    ):
        assert line in err


def test_status_for_people_and_programs(runtime_dir, capfd):
    with EdgeThread(runtime_dir) as edge:
        assert main(["halt", "tool", "arm", "--reason", "person near", "--socket", edge.api]) == 0
        capfd.readouterr()
        assert main(["status", "--socket", edge.api]) == 0
        people = capfd.readouterr().out
        assert main(["status", "--socket", edge.api, "--json"]) == 0
        programs = json.loads(capfd.readouterr().out)
    assert "daemon   READY  pid 4711, up 12s, version 9.8.7" in people
    assert "runs     1 QUEUED" in people
    assert "steps    3 running, 2 waiting: `edge-agent explain` says why" in people
    assert "memory   NORMAL  8.0 GiB: robot 3.0 GiB, engines 1.0 GiB, room for 4.0 GiB\n" in people
    assert "halt     halt-1 TOOL arm person near" in people
    assert "small  INSTALLED  2 MiB" in people
    assert programs["status"]["pid"] == 4711
    assert programs["status"]["memory"]["room_bytes"] == 4 << 30
    assert programs["engines"][0]["name"] == "small"


def test_what_is_wrong_with_an_engine_is_told_with_what_to_do():
    status = MemoryDaemon(MemoryRuns()).status()
    (engine,) = MemoryEngines().engines()
    engines = [
        dataclasses.replace(engine, name="kept", state=EngineState.READY, pinned=True),
        dataclasses.replace(engine, name="wild", quarantined=True),
        dataclasses.replace(engine, name="lost", state=EngineState.LEAKED, leaked_bytes=3 << 30),
    ]
    _, _, kept, wild, lost, *notes = engine_lines(status, engines)
    assert kept.split()[:3] == ["kept", "READY", "pinned"]
    assert wild.split()[:2] == ["wild", "QUARANTINED"]
    assert lost.split()[:2] == ["lost", "LEAKED"]
    assert [note.split("; ") for note in notes] == [
        [
            "  wild: two boots ended inside its load",
            "`edge-agent engines release wild` lets it load again",
        ],
        [
            "  lost: 3.0 GiB did not come back when it left",
            "`edge-agent engines release lost` forgets that",
        ],
    ]


WAITS = (
    StepWait(
        run_id="5" * 32,
        client="a-robot-with-a-name-of-many-words",
        engine="smollm2-135m-instruct",
        priority=Priority.INTERACTIVE,
        waited_s=3.24,
        reason=WaitReason.PLACE,
        text="all 4 places of smollm2-135m-instruct are taken",
        engines=("smollm2-135m-instruct",),
        position=1,
        starts_in_s=1.04,
        deadline_in_s=125.0,
    ),
    StepWait(
        run_id="",
        client="edge-agent",
        engine="big",
        priority=Priority.BATCH,
        waited_s=61.0,
        reason=WaitReason.ROOM,
        text="too little memory",
        engines=(),
        position=1,
    ),
)


def test_waiting_steps_are_a_table_that_fits():
    assert describe(WAITS, 80) == [
        "WHO              ENGINE                 PRIORITY     WAITED  STARTS IN  DUE IN",
        "a-robot-with-a…  smollm2-135m-instruct  INTERACTIVE  3.2s    1.0s       2m 5s",
        "  run 55555555555555555555555555555555, PLACE: all 4 places of",
        "    smollm2-135m-instruct are taken",
        "edge-agent       big                    BATCH        1m 1s   unknown    none",
        "  a load, ROOM: too little memory",
    ]
    assert all(len(line) <= 80 for line in describe(WAITS, 80))
    wide = describe(WAITS, 200)
    assert wide[1].startswith("a-robot-with-a-name-of-many-words  smollm2-135m-instruct  ")


def test_explain_for_people_and_programs(runtime_dir, capfd):
    with EdgeThread(runtime_dir, wait_for_ever) as edge:
        socket = ["--socket", edge.api]
        assert main(["explain", *socket]) == 0
        edge.engines.waits = WAITS
        assert main(["explain", *socket]) == 0
        assert main(["explain", "5" * 32, *socket, "--json"]) == 0
        *people, programs = capfd.readouterr().out.splitlines()
        assert main(["explain", "nobody", *socket]) == 1
        assert "no run nobody" in capfd.readouterr().err
        with Client(edge.api) as client:
            run_id = client.create("Hi").id
        assert main(["explain", run_id, *socket]) == 0
    assert people[0] == "nothing waits"
    assert people[1].split()[:2] == ["WHO", "ENGINE"]
    (told,) = json.loads(programs)["waits"]
    assert (told["reason"], told["starts_in_s"]) == ("PLACE", 1.04)
    assert capfd.readouterr().out == "nothing of it waits: the run is QUEUED\n"


@pytest.mark.parametrize("priority", Priority)
def test_a_run_says_how_soon_it_is_to_go(runtime_dir, priority):
    with EdgeThread(runtime_dir, talk) as edge:
        words = ["run", "hi", "--socket", edge.api, "--priority", priority.lower()]
        assert main(words) == 0
        assert edge.runs.specs["run-1"].priority is priority


def test_pin_unpin_and_release_call_the_admin_socket_by_themselves(runtime_dir, capfd, monkeypatch):
    with EdgeThread(runtime_dir) as edge:
        monkeypatch.setenv("EDGE_AGENT_SOCKET", edge.api)
        assert main(["engines", "pin", "small"]) == 0
        assert edge.engines.engine("small").pinned
        assert main(["engines", "unpin", "small", "--json"]) == 0
        assert not edge.engines.engine("small").pinned
        assert main(["engines", "release", "small"]) == 0
        out = capfd.readouterr().out.splitlines()
        assert main(["engines", "pin", "small", "--socket", "api"]) == 1
        assert main(["engines", "release", "nobody"]) == 1
    assert out[0] == "small: pinned: once loaded it stays in memory"
    assert json.loads(out[1])["pinned"] is False
    assert out[2] == "small: nothing is held against it; it is INSTALLED"
    err = capfd.readouterr().err
    assert "hint: call admin.sock: --socket admin" in err
    assert "no engine nobody" in err


def test_halt_list_and_clear(runtime_dir, capfd, monkeypatch):
    with EdgeThread(runtime_dir) as edge:
        monkeypatch.setenv("EDGE_AGENT_SOCKET", edge.api)
        assert main(["halt", "list"]) == 0
        assert main(["halt", "all", "--reason", "fire"]) == 0
        assert main(["halt", "list", "--json"]) == 0
        out = capfd.readouterr().out.splitlines()
        assert main(["halt", "clear", "halt-1"]) == 1
        refusal = capfd.readouterr().err
        assert main(["halt", "clear", "halt-1", "--socket", "admin"]) == 0
        assert edge.runs.halts() == ()
    assert out[0] == "nothing is halted"
    assert out[1].startswith("halted: halt-1  all  by edge-agent-cli at ")
    assert json.loads(out[2])[0]["scope"] == "ALL"
    assert "hint: call admin.sock: --socket admin" in refusal


def test_no_daemon_is_an_error_with_a_hint(runtime_dir, capfd):
    path = str(runtime_dir / "api.sock")
    assert main(["status", "--socket", path]) == 1
    assert capfd.readouterr().err == (
        f"error: no daemon answers at {path}\n"
        "hint: start it with `edge-agent serve`, or name its socket with --socket\n"
    )
    assert main(["status", "--socket", path, "--json"]) == 1
    assert json.loads(capfd.readouterr().err)["error"]["reason"] == "DAEMON_UNREACHABLE"


def test_check_config(tmp_path, capfd):
    path = tmp_path / "config.yaml"
    path.write_text("runs: {max_stepz: 1, timeout: 5}\n")
    assert main(["check-config", str(path)]) == 1
    err = capfd.readouterr().err
    assert "runs.max_stepz" in err
    assert "runs.timeout" in err
    assert main(["check-config", str(path), "--json"]) == 1
    report = json.loads(capfd.readouterr().out)
    assert {error["field"] for error in report["errors"]} == {"runs.max_stepz", "runs.timeout"}
    path.write_text("runs: {timeout: 5s}\n")
    assert main(["check-config", str(path)]) == 0
    assert capfd.readouterr().out == f"{path}: no errors\n"


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["completion", "fish"], ["halt", "tool"], ["run", "x", "-z"]]
)
def test_wrong_usage_exits_2(arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_version(capfd):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capfd.readouterr().out == f"edge-agent {__version__}\n"


def test_help_names_every_command_and_each_has_an_example_and_json(capfd):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capfd.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"\n    {command}\s", listed)
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"example: edge-agent {command}" in capfd.readouterr().out


def test_help_does_not_wait_for_grpc():
    code = (
        "import sys; from edge_agent.cli import main\n"
        "main.build_parser([c for c in main.COMMANDS if c not in ('doctor', 'bench')])\n"
        "print([m for m in ('grpc', 'pydantic', 'google.protobuf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
