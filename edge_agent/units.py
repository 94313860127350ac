"""Durations and sizes as people write them: `30s`, `500ms`, `2GiB`.

Pure. A number without a unit is refused: seconds or minutes, bytes or megabytes is never guessed.
"""

import re
from decimal import Decimal
from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

MAX_DURATION_S: Final = 365 * 24 * 3600.0
MAX_SIZE_BYTES: Final = 1 << 50

DURATION_RULE: Final = "must be a duration with a unit, such as 500ms, 30s, 2m or 1h"
SIZE_RULE: Final = "must be a size with a unit, such as 512B, 64KiB, 512MiB or 2GiB"

_NUMBER = r"([0-9]{1,16}(?:\.[0-9]{1,40})?)"
_DURATION = re.compile(_NUMBER + r" ?(ms|s|m|h)")
_SIZE = re.compile(_NUMBER + r" ?(B|KiB|MiB|GiB|TiB)")
_DURATION_UNITS_S: Final = {
    "h": Decimal(3600),
    "m": Decimal(60),
    "s": Decimal(1),
    "ms": Decimal("0.001"),
}
_SIZE_UNITS_BYTES: Final = {"TiB": 1 << 40, "GiB": GIB, "MiB": MIB, "KiB": KIB, "B": 1}


def parse_duration(text: object) -> float:
    """Seconds of a duration such as `30s`; above 0, at most MAX_DURATION_S.

    Raises:
        ValueError: names the rule or the limit, not the value.
    """
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(DURATION_RULE)
    seconds = float(Decimal(match[1]) * _DURATION_UNITS_S[match[2]])
    if seconds <= 0:
        raise ValueError("must be above 0")
    if seconds > MAX_DURATION_S:
        raise ValueError(f"must be at most {format_duration(MAX_DURATION_S)}")
    return seconds


def parse_size(text: object) -> int:
    """Bytes of a size such as `2GiB`; above 0, at most MAX_SIZE_BYTES, a whole number of bytes.

    Raises:
        ValueError: names the rule or the limit, not the value.
    """
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(SIZE_RULE)
    size = Decimal(match[1]) * _SIZE_UNITS_BYTES[match[2]]
    if size != size.to_integral_value():
        raise ValueError("must be a whole number of bytes")
    if size <= 0:
        raise ValueError("must be above 0")
    if size > MAX_SIZE_BYTES:
        raise ValueError(f"must be at most {format_size(MAX_SIZE_BYTES)}")
    return int(size)


def format_duration(seconds: float) -> str:
    """The shortest exact text that `parse_duration` reads as `seconds`."""
    exact = Decimal(repr(seconds))
    for unit, factor in _DURATION_UNITS_S.items():
        count = exact / factor
        if count == count.to_integral_value():
            return f"{count:f}".partition(".")[0] + unit
    return f"{exact:f}s"


def format_size(size_bytes: int) -> str:
    """The shortest exact text that `parse_size` reads as `size_bytes`."""
    for unit, factor in _SIZE_UNITS_BYTES.items():
        if size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return f"{size_bytes}B"


def size_text(size_bytes: int) -> str:
    """For people, in the largest unit of which there is at least one."""
    if size_bytes >= GIB:
        return f"{size_bytes / GIB:.1f} GiB"
    return f"{size_bytes / MIB:.0f} MiB" if size_bytes >= MIB else f"{size_bytes >> 10} KiB"
