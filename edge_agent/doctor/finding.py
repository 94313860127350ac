"""One line of what doctor says.

Pure. FAIL is for what the configuration needs and this machine lacks; WARN for what a user would
want to mend; UNKNOWN for what can't be told here. All but OK say what to do about it.
"""

from dataclasses import dataclass
from enum import StrEnum

from edge_agent.telemetry.reading import Reading, ReadingStatus


class FindingStatus(StrEnum):
    """How a thing is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, how it is, and what to do. The names are stable."""

    name: str
    status: FindingStatus
    value: str
    hint: str = ""

    def printable(self) -> "Finding":
        """The same with nothing in it that could confuse a terminal or JSON."""
        texts = (self.name, self.value, self.hint)
        name, value, hint = (_printable(text) for text in texts)
        return Finding(name, self.status, value, hint)


def good(name: str, value: str) -> Finding:
    """All right."""
    return Finding(name, FindingStatus.OK, value)


def warn(name: str, value: str, hint: str) -> Finding:
    """Works, but not as well as it could."""
    return Finding(name, FindingStatus.WARN, value, hint)


def fail(name: str, value: str, hint: str) -> Finding:
    """The configuration needs it."""
    return Finding(name, FindingStatus.FAIL, value, hint)


def unknown(name: str, value: str, hint: str) -> Finding:
    """Can't be told."""
    return Finding(name, FindingStatus.UNKNOWN, value, hint)


def unread(name: str, reading: Reading[object], hint: str) -> Finding:
    """A reading without a value, with where it should have come from."""
    return unknown(name, f"{reading.source}: {reading.detail}", hint)


def worst(findings: tuple[Finding, ...]) -> FindingStatus:
    """FAIL before WARN before OK; what is unknown is no fault."""
    for status in (FindingStatus.FAIL, FindingStatus.WARN):
        if any(finding.status is status for finding in findings):
            return status
    return FindingStatus.OK


def is_absent(reading: Reading[object]) -> bool:
    """The machine has no such thing, as opposed to one that can't be read."""
    return reading.status is ReadingStatus.UNSUPPORTED


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
