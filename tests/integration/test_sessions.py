"""Sessions of a real daemon and model: what they remember, over kills too, and what is read."""

import signal
from typing import Any, Unpack

import grpc
import pytest

from edge_agent.api.convert_client import RunOptions
from edge_agent.client import Client
from edge_agent.core import Message, Overflow, Role, Run, RunState, TextPart
from edge_agent.errors import FailedPrecondition, NotFound, PermissionDenied
from edge_agent.events import HistoryShortened
from edge_agent.v1 import run_service_pb2 as run_pb
from tests.support.connection import CALL_TIMEOUT_S, Connection, Problem, goal
from tests.support.daemon import BASE_CONFIG, ENGINE, DaemonProcess, running_daemon

CONFIG = f"{BASE_CONFIG}preload: [{ENGINE}]\nengines: {{{ENGINE}: {{context_tokens: 512}}}}\n"
STORY = "Write a very long story about a robot."
WORDS = " ".join(["The lamp in aisle seven is broken and has to be replaced soon."] * 6)


@pytest.fixture
def daemon(engine_store):
    with running_daemon(engine_store, CONFIG) as running:
        yield running


def client(daemon: DaemonProcess, name: str = "robot") -> Client:
    return Client(str(daemon.api_socket), name=name)


def said(caller: Client, text: str, **options: Unpack[RunOptions]) -> Run:
    options = {"max_output_tokens": 8, "session": "tour", **options}
    run = caller.run(text, **options)
    assert run.session == options["session"]
    return run


def once(caller: Client) -> Run:
    return caller.create(
        "Say yes.",
        request_id="once",
        session="tour",
        durable=True,
        system="Be kind.",
        max_output_tokens=8,
    )


def texts(caller: Client, session: str = "tour") -> list[str]:
    return [message.text for message in caller.session(session).messages]


def kill(daemon: DaemonProcess) -> None:
    daemon.stop(signal.SIGKILL)
    daemon.restart()


def test_a_run_reads_the_session_s_history_and_only_what_is_new_is_computed(daemon):
    with client(daemon) as caller:
        first = said(caller, f"{WORDS} Say yes.", system="You are a robot.")
        second = said(caller, "Say no.")
        assert (first.state, second.state) == (RunState.SUCCEEDED, RunState.SUCCEEDED)
        assert second.usage.prompt_tokens > first.usage.prompt_tokens
        assert second.usage.cached_tokens > 0.8 * first.usage.prompt_tokens
        assert texts(caller)[:2] == ["You are a robot.", f"{WORDS} Say yes."]
        assert texts(caller)[2:] == [first.answer, "Say no.", second.answer]
        assert caller.session("tour").runs == 2


@pytest.mark.parametrize("durable", [True, False])
def test_the_history_is_there_after_a_kill_as_of_the_last_run_that_had_ended(daemon, durable):
    with client(daemon) as caller:
        said(caller, "Say yes.", durable=durable)
        said(caller, "Say no.", durable=True)
        known = texts(caller)
    kill(daemon)
    with client(daemon) as caller:
        assert len(known) == 4
        assert texts(caller) == known
        said(caller, "And now?")
        assert texts(caller)[:4] == known


def test_an_unfinished_run_is_still_of_its_session_after_a_kill(daemon):
    with client(daemon) as caller:
        said(caller, "Say yes.", durable=True)
        known = texts(caller)
        request = goal(STORY, durable=True, max_output_tokens=120)
        request.session.id = "tour"
        with Connection(daemon.api_socket, "robot") as connection:
            run_id = connection.runs.CreateRun(run_pb.CreateRunRequest(spec=request)).run.id
            for response in connection.runs.WatchRun(run_pb.WatchRunRequest(run_id=run_id)):
                if response.event.HasField("text_delta"):
                    break
    kill(daemon)
    with client(daemon) as caller:
        with pytest.raises(FailedPrecondition) as busy:
            said(caller, "And now?")
        assert (busy.value.reason, busy.value.metadata["run_id"]) == ("SESSION_BUSY", run_id)
        assert caller.session("tour").run_id == run_id
        assert texts(caller) == known
        for _event in caller.watch(run_id):
            pass
        run = caller.get(run_id)
        assert (run.state, run.session) == (RunState.SUCCEEDED, "tour")
        assert texts(caller) == [*known, STORY, run.answer]
        assert caller.session("tour").run_id == ""


