"""The domain's frozen values: what runs, steps, tools and engines are.

No I/O, no clock, no gRPC, and nothing beyond the standard library and msgspec: workers import this
module too, and these values are what the frames between them and the daemon carry. Units are in the
names; unknown is `None`.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

ANSWER = "answer"
"""The name of the branch in which the model answers in words instead of calling a tool."""


class Role(enum.StrEnum):
    """Who wrote a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class PartKind(enum.StrEnum):
    """What a non-text part holds."""

    IMAGE = "image"
    AUDIO = "audio"


class TextPart(msgspec.Struct, frozen=True, tag="text"):
    """A piece of text."""

    text: str


class BlobPart(msgspec.Struct, frozen=True, tag="blob"):
    """An image or a sound."""

    kind: PartKind
    media_type: str
    data: bytes


Part = TextPart | BlobPart


@dataclass(frozen=True, slots=True, order=True)
class Fence:
    """Orders calls: `epoch` rises with each start of the daemon, `sequence` with each call.

    A driver that has seen a higher one refuses the call (fencing tokens: Kleppmann 2016).
    """

    epoch: int
    sequence: int


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One invocation that the model decided on; `arguments_json` is a JSON object.

    `fence` is set where its tool uses resources.
    """

    id: str
    name: str
    arguments_json: str
    valid_for_s: float | None = None
    observed_ago_s: float | None = None
    fence: Fence | None = None


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What came of a tool call; `error` says why the daemon did not have it executed."""

    tool_call_id: str
    parts: tuple[Part, ...]
    is_error: bool = False
    cancelled: bool = False
    error: "RunError | None" = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of the conversation. `is_summary`: it stands for older ones of its session."""

    role: Role
    parts: tuple[Part, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    is_error: bool = False
    is_summary: bool = False

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


@dataclass(frozen=True, slots=True)
class ToolExample:
    """A goal in a user's words and the arguments of the right call."""

    goal: str
    arguments_json: str
    result: str = ""


class SideEffect(enum.StrEnum):
    """What a call of a tool leaves behind.

    NONE: nothing, so that it may be called again at will. IDEMPOTENT: once is as good as twice.
    NON_IDEMPOTENT: never twice; the default of whoever says nothing.
    """

    NONE = "NONE"
    IDEMPOTENT = "IDEMPOTENT"
    NON_IDEMPOTENT = "NON_IDEMPOTENT"


class Executor(enum.StrEnum):
    """Who executes a tool's calls: the caller, or the daemon from its allow-list."""

    CALLER = "CALLER"
    DAEMON = "DAEMON"


class Lifecycle(enum.StrEnum):
    """How long a tool's doing lasts.

    INSTANT: with the result all is done. BACKGROUND: the result says that it has begun, and updates
    tell of the rest.
    """

    INSTANT = "INSTANT"
    BACKGROUND = "BACKGROUND"


class ToolStrategy(enum.StrEnum):
    """How a step gets a model to choose among tools; `decoding.steps` says what each does."""

    NATIVE = "native"
    SCHEMA = "schema"
    RANKED = "ranked"
    RANKED_FULL = "ranked_full"


@dataclass(frozen=True, slots=True)
class Tool:
    """Something that can be done for the model.

    Calls of a tool with `needs_approval` wait until somebody has approved them. `resources` are
    what a call has to itself. `verify` names the tool that tells whether a call acted.
    """

    name: str
    description: str
    input_schema_json: str
    examples: tuple[ToolExample, ...] = ()
    timeout_s: float | None = None
    valid_for_s: float | None = None
    side_effect: SideEffect = SideEffect.NON_IDEMPOTENT
    executor: Executor = Executor.CALLER
    needs_approval: bool = False
    lifecycle: Lifecycle = Lifecycle.INSTANT
    resources: tuple[str, ...] = ()
    verify: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a run.

    `max_output_tokens` is per step, None means the engine's maximum; `max_tokens` is over all
    steps, read and written, and so is `max_cost_nano_usd`; None means no bound. A call of the same
    tool with the same arguments may come `max_same_calls` times.
    """

    max_steps: int
    max_tool_calls: int
    max_output_tokens: int | None = None
    max_tokens: int | None = None
    max_same_calls: int = 3
    max_cost_nano_usd: int | None = None


class Priority(enum.StrEnum):
    """How soon a run's steps go, most urgent first. A BATCH step may be preempted."""

    URGENT = "URGENT"
    INTERACTIVE = "INTERACTIVE"
    NORMAL = "NORMAL"
    BATCH = "BATCH"

    @property
    def rank(self) -> int:
        """0 is the most urgent."""
        return _RANKS[self]


