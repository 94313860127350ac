"""What every call passes through: who calls, whether they may, errors, one log line.

Owns `current_call()`, the mapping of exceptions to statuses and the canonical line
`rpc_finished`. Knows nothing of runs or engines.
"""

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias

import grpc
import structlog

from edge_agent.api.errors import Context, abort, internal_error
from edge_agent.api.ports import RequestLimits
from edge_agent.api.receiving import Deserialize, Received, receive
from edge_agent.errors import EdgeAgentError, InvalidRequest, PermissionDenied

CLIENT_KEY = "edge-agent-client"
ANONYMOUS = "anonymous"
ADMIN_ONLY = frozenset(
    {
        "/edge_agent.v1.EngineService/LoadEngine",
        "/edge_agent.v1.EngineService/UnloadEngine",
        "/edge_agent.v1.EngineService/PinEngine",
        "/edge_agent.v1.EngineService/ReleaseEngine",
        "/edge_agent.v1.SystemService/ReloadConfig",
        "/edge_agent.v1.SystemService/Drain",
    }
)
_CLIENT = re.compile(r"[A-Za-z0-9._:/-]{1,64}")
_QUIET = (
    "/grpc.health.v1.",
    "/grpc.reflection.",
    "/edge_agent.v1.RunService/Beat",
    "/edge_agent.v1.SystemService/GetStatus",
    "/edge_agent.v1.EngineService/ListEngines",
)
"""What is polled, by monitors and by `status --watch`: these calls are logged at debug."""

_log = structlog.get_logger()
# Quoted, since they are generic in their stubs only.
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Lookup: TypeAlias = (
    "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]"
)
_Behaviour = Callable[[Any, Context], Any]


class CallInfo(NamedTuple):
    """Who makes a call, and on which socket."""

    method: str
    client: str
    admin: bool
    rpc_id: str


_current: ContextVar[CallInfo] = ContextVar("edge_agent_call")


def current_call() -> CallInfo:
    """The call that this handler serves."""
    return _current.get()


def admin_socket_required(what: str) -> PermissionDenied:
    """The refusal of what only admin.sock may do."""
    return PermissionDenied(
        f"{what} is only served on admin.sock",
        reason="ADMIN_SOCKET_REQUIRED",
        metadata={"method": what},
    )


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of one socket, each once.

    gRPC's interceptors see neither the request nor the end of a call, so the handler itself is
    wrapped; a refusal is an exception inside the wrapper like any other.
    """

    def __init__(self, *, admin: bool, limits: Callable[[], RequestLimits]) -> None:
        self._admin = admin
        self._limits = limits
        self._wrapped: dict[str, _Handler] = {}

    async def intercept_service(
        self,
        continuation: _Lookup,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        """The wrapped handler; none (UNIMPLEMENTED) for an unknown method."""
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            wrapped = self._wrapped[method] = self._wrap(method, handler)
        return wrapped

    def _wrap(self, method: str, handler: Any) -> _Handler:
        """A handler of the same arity around this one. It gets bytes: errors in them are ours."""
        take, coding = handler.request_deserializer, (None, handler.response_serializer)
        if handler.unary_unary:
            behaviour = self._guarded(method, handler.unary_unary, take)
            return grpc.unary_unary_rpc_method_handler(behaviour, *coding)
        if handler.unary_stream:
            behaviour = self._guarded(method, _written(handler.unary_stream), take)
            return grpc.unary_stream_rpc_method_handler(behaviour, *coding)
        behaviour = self._guarded(method, _written(handler.stream_stream), take, streams=True)
        return grpc.stream_stream_rpc_method_handler(behaviour, *coding)

    def _guarded(
        self, method: str, behaviour: _Behaviour, take: Deserialize, *, streams: bool = False
    ) -> _Behaviour:
        """`behaviour` with everything that a call passes through around it."""

        def limit_bytes() -> int:
            return self._limits().max_request_bytes

        async def call(raw: Any, context: Context) -> Any:
            started_s = time.monotonic()
            client, problem = _client_of(context.invocation_metadata())
            info = CallInfo(method, client, self._admin, os.urandom(6).hex())
            _current.set(info)
            try:
                self._admit(method, problem)
                if streams:
                    request = Received(raw, take, limit_bytes)
                else:
                    request = receive(raw, take, limit_bytes())
                response = await behaviour(request, context)
            except asyncio.CancelledError:
                _log_finished(info, _since(started_s), "CANCELLED", None)
                raise
            except grpc.aio.AbortError:  # health: has ended the call itself
                _log_finished(info, _since(started_s), "ABORTED_BY_HANDLER", None)
                raise
            except EdgeAgentError as raised:
                error = raised
            except Exception:  # noqa: BLE001 - the API's edge: nothing unexpected reaches a caller
                _log.exception("rpc_crashed", method=method, rpc_id=info.rpc_id)
                error = internal_error(info.rpc_id)
            else:
                # The caller does not wait for the line: the answer is sent before it is written.
                duration_s = _since(started_s)
                asyncio.get_running_loop().call_soon(_log_finished, info, duration_s, "OK", None)
                return response
            _log_finished(info, _since(started_s), error.code, error.reason)
            # Last, since it waits for a caller that reads nothing.
            return await abort(context, error)

        return call

    def _admit(self, method: str, problem: EdgeAgentError | None) -> None:
        """Raise what speaks against a call before its handler sees it."""
        if problem is not None:
            raise problem
        if method in ADMIN_ONLY and not self._admin:
            raise admin_socket_required(method)


def _since(started_s: float) -> float:
    return time.monotonic() - started_s


def _log_finished(info: CallInfo, duration_s: float, code: str, reason: str | None) -> None:
    log = _log.debug if info.method.startswith(_QUIET) else _log.info
    log(
        "rpc_finished",
        method=info.method,
        client=info.client,
        admin=info.admin,
        rpc_id=info.rpc_id,
        code=code,
        reason=reason,
        duration_ms=round(duration_s * 1000, 3),
    )


def _written(behaviour: _Behaviour) -> _Behaviour:
    """A streaming handler as a coroutine, also where it is an async generator (reflection)."""

    async def write_all(request: Any, context: Context) -> None:
        # By itself: gRPC would send it with the first message, and where that write is cancelled
        # it could not end the call any more, so that the caller waited for ever.
        await context.send_initial_metadata(())
        responses = behaviour(request, context)
        if hasattr(responses, "__aiter__"):
            async for response in responses:
                await context.write(response)
        else:
            await responses

    return write_all


def _client_of(metadata: grpc.aio.Metadata | None) -> tuple[str, EdgeAgentError | None]:
    """How the caller names itself, or what is wrong with the name."""
    for key, value in metadata or ():
        if key == CLIENT_KEY:
            if isinstance(value, str) and _CLIENT.fullmatch(value):
                return value, None
            problem = f"must match {_CLIENT.pattern}"
            return ANONYMOUS, InvalidRequest.field(f"metadata.{CLIENT_KEY}", problem)
    return ANONYMOUS, None
