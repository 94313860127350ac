"""What the configuration says about runs; replaced as a whole on reload."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class RunSettings:
    """Defaults and bounds. `retention_s` counts from a run's end.

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
