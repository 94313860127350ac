"""The messages between the daemon and the process that speaks to MCP servers.

Version 1: each frame (`edge_agent.frames`) is one MessagePack map, tagged by `t`. The process
begins with `Hello`, the daemon with `Open`; both carry the version and a mismatch ends the process.
"""

from collections.abc import Mapping

import msgspec

from edge_agent import frames
from edge_agent.tools.settings import Server

PROTOCOL_VERSION = 1


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="t"):
    """Base: after the versions agreed, a field that one end does not know is a fault."""


class Open(_Message, frozen=True, forbid_unknown_fields=False, tag="open"):
    """Connect to these servers; `wanted` are the tools that may be called. Sent once."""

    version: int
    servers: Mapping[str, Server]
    wanted: Mapping[str, tuple[str, ...]]
    max_result_bytes: int
    connect_timeout_s: float
    look_interval_s: float
    first_pause_s: float


class Call(_Message, frozen=True, tag="call"):
    """Call a tool; `id` is unique within the process. `arguments_json` is a JSON object."""

    id: int
    server: str
    tool: str
    arguments_json: str


class Cancel(_Message, frozen=True, tag="cancel"):
    """Nobody waits for this call any more; it is not answered."""

    id: int


class Ping(_Message, frozen=True, tag="ping"):
    """Answered by `Pong` from the process's loop."""

    nonce: int


class Shutdown(_Message, frozen=True, tag="shutdown"):
    """End the servers that were started, then end."""


class Hello(_Message, frozen=True, forbid_unknown_fields=False, tag="hello"):
    """The process is up."""

    version: int


class Pong(_Message, frozen=True, tag="pong"):
    """The answer to `Ping`."""

    nonce: int


class ListedTool(msgspec.Struct, frozen=True):
    """A tool as its server describes it."""

    name: str
    description: str
    input_schema_json: str


class Listed(_Message, frozen=True, tag="listed"):
    """The server is up and has these of the wanted tools; `refused` says what is wrong by name."""

    server: str
    tools: tuple[ListedTool, ...]
    refused: Mapping[str, str]


class Down(_Message, frozen=True, tag="down"):
    """The server is not up, and why; it is tried again."""

    server: str
    why: str


class Answered(_Message, frozen=True, tag="answered"):
    """What the tool said, or its own error; no more text than `Open.max_result_bytes`.

    `too_large`: it said more, and `text` tells that.
    """

    id: int
    text: str
    is_error: bool
    too_large: bool = False


class Failed(_Message, frozen=True, tag="failed"):
    """The call has no result. `begun`: the server may have got it."""

    id: int
    why: str
    begun: bool


ToProcess = Open | Call | Cancel | Ping | Shutdown
ToDaemon = Hello | Pong | Listed | Down | Answered | Failed

_encoder = msgspec.msgpack.Encoder()
to_process_decoder = msgspec.msgpack.Decoder(ToProcess)
to_daemon_decoder = msgspec.msgpack.Decoder(ToDaemon)


def encode(message: ToProcess | ToDaemon) -> bytes:
    """One whole frame.

    Raises:
        ValueError: it would exceed `frames.MAX_FRAME_BYTES`.
    """
    return frames.frame(_encoder.encode(message))