def test_a_repeated_request_is_answered_after_a_kill_while_another_run_goes_on(daemon):
    with client(daemon) as caller:
        first = once(caller)
        for _event in caller.watch(first.id):
            pass
    kill(daemon)
    with client(daemon) as caller:
        other = caller.create(STORY, session="tour", max_output_tokens=100)
        again = once(caller)
        assert (again.id, again.state) == (first.id, RunState.SUCCEEDED)
        caller.cancel(other.id)


def test_a_history_that_is_too_long_is_refused_and_the_session_named(daemon):
    with client(daemon) as caller:
        runs = [said(caller, f"{number} {WORDS}") for number in range(8)]
        failed = next(run for run in runs if run.state is not RunState.SUCCEEDED)
        assert failed.error is not None
        assert failed.error.reason == "PROMPT_TOO_LONG"
        assert failed.error.metadata["session_id"] == "tour"


@pytest.mark.parametrize("overflow", [Overflow.DROP_OLDEST, Overflow.SUMMARISE])
def test_a_history_that_is_too_long_makes_room(daemon, overflow):
    shortened: list[HistoryShortened] = []

    def look(event: Any) -> None:
        if isinstance(event.body, HistoryShortened):
            shortened.append(event.body)

    with client(daemon) as caller:
        for number in range(9):
            run = caller.run(
                f"{number} {WORDS}",
                on_event=look,
                session="tour",
                session_overflow=overflow,
                max_output_tokens=8,
            )
            assert run.state is RunState.SUCCEEDED, run.error
        session = caller.session("tour")
        assert shortened
        assert session.overflow is overflow
        assert session.messages[-2].text.startswith("8 ")
        assert not any(message.text.startswith("0 ") for message in session.messages)
        if overflow is Overflow.SUMMARISE:
            assert shortened[-1].summary
            assert [message.is_summary for message in session.messages].count(True) == 1
            records = [record for each in caller.list() for record in caller.trace(each.id)[0]]
            assert "SUMMARY" in {record.route for record in records}
        assert {run.session for run in caller.list()} == {"tour"}


def test_sessions_are_listed_and_deleted_by_their_client_and_by_the_admin(daemon):
    admin_socket = str(daemon.admin_socket)
    with client(daemon) as caller, client(daemon, "other") as other:
        said(caller, "Say yes.")
        said(other, "Say yes.", session="patrol")
        assert [each.id for each in caller.sessions()] == ["tour"]
        assert caller.sessions()[0].messages == ()
        with pytest.raises(NotFound):
            caller.session("patrol")
        with pytest.raises(PermissionDenied):
            caller.session("patrol", client="other")
        with Client(admin_socket, name="admin") as admin:
            assert {each.id for each in admin.sessions()} == {"tour", "patrol"}
            assert admin.session("patrol", client="other").messages
            admin.delete_session("patrol", client="other")
        assert other.sessions() == ()
        running = caller.create(STORY, session="tour", max_output_tokens=100)
        with pytest.raises(FailedPrecondition) as busy:
            caller.delete_session("tour")
        assert busy.value.reason == "SESSION_BUSY"
        caller.cancel(running.id)
        for _event in caller.watch(running.id):
            pass
        caller.delete_session("tour")
        with pytest.raises(NotFound):
            caller.delete_session("tour")


def test_a_deleted_session_begins_anew(daemon):
    with client(daemon) as caller:
        said(caller, "Say yes.", durable=True)
        caller.delete_session("tour")
        run = said(caller, "Say no.", system="You are a robot.")
        assert texts(caller) == ["You are a robot.", "Say no.", run.answer]


def test_what_is_wrong_with_a_session_is_named(daemon):
    spec = goal("Go")
    spec.session.overflow = 9  # type: ignore[assignment]
    with Connection(daemon.api_socket) as connection, pytest.raises(grpc.RpcError) as error:
        connection.runs.CreateRun(run_pb.CreateRunRequest(spec=spec), timeout=CALL_TIMEOUT_S)
    assert list(Problem(error.value).fields) == ["spec.session.id", "spec.session.overflow"]


def test_a_history_can_be_handed_to_another_session(daemon):
    with client(daemon) as caller:
        said(caller, "Say yes.")
        goal_ = (*caller.session("tour").messages, Message(Role.USER, (TextPart("And now?"),)))
        run = caller.run(goal_, session="copy", max_output_tokens=8)
        assert texts(caller, "copy")[:2] == texts(caller, "tour")
        assert run.state is RunState.SUCCEEDED
