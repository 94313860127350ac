"""Sessions on the wire, both ways: what a run asks of one, and what there is of one."""

from edge_agent.api import convert_client, convert_response
from edge_agent.api.spans import seconds
from edge_agent.api.validation import Violations
from edge_agent.core import Overflow, Session
from edge_agent.v1 import run_service_pb2 as pb

_OVERFLOWS = {pb.SessionOverflow.Value(f"SESSION_OVERFLOW_{each}"): each for each in Overflow}


def asked(request: pb.GetSessionRequest | pb.DeleteSessionRequest) -> tuple[str, str]:
    """The session and whose it is, empty: the caller's. Raises InvalidRequest."""
    found = Violations()
    found.name("session_id", request.session_id)
    if request.client:
        found.name("client", request.client)
    found.raise_if_any()
    return request.session_id, request.client


def session(value: Session) -> pb.Session:
    """A session, with the history that it has here."""
    return pb.Session(
        id=value.id,
        client=value.client,
        overflow=convert_response.OVERFLOWS[value.overflow],
        created_at=convert_response.timestamp(value.created_at_s),
        used_at=convert_response.timestamp(value.used_at_s),
        runs=value.runs,
        run_id=value.run_id,
        messages=map(convert_response.message, value.messages),
    )


def read(value: pb.Session) -> Session:
    """The same from the wire; an unknown overflow is REFUSE, which drops nothing."""
    return Session(
        id=value.id,
        client=value.client,
        overflow=_OVERFLOWS.get(value.overflow, Overflow.REFUSE),
        created_at_s=seconds(value.created_at),
        used_at_s=seconds(value.used_at),
        runs=value.runs,
        run_id=value.run_id,
        messages=tuple(map(convert_client.message, value.messages)),
    )
