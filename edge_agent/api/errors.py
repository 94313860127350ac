"""Ends a call with an error.

Owns the one place where an exception becomes a gRPC status: an EdgeAgentError with all its details,
anything else INTERNAL with nothing but the id under which the log has the rest.
"""

from typing import Any, NoReturn

import grpc

from edge_agent.api.convert_error import DETAILS_KEY, status_of
from edge_agent.errors import EdgeAgentError

Context = grpc.aio.ServicerContext[Any, Any]


def internal_error(rpc_id: str) -> EdgeAgentError:
    """What a caller learns about an unexpected exception."""
    return EdgeAgentError(
        f"internal error; the daemon's log has it under rpc_id {rpc_id}",
        metadata={"rpc_id": rpc_id},
    )


async def abort(context: Context, error: EdgeAgentError) -> NoReturn:
    """End the call. Does not return before the caller has read what was sent before."""
    status = status_of(error)
    await context.abort(
        grpc.StatusCode[error.code],
        status.message,
        ((DETAILS_KEY, status.SerializeToString()),),
    )
