"""Seconds as protobuf's Duration and Timestamp hold them. Checks nothing."""

from typing import Final, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

NANOS: Final = 1_000_000_000
"""Nanoseconds in a second: `nanos` is below it."""

_Span = TypeVar("_Span", Duration, Timestamp)


def seconds(value: Duration | Timestamp) -> float:
    """A span, or Unix time."""
    return (value.seconds * NANOS + value.nanos) / NANOS  # one rounding, not two


def filled(target: _Span, value_s: float) -> _Span:
    """The target itself, saying this many seconds."""
    nanos = round(value_s * NANOS)
    target.seconds, target.nanos = nanos // NANOS, nanos % NANOS
    return target
