"""A run's numbered events, kept for readers that come late or lag. Pure.

Text is kept as spans of neighbouring deltas rather than as one event a token: a reader gets all
that it has not seen of a span as one delta, numbered as its last, from wherever it stopped.
"""

from array import array
from collections.abc import Iterable, Iterator

from edge_agent.events import Event, EventBody, TextDelta
from edge_agent.records import LoggedText


class TextSpan:
    """Neighbouring text deltas of one step, numbered from `first` without a gap."""

    def __init__(self, step: int, first: int) -> None:
        """Empty."""
        self.step = step
        self.first = first
        self._pieces: list[str] = []
        self._text = ""
        self._ends = array("I")
        self._tokens = array("I")

    @property
    def last(self) -> int:
        """The number of its last delta."""
        return self.first + len(self._tokens) - 1

    def add(self, text: str, tokens: int) -> None:
        """One more delta."""
        end = (self._ends[-1] if self._ends else 0) + len(text)
        self._pieces.append(text)
        self._ends.append(end)
        self._tokens.append(tokens)

    def text(self) -> str:
        """All of it."""
        if self._pieces:
            self._text += "".join(self._pieces)
            self._pieces = []
        return self._text

    def since(self, after: int) -> TextDelta:
        """What came after the delta numbered `after`, which is below `last`."""
        known = max(0, after - self.first + 1)
        if known and known == len(self._tokens) - 1 and self._pieces:
            text = self._pieces[-1]  # the usual case: a reader that keeps up
        else:
            text = self.text()[self._ends[known - 1] if known else 0 :]
        return TextDelta(self.step, text, sum(self._tokens[known:]))

    def logged(self) -> LoggedText:
        """The same, to be written down."""
        return LoggedText(
            self.step, self.first, self.text(), tuple(self._ends), tuple(self._tokens)
        )

    @classmethod
    def read(cls, logged: LoggedText) -> "TextSpan":
        """As it was written down."""
        span = cls(logged.step, logged.first)
        span._text = logged.text
        span._ends = array("I", logged.ends)
        span._tokens = array("I", logged.tokens)
        return span


class EventLog:
    """Events in order, numbered from 1."""

    def __init__(self, run_id: str, earlier: Iterable[Event | LoggedText] = ()) -> None:
        """Go on after what was written down."""
        self._run_id = run_id
        self._items: list[Event | TextSpan] = [
            TextSpan.read(item) if isinstance(item, LoggedText) else item for item in earlier
        ]
        self.sequence = _last(self._items[-1]) if self._items else 0

    def add(self, body: EventBody) -> None:
        """Number an event that is not text."""
        self.sequence += 1
        self._items.append(Event(self._run_id, self.sequence, body))

    def add_text(self, step: int, text: str, tokens: int) -> None:
        """Number one more delta."""
        self.sequence += 1
        span = self._items[-1] if self._items else None
        if not isinstance(span, TextSpan) or span.step != step:
            span = TextSpan(step, self.sequence)
            self._items.append(span)
        span.add(text, tokens)

    def text_at(self, sequence: int) -> str:
        """The text that was being written then: of the span that ended there, if one did."""
        for item in reversed(self._items):
            if _last(item) <= sequence:
                return item.text() if isinstance(item, TextSpan) else ""
        return ""

    def written(self, after: int) -> tuple[Event | LoggedText, ...]:
        """Everything numbered above `after`, to be written down."""
        return tuple(
            item.logged() if isinstance(item, TextSpan) else item for item in self._above(after)
        )

    def since(self, after: int, upto: int | None = None) -> Iterator[Event]:
        """Everything numbered above `after`, and at most `upto`, text merged."""
        for item in self._above(after):
            if upto is not None and _last(item) > upto:
                return
            if isinstance(item, TextSpan):
                yield Event(self._run_id, item.last, item.since(after))
            else:
                yield item

    def _above(self, after: int) -> list[Event | TextSpan]:
        start = len(self._items)
        while start and _last(self._items[start - 1]) > after:
            start -= 1
        return self._items[start:]


def _last(item: Event | TextSpan) -> int:
    return item.last if isinstance(item, TextSpan) else item.sequence
