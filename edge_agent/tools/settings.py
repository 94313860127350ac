"""What the configuration says about the daemon's own tools."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from edge_agent.core import SideEffect

TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
CLOCK: Final = "clock"
DEVICE_STATUS: Final = "device_status"
BUILTINS: Final = (CLOCK, DEVICE_STATUS)


class CommandServer(msgspec.Struct, frozen=True, tag="command"):
    """An MCP server that we start and speak to over its standard input and output.

    `command` begins with the absolute path of a program. `environment` is added to the little that
    is inherited. `directory` None: the daemon's.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str] = msgspec.field(default_factory=dict)
    directory: str | None = None


class HttpServer(msgspec.Struct, frozen=True, tag="http"):
    """An MCP server that somebody else runs, over streamable HTTP.

    `headers_file` holds lines `Name: value`, sent with each request; read at each connection.
    """

    url: str
    headers_file: str | None = None


Server = CommandServer | HttpServer


@dataclass(frozen=True, slots=True)
class Builtin:
    """One of BUILTINS."""

    name: str


@dataclass(frozen=True, slots=True)
class ServerTool:
    """A tool by its server's name for it."""

    server: str
    tool: str


@dataclass(frozen=True, slots=True)
class AllowedTool:
    """One entry of the allow-list. `rate_limit` is in calls a minute; None: as many as come.

    `resources` and `verify` as in `core.Tool`.
    """

    source: Builtin | ServerTool
    side_effect: SideEffect
    timeout_s: float
    rate_limit: int | None = None
    needs_approval: bool = False
    resources: tuple[str, ...] = ()
    verify: str = ""


@dataclass(frozen=True, slots=True)
class ToolsSettings:
    """Servers and the allow-list, by name.

    `connect_timeout_s` bounds each look at a server's tools, `look_interval_s` is how often that
    happens where the server tells nothing, `first_pause_s` is before the first new try after a
    failure (twice as long each time), and a silent process is killed after `heartbeat_timeout_s`.
    """

    servers: Mapping[str, Server] = field(default_factory=dict)
    allow: Mapping[str, AllowedTool] = field(default_factory=dict)
    max_result_bytes: int = 256 * 1024
    oom_score_adj: int = 900
    connect_timeout_s: float = 30.0
    look_interval_s: float = 30.0
    first_pause_s: float = 1.0
    heartbeat_interval_s: float = 5.0
    heartbeat_timeout_s: float = 30.0
