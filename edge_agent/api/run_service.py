"""RunService: runs and Halts over gRPC.

Owns what a stream's end means for its run. Converts and calls; decides nothing about runs.
"""

# ruff: noqa: ARG002, N802
# gRPC names the methods and hands a request and a context to each.

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Self

import structlog

from edge_agent.api import (
    convert_request,
    convert_response,
    convert_session,
    convert_tools,
    convert_trace,
)
from edge_agent.api.errors import Context
from edge_agent.api.interceptors import admin_socket_required, current_call
from edge_agent.api.ports import RequestLimits, RunsPort
from edge_agent.api.streaming import StreamWriter, closing
from edge_agent.core import HaltScope, Run, RunError, ToolResult
from edge_agent.errors import EdgeAgentError, FailedPrecondition, InvalidRequest
from edge_agent.v1 import run_service_pb2 as pb
from edge_agent.v1 import run_service_pb2_grpc

_log = structlog.get_logger()
_EventResponse = type[pb.ExecuteRunResponse] | type[pb.ConverseResponse] | type[pb.WatchRunResponse]


class RunService(run_service_pb2_grpc.RunServiceServicer):
    """The calls of RunService."""

    def __init__(self, runs: RunsPort, limits: Callable[[], RequestLimits]) -> None:
        self._runs = runs
        self._limits = limits

    async def CreateRun(
        self, request: pb.CreateRunRequest, context: Context
    ) -> pb.CreateRunResponse:
        """Accept a run."""
        return pb.CreateRunResponse(run=convert_response.run(await self._create(request)))

    async def ExecuteRun(self, request: pb.ExecuteRunRequest, context: Context) -> None:  # type: ignore[override]  # writes itself
        """Accept a run and send its events."""
        run = await self._create(request)
        with _RunOfStream(self._runs, run, request.on_disconnect) as stream:
            await self._send_events(run.id, 0, pb.ExecuteRunResponse, context)
            stream.finished = True

    async def Converse(  # type: ignore[override]  # writes itself
        self, request_iterator: AsyncIterator[pb.ConverseRequest], context: Context
    ) -> None:
        """Accept a run, send its events and take tool results meanwhile."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("kind") != "start":
            raise InvalidRequest.field("start", "is missing, the first message starts the run")
        run = await self._create(first.start, "start.")
        with _RunOfStream(self._runs, run, first.start.on_disconnect) as stream:
            try:
                async with asyncio.TaskGroup() as group:
                    reader = group.create_task(self._take_results(run.id, request_iterator))
                    await self._send_events(run.id, 0, pb.ConverseResponse, context)
                    stream.finished = True
                    reader.cancel()
            except BaseExceptionGroup as failed:
                raise failed.exceptions[0] from None

    async def SubmitToolResults(
        self, request: pb.SubmitToolResultsRequest, context: Context
    ) -> pb.SubmitToolResultsResponse:
        """Hand in tool results."""
        run_id = convert_request.run_id(request.run_id)
        results = convert_tools.tool_results(request.results, self._limits())
        run = await self._runs.submit(run_id, results)
        return pb.SubmitToolResultsResponse(run=convert_response.run(run))

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.GetRunResponse:
        """One run."""
        run = await self._runs.get(convert_request.run_id(request.run_id))
        response = pb.GetRunResponse()
        convert_response.fill_run(response.run, run)
        return response

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        """A page of runs."""
        states, size, token = convert_request.page(request)
        runs, following = await self._runs.list(states=states, page_size=size, page_token=token)
        return pb.ListRunsResponse(
            runs=[convert_response.run(run, with_transcript=False) for run in runs],
            next_page_token=following,
        )

    async def WatchRun(self, request: pb.WatchRunRequest, context: Context) -> None:  # type: ignore[override]  # writes itself
        """Follow a run."""
        run_id = convert_request.run_id(request.run_id)
        after = request.after_sequence if request.HasField("after_sequence") else None
        await self._send_events(run_id, after, pb.WatchRunResponse, context)

    async def CancelRun(
        self, request: pb.CancelRunRequest, context: Context
    ) -> pb.CancelRunResponse:
        """End a run."""
        client = current_call().client
        reason = RunError(
            "CANCELLED_BY_CALLER", f"cancelled by {client}", metadata={"client": client}
        )
        run = await self._runs.cancel(convert_request.run_id(request.run_id), reason)
        return pb.CancelRunResponse(run=convert_response.run(run))

    async def ResumeRun(
        self, request: pb.ResumeRunRequest, context: Context
    ) -> pb.ResumeRunResponse:
        """Let a suspended run go on."""
        run_id, messages = convert_request.resumption(request)
        run = await self._runs.resume(run_id, messages, current_call().client)
        return pb.ResumeRunResponse(run=convert_response.run(run))

    async def AppendMessages(
        self, request: pb.AppendMessagesRequest, context: Context
    ) -> pb.AppendMessagesResponse:
        """Say something to a run that goes on."""
        run_id, messages = convert_request.appended(request)
        run = await self._runs.append(run_id, messages)
        return pb.AppendMessagesResponse(run=convert_response.run(run))

    async def ToolUpdate(
        self, request: pb.ToolUpdateRequest, context: Context
    ) -> pb.ToolUpdateResponse:
        """Take news of a background tool."""
        run_id, update = convert_tools.tool_update(request, self._limits())
        run = await self._runs.update_tool(run_id, update)
        return pb.ToolUpdateResponse(run=convert_response.run(run))

    async def ResolveOutcome(
        self, request: pb.ResolveOutcomeRequest, context: Context
    ) -> pb.ResolveOutcomeResponse:
        """Take what really came of a tool call."""
        run_id, call_id, acted, evidence = convert_request.resolution(request)
        call = current_call()
        if not call.admin and (await self._runs.get(run_id)).client != call.client:
            raise admin_socket_required("ResolveOutcome for another client's run")
        record = await self._runs.resolve(
            run_id, call_id, acted=acted, client=call.client, evidence=evidence
        )
        return pb.ResolveOutcomeResponse(tool_call=convert_trace.call_record(record))

    async def DecideToolCall(
        self, request: pb.DecideToolCallRequest, context: Context
    ) -> pb.DecideToolCallResponse:
        """Approve or deny a tool call; on api.sock only the run's own client may."""
        run_id, call_id, reason = convert_request.decision(request)
        call = current_call()
        if not call.admin and (await self._runs.get(run_id)).client != call.client:
            raise admin_socket_required("DecideToolCall for another client's run")
        run = await self._runs.decide(
            run_id, call_id, approved=request.approved, client=call.client, reason=reason
        )
        return pb.DecideToolCallResponse(run=convert_response.run(run))

    async def WaitResults(
        self, request: pb.WaitResultsRequest, context: Context
    ) -> pb.WaitResultsResponse:
        """Ended durable runs of this client."""
        limit, wait_s = convert_request.results_wanted(request)
        client = current_call().client
        runs = await self._runs.wait_results(client, request.cursor, limit, wait_s)
        response = pb.WaitResultsResponse(cursor=request.cursor)
        for run in runs:
            convert_response.fill_run(response.runs.add(), run)
            response.cursor = run.result_number or response.cursor
        return response

    async def AckResults(
        self, request: pb.AckResultsRequest, context: Context
    ) -> pb.AckResultsResponse:
        """Deliver these no more."""
        cursor = convert_request.acknowledged(request)
        await self._runs.ack_results(current_call().client, cursor)
        return pb.AckResultsResponse()

    async def GetTrace(self, request: pb.GetTraceRequest, context: Context) -> pb.GetTraceResponse:
        """What is on record of a run."""
        steps, calls = await self._runs.trace(convert_request.run_id(request.run_id))
        return pb.GetTraceResponse(
            steps=map(convert_trace.step_record, steps),
            tool_calls=map(convert_trace.call_record, calls),
        )

    async def Halt(self, request: pb.HaltRequest, context: Context) -> pb.HaltResponse:
        """Stop what runs may do."""
        scope, target, reason = convert_request.halt(request)
        outcome = await self._runs.halt(scope, target, reason, current_call().client)
        return pb.HaltResponse(
            halt=convert_response.halt(outcome.halt),
            runs_stopped=outcome.runs_stopped,
            recorded=outcome.recorded,
        )

    async def ClearHalt(
        self, request: pb.ClearHaltRequest, context: Context
    ) -> pb.ClearHaltResponse:
        """Lift a Halt; that of scope ALL on admin.sock only."""
        halt_id = convert_request.name(request.halt_id, "halt_id")
        if not current_call().admin:
            scopes = {halt.id: halt.scope for halt in self._runs.halts()}
            if scopes.get(halt_id) is HaltScope.ALL:
                raise admin_socket_required("ClearHalt of scope ALL")
        await self._runs.clear_halt(halt_id)
        return pb.ClearHaltResponse()

    async def Beat(self, request: pb.BeatRequest, context: Context) -> pb.BeatResponse:
        """Take a client's beat."""
        heartbeat = convert_request.heartbeat(request)
        client = current_call().client
        nonce = self._runs.beat(
            client, request.session, request.nonce, heartbeat, stop=request.stop
        )
        return pb.BeatResponse(nonce=nonce)

    async def GetSession(
        self, request: pb.GetSessionRequest, context: Context
    ) -> pb.GetSessionResponse:
        """A session with its history."""
        client, session_id = _session_of("GetSession", request)
        session = await self._runs.session(client, session_id)
        return pb.GetSessionResponse(session=convert_session.session(session))

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: Context
    ) -> pb.ListSessionsResponse:
        """The caller's sessions, on admin.sock everybody's."""
        call = current_call()
        sessions = await self._runs.list_sessions(None if call.admin else call.client)
        return pb.ListSessionsResponse(sessions=map(convert_session.session, sessions))

    async def DeleteSession(
        self, request: pb.DeleteSessionRequest, context: Context
    ) -> pb.DeleteSessionResponse:
        """Delete a session with its history."""
        client, session_id = _session_of("DeleteSession", request)
        await self._runs.delete_session(client, session_id)
        return pb.DeleteSessionResponse()

    async def _create(
        self, request: pb.CreateRunRequest | pb.ExecuteRunRequest, prefix: str = ""
    ) -> Run:
        spec = convert_request.run_request(request, self._limits(), prefix)
        client = current_call().client
        return await self._runs.create(spec, client=client, request_id=request.request_id)

    async def _send_events(
        self, run_id: str, after: int | None, response: _EventResponse, context: Context
    ) -> None:
        # The run's own task first, so that its step is with the engine while we send the snapshot.
        await asyncio.sleep(0)
        with StreamWriter(context, self._limits().slow_reader_s) as stream:
            async with closing(self._runs.watch(run_id, after)) as events:
                async for event in events:
                    message = response()
                    convert_response.fill_event(message.event, event)
                    await stream.write(message)

    async def _take_results(self, run_id: str, requests: AsyncIterator[pb.ConverseRequest]) -> None:
        """Hand in what a conversation's caller sends, until it sends no more."""
        async for request in requests:
            if request.WhichOneof("kind") != "tool_results":
                problem = "is missing, only the first message is another"
                raise InvalidRequest.field("tool_results", problem)
            results = convert_tools.tool_results(
                request.tool_results.results, self._limits(), "tool_results.results"
            )
            for result in results:
                await self._take_result(run_id, result)

    async def _take_result(self, run_id: str, result: ToolResult) -> None:
        """Hand in one; each by itself, so that a late one does not take others with it."""
        try:
            await self._runs.submit(run_id, (result,))
        except FailedPrecondition as late:
            # The call timed out or the run ended while its result was on the way. The events say
            # so; to end the stream would take the run's last event with it.
            _log.info(
                "tool_result_late",
                run_id=run_id,
                tool_call_id=result.tool_call_id,
                reason=late.reason,
            )


def _session_of(
    what: str, request: pb.GetSessionRequest | pb.DeleteSessionRequest
) -> tuple[str, str]:
    """Whose session is asked for, and which; another client's on admin.sock only."""
    session_id, client = convert_session.asked(request)
    call = current_call()
    if client and client != call.client and not call.admin:
        raise admin_socket_required(f"{what} of another client")
    return client or call.client, session_id


class _RunOfStream:
    """Cancels a stream's run, unless it is to continue, when the stream ends before it."""

    def __init__(self, runs: RunsPort, run: Run, on_disconnect: int) -> None:
        self._runs = runs
        self._run_id = run.id
        self._continues = on_disconnect == pb.ON_DISCONNECT_CONTINUE
        self.finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.finished or self._continues:
            return
        if isinstance(error, EdgeAgentError):
            reason = error.as_run_error()
        else:
            reason = RunError("CLIENT_DISCONNECTED", "the stream that made the run broke")
        self._runs.abandon(self._run_id, reason)
