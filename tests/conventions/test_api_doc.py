"""docs/api.md says what the protos say, names every reason, and its examples work."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from google.protobuf import json_format

from edge_agent.v1 import run_service_pb2 as pb
from edge_agent.v1 import types_pb2
from tests.support.connection import Connection
from tests.support.daemon import DaemonProcess, running_daemon
from tests.support.reasons import reasons_in

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "api.md").read_text()
DATA: dict[str, Any] = yaml.safe_load((REPOSITORY / "docs" / "api.yaml").read_text())
CALL_TIMEOUT_S = 60
ENDLESS = ("WatchEngines", "WatchTelemetry")


def load_generator() -> ModuleType:
    """The script as a module."""
    path = REPOSITORY / "docs" / "generate_api.py"
    spec = importlib.util.spec_from_file_location("generate_api", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()
PROTOS = GENERATOR.read_protos()
CALLS = [
    f"{service.name}.{method.name}" for service in PROTOS.services for method in service.method
]
IN_CODE = reasons_in(REPOSITORY / "edge_agent")


def test_the_page_is_current() -> None:
    assert GENERATOR.page() == PAGE, "run `make docs`"


def test_every_call_is_described_and_none_that_is_not_there() -> None:
    assert list(DATA["rpcs"]) == CALLS


@pytest.mark.parametrize("name", CALLS)
def test_every_call_says_what_it_does(name: str) -> None:
    assert PROTOS.comments[name]


@pytest.mark.parametrize("name", sorted(PROTOS.enums))
def test_every_enumeration_and_value_has_a_comment(name: str) -> None:
    values = [value for value in PROTOS.enums[name].value if value.number]
    assert PROTOS.comments[name]
    assert [value.name for value in values if not PROTOS.comments[f"{name}.{value.name}"]] == []


def test_every_reason_of_the_code_is_in_the_table_and_no_other() -> None:
    """A new reason gets an entry in docs/api.yaml: what it means and what to do about it."""
    assert sorted(DATA["reasons"]) == sorted(IN_CODE)


@pytest.mark.parametrize("reason", sorted(DATA["reasons"]))
def test_a_reason_says_what_it_means_what_to_do_and_where_it_is_met(reason: str) -> None:
    about = DATA["reasons"][reason]
    assert about["means"].endswith(".")
    assert about["do"].endswith(".")
    assert about["where"]
    assert set(about["where"]) <= set(GENERATOR.WHERE)
    if "call" in about["where"]:
        assert "code" in about
    if IN_CODE.get(reason):
        assert about["code"] in IN_CODE[reason]


def test_calls_end_with_reasons_that_say_so() -> None:
    ends_calls = {reason for reason, about in DATA["reasons"].items() if "call" in about["where"]}
    named = {
        reason for about in DATA["rpcs"].values() for reason in GENERATOR.flat(about["errors"])
    }
    assert named <= ends_calls
    general = {kind for kinds in IN_CODE.values() for kind in kinds}  # named as their gRPC codes
    assert ends_calls - named - set(DATA["every_call"]) <= general | {"UNSUPPORTED"}


def test_options_that_the_page_names_exist() -> None:
    options = yaml.safe_load((REPOSITORY / "config.example.yaml").read_text())
    named = set(re.findall(r"`((?:runs|scheduling|worker)\.[a-z_]+)`", PAGE))
    assert named
    known = {
        f"{section}.{key}"
        for section in ("runs", "scheduling", "worker")
        for key in options[section]
    }
    assert named <= known


def test_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    anchors = [heading.lower().replace(" ", "-") for heading in headings]
    anchors += re.findall(r'<a id="([^"]+)">', PAGE)
    assert [anchor for anchor in anchors if anchors.count(anchor) > 1] == []
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= set(anchors)
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (REPOSITORY / "docs" / target).exists(), target


# --- the examples ---


@pytest.fixture(scope="module")
def daemon(engine_store: Path) -> Iterator[DaemonProcess]:
    with running_daemon(engine_store) as running:
        yield running


@pytest.fixture(scope="module")
def example_of() -> Mapping[str, str]:
    """The command of each call, as it stands in the page."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    named = [re.search(r"edge_agent\.v1\.(\w+)/(\w+)", block) for block in blocks]
    return {
        f"{found[1]}.{found[2]}": block for found, block in zip(named, blocks, strict=True) if found
    }


