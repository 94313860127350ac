"""What both clients share on their way to the daemon: addresses, first messages, errors.

Owns nothing that lasts.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

from edge_agent.api import convert_client as convert
from edge_agent.api.convert_client import RunOptions
from edge_agent.api.convert_error import DETAILS_KEY, error_of
from edge_agent.core import Message, Tool
from edge_agent.errors import (
    EdgeAgentError,
    FailedPrecondition,
    InvalidRequest,
    PermissionDenied,
    Unavailable,
)
from edge_agent.events import Event
from edge_agent.paths import MAX_SOCKET_PATH_BYTES
from edge_agent.v1 import run_service_pb2 as run_pb

Goal = str | Sequence[Message]
"""What is wanted, in a user's words; or a whole conversation."""

BEAT_TIMEOUT_S = 10.0
"""How long to wait for the answer to a beat, where the window is not shorter."""
CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1),)
_SOCKET_VARIABLE = "EDGE_AGENT_SOCKET"


def default_address(environ: Mapping[str, str] = os.environ) -> str:
    """`$EDGE_AGENT_SOCKET`, else api.sock of the session's daemon, else of the system's."""
    if environ.get(_SOCKET_VARIABLE):
        return environ[_SOCKET_VARIABLE]
    session = environ.get("XDG_RUNTIME_DIR")
    return f"{session}/edge-agent/api.sock" if session else "/run/edge-agent/api.sock"


def target(address: str) -> str:
    """An address as gRPC wants it; a path is a unix socket's."""
    return f"unix:{address}" if address.startswith(("/", ".")) else address


def start(goal: Goal, tools: Sequence[Tool], options: RunOptions) -> run_pb.ConverseRequest:
    """The first message of a conversation."""
    spec = convert.run_spec(goal, tools, options)
    return run_pb.ConverseRequest(start=run_pb.ExecuteRunRequest(spec=spec))


def known(events: Iterable[run_pb.RunEvent]) -> Iterator[Event]:
    """The events that this client knows the kind of."""
    return (event for event in map(convert.event, events) if event is not None)


def cut_short() -> EdgeAgentError:
    """What is wrong when a stream ends well, but before its run."""
    return Unavailable("the stream ended before the run did", reason="STREAM_CUT_SHORT")


@contextmanager
def typed_errors(address: str) -> Iterator[None]:
    """Raise the errors of gRPC as ours."""
    try:
        yield
    except grpc.RpcError as raised:
        call: Any = raised  # both flavours of it have these three
        metadata = dict(call.trailing_metadata() or ())
        details = metadata.get(DETAILS_KEY)
        if details is None:  # gRPC's own words
            raise _error_of_grpc(call.code(), call.details() or "", address) from raised
        raise error_of(call.code().name, call.details() or "", details) from raised


def _error_of_grpc(code: grpc.StatusCode, said: str, address: str) -> EdgeAgentError:
    """What no daemon has said: that there is none, or that a message is too large even for gRPC."""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in said:
        return InvalidRequest(
            f"the request is larger than any daemon takes: {said}",
            reason="REQUEST_TOO_LARGE",
            metadata={"cause": said},
        )
    path = address.removeprefix("unix:")
    size = len(os.fsencode(path))
    if path.startswith(("/", ".")) and size > MAX_SOCKET_PATH_BYTES:
        return FailedPrecondition(
            f"{path} has {size} bytes, a socket's path at most {MAX_SOCKET_PATH_BYTES}",
            reason="SOCKET_PATH_TOO_LONG",
            metadata={"path": path, "size_bytes": size, "limit_bytes": MAX_SOCKET_PATH_BYTES},
        )
    if code is not grpc.StatusCode.UNAVAILABLE:
        return error_of(code.name, said, None)
    if _is_forbidden(address):
        return PermissionDenied(
            f"no right to call {address}: it is for its user and group",
            reason="SOCKET_FORBIDDEN",
            metadata={"address": address},
        )
    return Unavailable(
        f"no daemon answers at {address}",
        reason="DAEMON_UNREACHABLE",
        metadata={"address": address, "cause": said},
    )


def _is_forbidden(address: str) -> bool:
    """Whether this is a socket that we may not write to; to gRPC it is as good as absent."""
    path = address.removeprefix("unix:")
    return os.access(path, os.F_OK) and not os.access(path, os.W_OK)
