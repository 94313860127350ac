"""What the daemon tells of itself: how it is, what memory is left, why steps wait."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from edge_agent.core import Halt, Priority, RunState


class WaitReason(enum.StrEnum):
    """Why a step waits. UNSPECIFIED as in `core.RunState`.

    PLACE: all places of its engine are taken. HEAT: fewer places are given out while the machine
    is warm. TURN: steps whose turn is sooner go first. LOADING: its engine is on its way into
    memory. TRANSITION: another engine is on its way in or out. DRAINING: engines that must make
    room finish their running steps. RESIDENCY: they have not been in memory for long enough.
    LEASE: they were loaded for steps that have not begun. ROOM: there is not enough memory whatever
    goes. PRESSURE: memory is below a floor, so nothing is loaded.
    """

    UNSPECIFIED = "UNSPECIFIED"
    PLACE = "PLACE"
    HEAT = "HEAT"
    TURN = "TURN"
    LOADING = "LOADING"
    TRANSITION = "TRANSITION"
    DRAINING = "DRAINING"
    RESIDENCY = "RESIDENCY"
    LEASE = "LEASE"
    ROOM = "ROOM"
    PRESSURE = "PRESSURE"


@dataclass(frozen=True, slots=True)
class StepWait:
    """Why one step waits now; `engines` are those in its way.

    `position` is its place among those that wait for the same engine, from 1. `starts_in_s` is
    when it is expected to start and `deadline_in_s` when it gives up; None where nobody knows or
    there is none. `missing_bytes` is what its engine lacks of memory now.
    """

    run_id: str
    client: str
    engine: str
    priority: Priority
    waited_s: float
    reason: WaitReason
    text: str
    engines: tuple[str, ...]
    position: int
    missing_bytes: int = 0
    starts_in_s: float | None = None
    deadline_in_s: float | None = None


@dataclass(frozen=True, slots=True)
class MemoryStatus:
    """What is left for engines, in bytes. None: nobody knows, or there is no such limit.

    `kept_bytes` is what engines must leave alone now: the reserve, or what others use and the soft
    floor. `room_bytes` is what one more engine may take. `level` is NORMAL, SOFT or HARD, or
    UNSPECIFIED as in `core.RunState`.
    """

    total_bytes: int
    available_bytes: int | None
    reserve_bytes: int
    budget_bytes: int | None
    soft_floor_bytes: int
    hard_floor_bytes: int
    kept_bytes: int
    committed_bytes: int
    held_bytes: int
    leaked_bytes: int
    room_bytes: int
    level: str


@dataclass(frozen=True, slots=True)
class HoldStatus:
    """Which tool call has a resource; `holding` as `runs.holds.Holding` names it."""

    resource: str
    run_id: str
    tool_call_id: str
    tool: str
    client: str
    agent: str
    holding: str


class DaemonState(enum.StrEnum):
    """Whether the daemon accepts runs. UNSPECIFIED as in `RunState`."""

    UNSPECIFIED = "UNSPECIFIED"
    READY = "READY"
    DEGRADED = "DEGRADED"
    DRAINING = "DRAINING"


@dataclass(frozen=True, slots=True)
class DaemonStatus:
    """The daemon as a whole. `memory` None: of a daemon that does not tell."""

    version: str
    state: DaemonState
    degraded_reasons: tuple[str, ...]
    pid: int
    started_at_s: float
    uptime_s: float
    runs: Mapping[RunState, int]
    engines_installed: int
    engines_loaded: int
    max_resident_engines: int
    halts: tuple[Halt, ...]
    config_path: str
    memory: MemoryStatus | None = None
    waiting_steps: int = 0
    running_steps: int = 0
    holds: tuple[HoldStatus, ...] = ()
