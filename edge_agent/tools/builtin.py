"""The tools that are part of the daemon: the time, and how the device is.

They read and change nothing. What they don't know is null.
"""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final

import msgspec

from edge_agent.tools.settings import CLOCK, DEVICE_STATUS

NO_ARGUMENTS: Final = '{"type":"object","properties":{},"additionalProperties":false}'
DESCRIPTIONS: Final = {
    CLOCK: "The time now: local and UTC (ISO 8601), the weekday, how long the machine is up.",
    DEVICE_STATUS: (
        "How this device is: memory, temperatures, power mode, engines. null is not known."
    ),
}

_WEEKDAYS: Final = (
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
)


def now_utc() -> datetime:
    """The wall clock."""
    return datetime.now(UTC)


def machine_uptime_s() -> float:
    """Seconds since the machine started, suspended ones included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def clock(now: datetime, uptime_s: float) -> str:
    """A JSON object; `now` has a time zone, and local is the machine's."""
    local = now.astimezone()
    said = {
        "local": local.isoformat(timespec="seconds"),
        "utc": now.astimezone(UTC).isoformat(timespec="seconds"),
        "weekday": _WEEKDAYS[local.weekday()],
        "time_zone": local.tzname(),
        "uptime_s": round(uptime_s),
    }
    return msgspec.json.encode(said).decode()


def device_status(status: Callable[[], Mapping[str, object]]) -> str:
    """A JSON object of what the daemon knows."""
    return msgspec.json.encode(status()).decode()