NEED_A_CALL = {
    f"RunService.{call}"
    for call in (
        "SubmitToolResults",
        "GetRun",
        "WatchRun",
        "CancelRun",
        "GetTrace",
        "AppendMessages",
        "ToolUpdate",
        "ResolveOutcome",
    )
}


def test_every_call_has_an_example(example_of: Mapping[str, str]) -> None:
    assert list(example_of) == CALLS


@pytest.mark.timeout(2 * CALL_TIMEOUT_S)
@pytest.mark.parametrize("name", [name for name in CALLS if name != "SystemService.Drain"])
def test_an_example_does_what_it_says(
    name: str, daemon: DaemonProcess, example_of: Mapping[str, str]
) -> None:
    with Connection(daemon.api_socket, "anonymous") as connection:
        said = run_example(example_of[name], daemon, variables(name, connection))
    for word in expected(name):
        assert word in said


@pytest.mark.timeout(2 * CALL_TIMEOUT_S)
def test_after_the_example_of_drain_no_run_is_accepted(
    engine_store: Path, example_of: Mapping[str, str]
) -> None:
    with running_daemon(engine_store) as daemon:
        run_example(example_of["SystemService.Drain"], daemon, {})
        with pytest.raises(AssertionError, match="unavailable"):
            run_example(example_of["RunService.CreateRun"], daemon, {})


def variables(name: str, connection: Connection) -> Mapping[str, str]:
    """What the page says that an example needs."""
    if name == "RunService.ClearHalt":
        halt = connection.runs.Halt(pb.HaltRequest(scope=pb.HALT_SCOPE_AGENT, target="nobody")).halt
        return {"HALT_ID": halt.halt_id}
    if name.endswith(("Session", "Sessions")):
        run_in_a_session(connection)
        return {}
    if name in {"RunService.ResumeRun", "RunService.DecideToolCall"}:
        return waiting_run(name, connection)
    return run_with_a_call(name, connection) if name in NEED_A_CALL else {}


def run_in_a_session(connection: Connection) -> None:
    """A run that has ended in the session that the examples name."""
    request = pb.ExecuteRunRequest()
    json_format.Parse(DATA["rpcs"]["RunService.ExecuteRun"]["example"], request)
    request.spec.session.id = "patrol"
    for _response in connection.runs.ExecuteRun(request):
        pass


def run_with_a_call(name: str, connection: Connection) -> Mapping[str, str]:
    """A run whose model has called a tool, and what the example needs of it beyond that."""
    request = pb.CreateRunRequest()
    example = DATA["rpcs"]["RunService.CreateRun"]["example"]
    json_format.Parse(example, request)
    request.request_id = ""
    if name == "RunService.ToolUpdate":
        for tool in request.spec.tools:
            tool.lifecycle = types_pb2.LIFECYCLE_BACKGROUND
    run_id, call_id = connection.runs.CreateRun(request).run.id, ""
    for response in connection.runs.WatchRun(pb.WatchRunRequest(run_id=run_id, after_sequence=0)):
        if not response.event.HasField("tool_calls_issued"):
            continue
        call_id = response.event.tool_calls_issued.tool_calls[0].id
        if name in {"RunService.WatchRun", "RunService.ResolveOutcome"}:
            connection.runs.CancelRun(pb.CancelRunRequest(run_id=run_id))  # nobody confirms it
        if name == "RunService.ToolUpdate":
            begun = [types_pb2.ToolResult(tool_call_id=call_id)]
            results = pb.SubmitToolResultsRequest(run_id=run_id, results=begun)
            connection.runs.SubmitToolResults(results)
        if name != "RunService.ResolveOutcome":  # which is for a run that has ended
            break
    assert call_id, "the run ended without a tool call"
    return {"RUN_ID": run_id, "TOOL_CALL_ID": call_id}


