"""The sections of the configuration: their keys, defaults and ranges, as frozen values.

Reads no file; `config` does, and says what is wrong across keys. `config.example.yaml` holds every
key with its default, and a test compares the two.

In YAML a duration or size carries its unit in the value (`timeout: 10m`); in Python the unit is in
the name (`timeout_s`), so those fields have an alias.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from edge_agent.engines.manifest import BACKENDS, NAME
from edge_agent.tools.settings import TOOL_NAME
from edge_agent.units import KIB, MIB, parse_duration, parse_size


def nearest(word: str, known: tuple[str, ...], prefix: str = "") -> str:
    """A hint at the known word that is most like this one; empty if none is."""
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {prefix}{close[0]}?" if close else ""


def _path(value: object) -> object:
    if value is None:
        return None
    if not isinstance(value, str) or not value.startswith("/"):
        raise ValueError("must be an absolute path")
    return Path(value)


def _backend(value: object) -> object:
    if value not in BACKENDS:
        hint = nearest(str(value), BACKENDS)
        raise ValueError(f"unknown backend, must be one of {', '.join(BACKENDS)}{hint}")
    return value


def empty_list(value: object) -> object:
    """An empty key is an empty list."""
    return () if value is None else tuple(value) if isinstance(value, list) else value


def _off(value: object) -> object:
    """YAML reads a plain `off` as false."""
    return "off" if value is False else value


def _weights(value: object) -> object:
    """Whole numbers are weights too."""
    if not isinstance(value, dict):
        return empty_mapping(value)
    return {key: float(weight) if type(weight) is int else weight for key, weight in value.items()}


def empty_mapping(value: object) -> object:
    """An empty key is an empty mapping."""
    return {} if value is None else value


Duration = Annotated[float, BeforeValidator(parse_duration)]
Size = Annotated[int, BeforeValidator(parse_size)]
Threads = Annotated[int, Field(ge=1, le=1024)]
EngineName = Annotated[str, StringConstraints(pattern=f"^{NAME.pattern}$")]
BackendKey = Annotated[str, BeforeValidator(_backend)]
AbsolutePath = Annotated[Path, BeforeValidator(_path)]
RESOURCE: Final = r"^[a-z][a-z0-9_.-]{0,63}$"
ToolName = Annotated[str, StringConstraints(pattern=f"^{TOOL_NAME.pattern}$")]


class Section(BaseModel):
    """Base: frozen, nothing converted, no key that nobody reads; empty means the defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, data: Any) -> Any:
        return {} if data is None else data


class EngineOverride(Section):
    """What this machine wants otherwise than an engine's manifest; None: as the manifest says.

    `context_tokens` can only be lowered; this is checked where the manifest is known.
    """

    slots: Annotated[int, Field(ge=1, le=64)] | None = None
    context_tokens: Annotated[int, Field(ge=256, le=1_048_576)] | None = None
    threads: Threads | None = None
    pinned: bool = False