_RANKS = {priority: rank for rank, priority in enumerate(Priority)}


class Overflow(enum.StrEnum):
    """What is done where a session's history and what is new do not fit into the context.

    DROP_OLDEST and SUMMARISE act on the oldest whole turns.
    """

    REFUSE = "REFUSE"
    DROP_OLDEST = "DROP_OLDEST"
    SUMMARISE = "SUMMARISE"


@dataclass(frozen=True, slots=True)
class SessionUse:
    """The session that a run belongs to, by its client's name for it.

    `overflow` None: as the session has it, REFUSE for a new one.
    """

    id: str
    overflow: Overflow | None = None


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What a caller asks for, with every default filled in."""

    messages: tuple[Message, ...]
    engine: str
    limits: Limits
    timeout_s: float
    tools: tuple[Tool, ...] = ()
    output_schema_json: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    agent: str = ""
    priority: Priority = Priority.NORMAL
    durable: bool = False
    tool_strategy: ToolStrategy | None = None
    session: SessionUse | None = None


class RunState(enum.StrEnum):
    """Where a run is. UNSPECIFIED is what a client reads for a state that it does not know.

    SUSPENDED: something interrupted it; it goes on when somebody resumes it.
    """

    UNSPECIFIED = "UNSPECIFIED"
    QUEUED = "QUEUED"
    LOADING = "LOADING"
    RUNNING = "RUNNING"
    WAITING_TOOL = "WAITING_TOOL"
    WAITING_APPROVAL = "WAITING_APPROVAL"
    SUSPENDED = "SUSPENDED"
    CANCELLING = "CANCELLING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"
    OUTCOME_UNKNOWN = "OUTCOME_UNKNOWN"

    @property
    def ended(self) -> bool:
        """Nothing more happens to a run in this state."""
        return self in _ENDED


_ENDED = frozenset(
    {
        RunState.SUCCEEDED,
        RunState.FAILED,
        RunState.CANCELLED,
        RunState.EXPIRED,
        RunState.OUTCOME_UNKNOWN,
    }
)


@dataclass(frozen=True, slots=True)
class RunError:
    """Why something ended as it did; `reason` is UPPER_SNAKE_CASE and stable."""

    reason: str
    message: str
    retryable: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a step or a run consumed. A step that an engine here decides costs nothing."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_s: float = 0.0
    load_s: float = 0.0
    decode_s: float = 0.0
    ttft_ms: float | None = None
    cost_nano_usd: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed; None before anything was decoded."""
        return self.completion_tokens / self.decode_s if self.decode_s > 0 else None

    def plus(self, later: "Usage") -> "Usage":
        """The sum; the time to the first token stays the first step's."""
        return Usage(
            prompt_tokens=self.prompt_tokens + later.prompt_tokens,
            cached_tokens=self.cached_tokens + later.cached_tokens,
            completion_tokens=self.completion_tokens + later.completion_tokens,
            queue_s=self.queue_s + later.queue_s,
            load_s=self.load_s + later.load_s,
            decode_s=self.decode_s + later.decode_s,
            ttft_ms=later.ttft_ms if self.ttft_ms is None else self.ttft_ms,
            cost_nano_usd=self.cost_nano_usd + later.cost_nano_usd,
        )


class FinishReason(enum.StrEnum):
    """Why decoding a step stopped. UNSPECIFIED as in `RunState`."""

    UNSPECIFIED = "UNSPECIFIED"
    STOP = "STOP"
    TOOL_CALLS = "TOOL_CALLS"
    TRUNCATED = "TRUNCATED"


@dataclass(frozen=True, slots=True)
class StepRequest:
    """One model decision to be made.

    `answer_only` closes every branch but the answer (the last step that a run may take).
    `resume_text` is what the model has written already of a free text: it goes on after it.
    `tool_strategy` None: the engine's own.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    output_schema_json: str = ""
    answer_only: bool = False
    max_output_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    resume_text: str = ""
    tool_strategy: ToolStrategy | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the model decided: a text, or tool calls whose ids the run assigns.

    `repaired`: what it decided first was invalid, and it was shown why.
    """

    text: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    usage: Usage
    tool_margin: float | None = None
    repaired: bool = False


@dataclass(frozen=True, slots=True)
class StepOrigin:
    """Whose step it is, and by when it is worth having.

    `deadline_s` is on the monotonic clock of the daemon's loop; `run_id` is empty for a step that
    belongs to no run.
    """

    client: str
    priority: Priority = Priority.NORMAL
    deadline_s: float | None = None
    run_id: str = ""


