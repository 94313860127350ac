"""Checks of single fields that collect every violation of a request.

Owns how a violation reads: field path, value (shortened), limit. Knows JSON, durations and text,
not what a run is.
"""

import json
import math
import re
from itertools import accumulate

from google.protobuf.duration_pb2 import Duration

from edge_agent.api.spans import NANOS, seconds
from edge_agent.errors import FieldViolation, InvalidRequest, Unsupported

MAX_JSON_DEPTH = 64
MAX_JSON_CHARACTERS = 1 << 20
MAX_JSON_BRACKETS = 1 << 16
"""Of all JSON in one request, like the characters: reading it may not hold up the daemon's loop."""
SHOWN_CHARACTERS = 64
MAX_NAME_BYTES = 64
_MAX_DURATION_S = 315_576_000_000
"""Of google.protobuf.Duration: 10,000 years."""
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_NO_BRACKET = re.compile(r"[^][{}]+")
_STEP = {"[": 1, "{": 1, "]": -1, "}": -1}
_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a whole pair
    r"|(?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2})|(?P<nul>u0000)|.)",
    re.DOTALL,
)


class Violations:
    """Everything that is wrong with one request, in the order in which it was found."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []
        self._unsupported: list[str] = []
        self._json_characters = 0
        self._json_brackets = 0

    def add(self, path: str, description: str) -> None:
        """Note that the field at `path` is wrong."""
        self._found.append(FieldViolation(path, description))

    def add_unsupported(self, path: str) -> None:
        """Note a part that no engine of this release takes."""
        self._unsupported.append(path)

    def raise_if_any(self) -> None:
        """Raise InvalidRequest with all of them, or Unsupported where only parts are in the way."""
        if self._found:
            first = self._found[0]
            more = f" (and {len(self._found) - 1} more)" if len(self._found) > 1 else ""
            raise InvalidRequest(
                f"{first.field}: {first.description}{more}",
                metadata={"field": first.field, "violations": len(self._found)},
                violations=self._found,
            )
        if self._unsupported:
            part = self._unsupported[0]
            raise Unsupported(
                f"{part}: engines of this release take text only; leave the part out",
                reason="UNSUPPORTED_PART",
                metadata={"part": part, "parts": len(self._unsupported)},
            )

    def text(self, path: str, value: str, *, max_bytes: int | None = None) -> None:
        """Refuse NUL characters and more than `max_bytes` of UTF-8."""
        if "\0" in value:
            self.add(path, f"{shown(value)} has a NUL character at {value.index(chr(0))}")
        if max_bytes is not None:
            size = len(value.encode())
            if size > max_bytes:
                self.add(path, f"{shown(value)} has {size} bytes, at most {max_bytes} allowed")

    def name(self, path: str, value: str) -> None:
        """Refuse an empty or long name."""
        if not value:
            self.add(path, "is empty")
        self.text(path, value, max_bytes=MAX_NAME_BYTES)

    def count(self, path: str, found: int, most: int, what: str) -> bool:
        """Refuse more than `most` of something; whether they are few enough to look at each."""
        if found > most:
            self.add(path, f"{found} {what}, at most {most} allowed")
        return found <= most

    def number(self, path: str, value: float, low: float, high: float) -> None:
        """Refuse what is not a number from `low` to `high`."""
        if not low <= value <= high:  # NaN compares false
            self.add(path, f"{value:g} is not in {low:g} to {high:g}")

    def duration_s(self, path: str, value: Duration, max_s: float | None = None) -> float | None:
        """Seconds above 0 and at most `max_s`; None where refused."""
        if abs(value.seconds) > _MAX_DURATION_S or abs(value.nanos) >= NANOS:
            self.add(path, f"{value.seconds}s {value.nanos}ns is no valid Duration")
            return None
        span_s = seconds(value)
        if span_s <= 0 or value.nanos < 0:
            self.add(path, f"{span_s:g}s is not above 0s")
            return None
        if max_s is not None and span_s > max_s:
            self.add(path, f"{span_s:g}s is above the limit of {max_s:g}s")
            return None
        return span_s

    def json_object(self, path: str, text: str) -> dict[str, object] | None:
        """The JSON object in `text`; None where it is refused."""
        self.text(path, text)
        if not self._room_for_json(path, text):
            return None
        try:
            value = _parse(text)
        except RecursionError:
            self.add(path, f"{shown(text)} is nested deeper than {MAX_JSON_DEPTH} levels")
            return None
        except ValueError as error:
            self.add(path, f"{shown(text)} is not JSON: {error}")
            return None
        if not isinstance(value, dict):
            self.add(path, f"{shown(text)} is not a JSON object")
            return None
        problem = _wrong_inside(text)
        if problem:
            self.add(path, f"{shown(text)} {problem}")
            return None
        return value

    def _room_for_json(self, path: str, text: str) -> bool:
        """Whether all JSON of the request so far, this included, is within its bounds."""
        self._json_characters += len(text)
        if self._json_characters > MAX_JSON_CHARACTERS:
            size, limit = self._json_characters, MAX_JSON_CHARACTERS
            self.add(path, f"{size} characters of JSON in this request up to here, at most {limit}")
            return False
        self._json_brackets += text.count("[") + text.count("{")
        if self._json_brackets > MAX_JSON_BRACKETS:
            count, limit = self._json_brackets, MAX_JSON_BRACKETS
            self.add(path, f"{count} brackets in the JSON up to here, at most {limit}")
            return False
        return True


def shown(value: str) -> str:
    """A caller's value for a message: quoted, on one line, shortened."""
    if len(value) > SHOWN_CHARACTERS:
        return _quoted(value[:SHOWN_CHARACTERS]) + "..."
    return _quoted(value)


def _quoted(value: str) -> str:
    """Quoted, with control characters escaped and other characters kept."""
    return json.dumps(value, ensure_ascii=not value.isprintable())


def _parse(text: str) -> object:
    return json.loads(
        text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite
    )


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise ValueError(f"the key {shown(twice)} appears twice in one object")
    return value


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON value")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:SHOWN_CHARACTERS]} is too large a number")
    return value


def _wrong_inside(text: str) -> str | None:
    """What is wrong with valid JSON: too deep, or text that is not Unicode or has NULs.

    Looks at the JSON's text: to walk over the values takes ten times as long.
    """
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH and _depth(text) > MAX_JSON_DEPTH:
        return f"is nested deeper than {MAX_JSON_DEPTH} levels"
    if "\\u" in text:
        for escape in _ESCAPE.finditer(text):
            if escape["nul"]:
                return "has a NUL character"
            if escape["half"]:
                return "has half a surrogate pair, which is not text"
    return None


def _depth(text: str) -> int:
    """How deep valid JSON is nested."""
    brackets = _NO_BRACKET.sub("", _STRING.sub("", text))
    return max(accumulate(map(_STEP.__getitem__, brackets)))