class Log(Section):
    """What is logged, and how; `auto` is console on a terminal, JSON elsewhere."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"


class Runs(Section):
    """Defaults and bounds of runs."""

    default_engine: EngineName | None = None
    timeout_s: Duration = Field(default=600.0, alias="timeout")
    max_timeout_s: Duration = Field(default=86_400.0, alias="max_timeout")
    tool_timeout_s: Duration = Field(default=60.0, alias="tool_timeout")
    tool_call_valid_for_s: Duration = Field(default=30.0, alias="tool_call_valid_for")
    cancel_confirm_s: Duration = Field(default=5.0, alias="cancel_confirm")
    max_steps: int = Field(default=8, ge=1, le=100)
    max_tool_calls: int = Field(default=16, ge=1, le=1000)
    max_same_calls: int = Field(default=3, ge=1, le=1000)
    durable: bool = False
    suspended_retention_s: Duration = Field(default=86_400.0, alias="suspended_retention")
    max_active: int = Field(default=256, ge=1, le=10_000)
    retention_s: Duration = Field(default=900.0, alias="retention")
    max_retained: int = Field(default=1000, ge=1, le=100_000)
    # Half of a worker's largest frame at most, so that a step can carry the request.
    max_request_bytes: Size = Field(
        default=4 * MIB, ge=64 * KIB, le=32 * MIB, alias="max_request_size"
    )
    max_tools: int = Field(default=256, ge=1, le=1024)
    max_tool_result_bytes: Size = Field(default=256 * KIB, alias="max_tool_result_size")
    slow_reader_s: Duration = Field(default=30.0, alias="slow_reader")


class Scheduling(Section):
    """Which engines are in memory and what waits for them.

    `robot_reserve_bytes` and the floors None: by the machine's module (`scheduling.reserve`).
    """

    robot_reserve_bytes: Size | None = Field(default=None, alias="robot_reserve")
    memory_budget_bytes: Size | None = Field(default=None, alias="memory_budget")
    soft_floor_bytes: Size | None = Field(default=None, alias="soft_floor")
    hard_floor_bytes: Size | None = Field(default=None, alias="hard_floor")
    max_resident_engines: int = Field(default=8, ge=1, le=8)
    min_residency_s: Duration = Field(default=10.0, alias="min_residency")
    max_waiting_steps: int = Field(default=256, ge=1, le=100_000)
    client_weights: Annotated[
        Mapping[str, Annotated[float, Field(ge=0.01, le=100.0)]], BeforeValidator(_weights)
    ] = Field(default_factory=dict)
    load_timeout_s: Duration = Field(default=300.0, alias="load_timeout")
    unload_timeout_s: Duration = Field(default=10.0, alias="unload_timeout")
    memory_back_s: Duration = Field(default=5.0, alias="memory_back")
    probe_interval_s: Duration | None = Field(default=30.0, alias="probe_interval")


class Worker(Section):
    """The processes that host engines; `threads` None leaves one core free."""

    python: Annotated[Mapping[BackendKey, AbsolutePath], BeforeValidator(empty_mapping)] = Field(
        default_factory=dict
    )
    threads: Threads | None = None
    prefill_batch_tokens: int = Field(default=64, ge=8, le=2048)
    heartbeat_interval_s: Duration = Field(default=1.0, alias="heartbeat_interval")
    heartbeat_timeout_s: Duration = Field(default=30.0, alias="heartbeat_timeout")
    backlog_tokens: int = Field(default=4096, ge=1, le=1_000_000)
    backlog_age_s: Duration = Field(default=30.0, alias="backlog_age")
    oom_score_adj: int = Field(default=900, ge=0, le=1000)


class Sessions(Section):
    """Bounds of sessions, whose history the ledger keeps."""

    max_sessions: int = Field(default=256, ge=1, le=1000)
    max_history_bytes: Size = Field(
        default=256 * KIB, ge=4 * KIB, le=4 * MIB, alias="max_history_size"
    )
    retention_s: Duration = Field(default=604_800.0, alias="retention")


class Telemetry(Section):
    """How the machine is watched. `interval_s` is of memory; the rest is read more rarely."""

    sysroot: AbsolutePath = Path("/")
    interval_s: Duration = Field(default=0.25, ge=0.05, le=1.0, alias="interval")


class Ledger(Section):
    """The file that durable runs live in."""

    max_size_bytes: Size = Field(default=256 << 20, ge=4 << 20, le=64 << 30, alias="max_size")
    retention_s: Duration = Field(default=604_800.0, alias="retention")
    ballast_bytes: Size | None = Field(default=4 << 20, le=1 << 30, alias="ballast")
    bodies: Annotated[Literal["off", "errors", "all"], BeforeValidator(_off)] = "off"


class ToolServer(Section):
    """An MCP server: started with `command`, or reached at `url`; see `_server`."""

    command: Annotated[tuple[str, ...], BeforeValidator(empty_list)] = ()
    environment: Annotated[Mapping[str, str], BeforeValidator(empty_mapping)] = Field(
        default_factory=dict
    )
    directory: AbsolutePath | None = None
    url: str | None = None
    headers_file: AbsolutePath | None = None


class AllowedTool(Section):
    """A tool that the daemon executes: a built-in, or `tool` of `server`; see `_allowed`."""

    builtin: str | None = None
    server: str | None = None
    tool: str | None = None
    side_effect: Literal["NONE", "IDEMPOTENT", "NON_IDEMPOTENT"] | None = None
    timeout_s: Duration = Field(default=30.0, alias="timeout")
    rate_limit: Annotated[int, Field(ge=1, le=100_000)] | None = 60
    needs_approval: bool = False
    resources: Annotated[
        tuple[Annotated[str, StringConstraints(pattern=RESOURCE)], ...],
        BeforeValidator(empty_list),
        Field(max_length=16),
    ] = ()
    verify: ToolName | None = None


class Tools(Section):
    """What the daemon executes itself, and nothing else."""

    servers: Annotated[Mapping[EngineName, ToolServer], BeforeValidator(empty_mapping)] = Field(
        default_factory=dict
    )
    allow: Annotated[Mapping[ToolName, AllowedTool], BeforeValidator(empty_mapping)] = Field(
        default_factory=dict
    )


NAMED_SECTIONS: Final[Mapping[str, type[Section]]] = {
    "engines": EngineOverride,
    "tools.servers": ToolServer,
    "tools.allow": AllowedTool,
}
"""Sections that are found below names of the operator's own."""


class Shutdown(Section):
    """How the daemon ends."""

    grace_s: Duration = Field(default=20.0, alias="grace")
