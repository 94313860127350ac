"""One value that was read from the machine, or why there is none.

Pure. Unknown is None, never 0: a metric that the hardware does not have must not look like an idle
one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
U = TypeVar("U")


class ReadingStatus(StrEnum):
    """How it went. STALE has the last value that was read, all others but OK have none."""

    OK = "ok"
    UNSUPPORTED = "unsupported"
    ERROR = "error"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Reading(Generic[T_co]):
    """A value with its source, or None and the reason in `detail`."""

    value: T_co | None
    source: str
    status: ReadingStatus
    detail: str = ""

    def __post_init__(self) -> None:
        """A value where there is none, or none where there is one, is a mistake of ours."""
        has_value = self.status in (ReadingStatus.OK, ReadingStatus.STALE)
        if has_value != (self.value is not None):
            raise ValueError(f"{self.source}: {self.status} with the value {self.value!r}")

    def parsed(self, parse: Callable[[T_co], U | None]) -> "Reading[U]":
        """The value as `parse` understands it; None from it means that it makes no sense."""
        if self.value is None:
            return Reading(None, self.source, self.status, self.detail)
        value = parse(self.value)
        if value is None:
            return failed(self.source, "makes no sense")
        return Reading(value, self.source, self.status, self.detail)


def ok(value: T, source: str) -> Reading[T]:
    """It was read."""
    return Reading(value, source, ReadingStatus.OK)


def unsupported(source: str, detail: str) -> Reading[T]:
    """This machine does not have it, or not yet."""
    return Reading(None, source, ReadingStatus.UNSUPPORTED, detail)


def failed(source: str, detail: str) -> Reading[T]:
    """It should be there, and can't be read or makes no sense."""
    return Reading(None, source, ReadingStatus.ERROR, detail)


def stale(value: T, source: str, detail: str) -> Reading[T]:
    """It was read, and does not hold any more."""
    return Reading(value, source, ReadingStatus.STALE, detail)
