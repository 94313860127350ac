"""What the scheduler's decisions are made from, and what it decides. Frozen, no I/O.

Times are seconds on one monotonic clock, handed in by the owner. Unknown is None.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_agent.core import Priority
from edge_agent.errors import EdgeAgentError


@dataclass(frozen=True, slots=True)
class QueuedStep:
    """One step that wants a place in an engine.

    `need_tokens` is the most that it can fill of the engine's KV cache, prompt and output together:
    all of it is reserved before the step starts. `prompt_tokens` and `output_tokens` are what is
    expected, for estimates. `load_only`: whoever asks wants the engine in memory and nothing more.
    `probe`: it never causes a load.
    """

    id: int
    engine: str
    client: str
    priority: Priority
    asked_s: float
    need_tokens: int
    prompt_tokens: int = 0
    output_tokens: int = 0
    deadline_s: float | None = None
    run_id: str = ""
    load_only: bool = False
    probe: bool = False
    preemptible: bool = False


@dataclass(frozen=True, slots=True)
class Footprint:
    """What an engine takes: at the worst moment of its load, and afterwards at its largest step."""

    load_peak_bytes: int
    steady_bytes: int


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """An installed engine, as far as decisions need it.

    `kv_tokens` is how many tokens its KV cache holds over all slots. `cache_bytes` of the steady
    need can be given back without unloading it (idle prefix caches). `load_s` is what a load takes
    here; `weight` makes it dearer to lose; `refusal` is why it must not be loaded (quarantine).
    """

    name: str
    footprint: Footprint
    slots: int
    kv_tokens: int
    load_s: float
    cache_bytes: int = 0
    weight: float = 1.0
    refusal: EdgeAgentError | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory that engines are loaded into: the machine's, or a discrete card's own."""

    total_bytes: int
    available_bytes: int | None


class Heat(enum.Enum):
    """How warm the machine is. UNKNOWN: a sensor that should answer does not, so never nominal."""

    NOMINAL = "nominal"
    UNKNOWN = "unknown"
    WARM = "warm"
    THROTTLED = "throttled"


@dataclass(frozen=True, slots=True)
class MachineView:
    """What telemetry says, as far as decisions need it; percentages are of wall time (PSI).

    `power_mode` is nvpmodel's number: each has a pace of its own.
    """

    memory: Memory
    stalled_some_percent: float | None = None
    stalled_full_percent: float | None = None
    heat: Heat = Heat.NOMINAL
    power_mode: int | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """From the configuration; replaced as a whole on reload.

    `reserve_bytes` is what the rest of the robot needs, `budget_bytes` the most that all engines
    may take together. Below `soft_floor_bytes` of free memory nothing is loaded and idle engines
    go; below `hard_floor_bytes` workers are killed, the least important first.
    """

    reserve_bytes: int
    soft_floor_bytes: int
    hard_floor_bytes: int
    budget_bytes: int | None = None
    max_resident_engines: int = 8
    max_waiting_steps: int = 256
    min_residency_s: float = 10.0
    residency_per_load: float = 8.0
    soft_stalled_percent: float = 20.0
    client_weights: Mapping[str, float] = field(default_factory=dict)


# --- what is decided: the owner carries these out, in order ---


@dataclass(frozen=True, slots=True)
class Start:
    """Hand the step to the engine's worker; its place is taken."""

    step: QueuedStep


@dataclass(frozen=True, slots=True)
class Preempt:
    """Stop this running step at its next token; it is queued again when the worker has let go."""

    step: QueuedStep
    by: QueuedStep


@dataclass(frozen=True, slots=True)
class Load:
    """Bring the engine into memory. `attempt` is 2 after room was made for a failed first one."""

    engine: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Unload:
    """End the engine's process, which nothing uses; `why` is a reason code."""

    engine: str
    why: str


@dataclass(frozen=True, slots=True)
class Kill:
    """End the engine's process at once, below the hard floor. Its steps are queued again."""

    engine: str


@dataclass(frozen=True, slots=True)
class DropCache:
    """Give back the memory of the engine's idle prefix caches."""

    engine: str


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine that a `load_only` step asked for is in memory; the step has ended."""

    step: QueuedStep


@dataclass(frozen=True, slots=True)
class Refuse:
    """The waiting step ends with this error."""

    step: QueuedStep
    error: EdgeAgentError


Action = Start | Preempt | Load | Unload | Kill | DropCache | Ready | Refuse
