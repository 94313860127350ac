"""What the configuration says about runs; replaced as a whole on reload."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Defaults and bounds. `retention_s` counts from a run's end.

    `halt_settle_s` is how long a Halt's answer waits at most for the disk, so that what was about
    to be shown of durable runs is shown; what a slower one shows later is cancelled already.

    `max_sessions` are of all clients; `max_history_bytes` is of one session's texts.
    """

    tool_timeout_s: float
    tool_call_valid_for_s: float
    cancel_confirm_s: float
    max_active: int
    retention_s: float
    max_retained: int
    suspended_retention_s: float = 86_400.0
    bodies: Literal["off", "errors", "all"] = "off"
    max_sessions: int = 256
    max_history_bytes: int = 256 << 10
    halt_settle_s: float = 0.1