class EngineState(enum.StrEnum):
    """Whether an installed engine is in memory. UNSPECIFIED as in `RunState`.

    LEAKED: its process is gone and its memory did not come back.
    """

    UNSPECIFIED = "UNSPECIFIED"
    INSTALLED = "INSTALLED"
    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    STOPPING = "STOPPING"
    FAILED = "FAILED"
    LEAKED = "LEAKED"


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """The process that hosts a loaded engine."""

    pid: int
    slots: int
    active_steps: int
    waiting_steps: int
    load_s: float | None


@dataclass(frozen=True, slots=True)
class MeasuredLoad:
    """What one load of an engine was seen to take; `measured_at_s` is Unix time.

    `source` is how it was seen: `process` (the worker's own memory) or `available` (by how much
    MemAvailable fell).
    """

    load_peak_bytes: int
    steady_bytes: int
    source: str
    measured_at_s: float


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """An installed engine as the daemon sees it.

    `load_peak_bytes` and `steady_bytes` are what is reserved for it: what the manifest estimates
    (`estimated_...`), corrected by `measurements` (oldest first). `leaked_bytes` did not come back
    from its last process.
    """

    name: str
    digest: str
    backend: str
    state: EngineState
    context_tokens: int
    max_output_tokens: int
    load_peak_bytes: int
    steady_bytes: int
    capabilities: tuple[str, ...]
    licence: str
    worker: WorkerInfo | None = None
    error: RunError | None = None
    load_progress: float | None = None
    pinned: bool = False
    quarantined: bool = False
    leaked_bytes: int = 0
    measurements: tuple[MeasuredLoad, ...] = ()
    estimated_load_peak_bytes: int = 0
    estimated_steady_bytes: int = 0
    template_hash: str = ""


class HaltScope(enum.StrEnum):
    """What a Halt stops."""

    ALL = "ALL"
    CLIENT = "CLIENT"
    AGENT = "AGENT"
    TOOL = "TOOL"


@dataclass(frozen=True, slots=True)
class Halt:
    """One latched Halt; `target` is empty for ALL. `created_at_s` is Unix time."""

    id: str
    scope: HaltScope
    target: str
    reason: str
    client: str
    created_at_s: float


@dataclass(frozen=True, slots=True)
class RunTelemetry:
    """The whole machine between a run's acceptance and its end, other runs included."""

    energy_mj: float | None = None
    min_available_bytes: int | None = None
    max_temperature_milli_c: int | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """A run as it stands. `sequence` is the last event that this value includes.

    `created_at_s` and `ended_at_s` are Unix times, for people; waiting uses the monotonic clock.
    `open_tool_calls` wait for the caller's results, `daemon_tool_calls` for the daemon's own, and
    `unapproved_tool_calls` for somebody's approval; `background_tool_calls` have begun and go on.
    `pending_messages` join the transcript once the model's calls have their results. `error` says
    why it is SUSPENDED or CANCELLING, or why it ended otherwise than by an answer. `result_number`
    orders what `WaitResults` delivers.
    """

    id: str
    request_id: str
    client: str
    agent: str
    engine: str
    state: RunState
    created_at_s: float
    sequence: int = 0
    ended_at_s: float | None = None
    steps: int = 0
    transcript: tuple[Message, ...] = ()
    open_tool_calls: tuple[ToolCall, ...] = ()
    partial_text: str = ""
    answer: str | None = None
    error: RunError | None = None
    usage: Usage = field(default_factory=Usage)
    telemetry: RunTelemetry | None = None
    priority: Priority = Priority.NORMAL
    durable: bool = False
    daemon_tool_calls: tuple[ToolCall, ...] = ()
    unapproved_tool_calls: tuple[ToolCall, ...] = ()
    background_tool_calls: tuple[ToolCall, ...] = ()
    pending_messages: tuple[Message, ...] = ()
    result_number: int | None = None
    session: str = ""


@dataclass(frozen=True, slots=True)
class Session:
    """What the runs of a session have said, and how it is used. Times are Unix times.

    `runs` have ended in it; `run_id` is of the one that goes on, empty if none does. `messages`
    begin with the system's where there is one.
    """

    id: str
    client: str
    overflow: Overflow
    created_at_s: float
    used_at_s: float
    runs: int = 0
    messages: tuple[Message, ...] = ()
    run_id: str = ""


@dataclass(frozen=True, slots=True)
class HaltOutcome:
    """What a Halt did. `recorded` False: it acts, but could not be written to disk."""

    halt: Halt
    runs_stopped: int
    recorded: bool
