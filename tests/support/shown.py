"""What somebody was shown of a run, against what is on disk of it."""

import dataclasses

from edge_agent.core import Message, Run
from edge_agent.events import Event, RunFinished, TextDelta
from edge_agent.ledger.changes import StoredRun
from edge_agent.records import LoggedText


def bare(run: Run) -> Run:
    """Without what only the ledger knows."""
    return dataclasses.replace(run, result_number=None)


def is_within(part: tuple[Message, ...], whole: tuple[Message, ...]) -> bool:
    """Whether all of `part` is in `whole`, in this order."""
    rest = iter(whole)
    return all(any(turn == other for other in rest) for turn in part)


def assert_shown_of(stored: StoredRun, seen: list[Event]) -> None:
    """What somebody has seen of a run is what is on disk up to there, but for a text's end."""
    if not seen:
        return
    last = seen[-1].sequence
    texts = [item for item in stored.events if isinstance(item, LoggedText)]
    kept = [item for item in stored.events if isinstance(item, Event) and item.sequence <= last]
    told = [event for event in seen if not isinstance(event.body, TextDelta)]
    assert [plain(event) for event in told] == [plain(event) for event in kept]
    for text in texts:
        upto = text.first + len(text.ends)
        within = [e for e in seen if text.first <= e.sequence < upto]
        said = "".join(e.body.text for e in within if isinstance(e.body, TextDelta))
        assert text.text.startswith(said)
        if within:
            assert len(said) == text.ends[within[-1].sequence - text.first]


def plain(event: Event) -> Event:
    """The last event is kept without the transcript, which follows from the others."""
    if isinstance(event.body, RunFinished):
        ended = dataclasses.replace(bare(event.body.run), transcript=())
        return dataclasses.replace(event, body=RunFinished(ended))
    return event