def waiting_run(name: str, connection: Connection) -> Mapping[str, str]:
    """A run that waits for somebody: suspended by a Halt that has been cleared, or unapproved."""
    request = pb.CreateRunRequest()
    json_format.Parse(DATA["rpcs"]["RunService.CreateRun"]["example"], request)
    request.request_id = ""
    request.spec.durable = True
    for tool in request.spec.tools:
        tool.needs_approval = name == "RunService.DecideToolCall"
        tool.side_effect = types_pb2.SIDE_EFFECT_NONE
    run_id, halted = connection.runs.CreateRun(request).run.id, pb.HaltResponse()
    for response in connection.runs.WatchRun(pb.WatchRunRequest(run_id=run_id, after_sequence=0)):
        event = response.event
        if event.HasField("approval_requested"):
            call_id = event.approval_requested.tool_calls[0].id
            return {"RUN_ID": run_id, "TOOL_CALL_ID": call_id}
        if event.HasField("tool_calls_issued"):
            halted = connection.halt(pb.HALT_SCOPE_CLIENT, "anonymous")
            call_id = event.tool_calls_issued.tool_calls[0].id
            confirmed = types_pb2.ToolResult(tool_call_id=call_id, cancelled=True)
            connection.runs.SubmitToolResults(
                pb.SubmitToolResultsRequest(run_id=run_id, results=[confirmed])
            )
        if event.state_changed.state == pb.RUN_STATE_SUSPENDED:
            connection.clear_halt(halted.halt.halt_id)
            return {"RUN_ID": run_id}
    raise AssertionError("the run ended without waiting for anybody")


def expected(name: str) -> tuple[str, ...]:
    """What an example's output has in it."""
    return {
        "RunService.CreateRun": ("5f0c1c4e-turn-the-lamp-on",),
        "RunService.ExecuteRun": ("runFinished", "RUN_STATE_SUCCEEDED"),
        "RunService.Converse": ("runFinished", r"{\"door\":"),
        "RunService.SubmitToolResults": ("RUN_STATE_",),
        "RunService.GetRun": ("RUN_STATE_WAITING_TOOL", "set_lamp"),
        "RunService.ListRuns": ("runs",),
        "RunService.WatchRun": ("snapshot", "toolCallsIssued", "runFinished"),
        "RunService.CancelRun": ("RUN_STATE_CANCELLING",),
        "RunService.ResumeRun": ("RUN_STATE_",),
        "RunService.DecideToolCall": ("RUN_STATE_",),
        "RunService.AppendMessages": ("pendingMessages", "close the door"),
        "RunService.ToolUpdate": ("pendingMessages", "The lamp is warm."),
        "RunService.ResolveOutcome": ("FAILED", "The lamp is off."),
        "RunService.WaitResults": ("{}",),
        "RunService.AckResults": ("{}",),
        "RunService.GetTrace": ("set_lamp", "INTENDED"),
        "RunService.Halt": ("haltId", "people in the aisle", '"recorded": true'),
        "RunService.ClearHalt": ("{}",),
        "EngineService.ListEngines": ("smollm2-135m-instruct",),
        "EngineService.GetEngine": ("smollm2-135m-instruct",),
        "EngineService.LoadEngine": ("ENGINE_STATE_READY",),
        "EngineService.UnloadEngine": ("ENGINE_STATE_INSTALLED",),
        "EngineService.PinEngine": ('"pinned": true',),
        "EngineService.ReleaseEngine": ("smollm2-135m-instruct",),
        "EngineService.Explain": ("{}",),
        "EngineService.WatchEngines": ("smollm2-135m-instruct",),
        "SystemService.GetStatus": ("DAEMON_STATE_READY",),
        "SystemService.WatchTelemetry": ("availableBytes", "METRIC_STATUS_OK", "/proc/meminfo"),
        "RunService.Beat": ("nonce",),
        "RunService.GetSession": ("patrol", "Say hello."),
        "RunService.ListSessions": ("patrol", "SESSION_OVERFLOW_REFUSE"),
        "RunService.DeleteSession": ("{}",),
        "SystemService.ReloadConfig": ("{}",),
    }[name]


def run_example(command: str, daemon: DaemonProcess, more: Mapping[str, str]) -> str:
    """What an example prints; one that never ends is ended after its first message."""
    environ = {
        **os.environ,
        "PATH": f"{REPOSITORY / '.venv' / 'bin'}:{os.environ['PATH']}",
        "API_SOCKET": str(daemon.api_socket),
        "ADMIN_SOCKET": str(daemon.admin_socket),
        **more,
    }
    with subprocess.Popen(
        ["bash", "-euc", f"exec {command}"],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            if any(call in command for call in ENDLESS):
                assert process.stdout is not None
                return "".join(iter(process.stdout.readline, "}\n"))
            stdout, stderr = process.communicate(timeout=CALL_TIMEOUT_S)
        finally:
            process.kill()
    assert process.returncode == 0, stderr
    return stdout
