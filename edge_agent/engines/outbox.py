"""A worker's way out: one write per engine step for all active sequences.

Owns what has been decided but not yet sent. While a write is in flight, or the daemon reads
slowly, more text of the same sequence is merged into one delta; a sequence whose unsent text
exceeds the bound in tokens or age is given up rather than allowed to grow. A sequence that puts in
what no frame can hold ends as failed, and the others go on.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

from edge_agent.core import RunError, StepResult
from edge_agent.engines.protocol import Batch, Delta, Failed, Finished, ToDaemon, encode

_STEP_WINDOW_S = 0.001
"""How long the first sequence of an engine step waits for the others."""


@dataclass(slots=True)
class _Unsent:
    """Text of one sequence that has not been sent."""

    since_s: float
    pieces: list[str] = field(default_factory=list)
    tokens: int = 0


class Outbox:
    """Thread-safe. One thread runs `run`; any thread puts something in."""

    def __init__(
        self,
        send: Callable[[bytes], None],
        *,
        backlog_tokens: int,
        backlog_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Send frames with `send`, which may block as long as the daemon does not read."""
        self._send = send
        self._backlog_tokens = backlog_tokens
        self._backlog_s = backlog_s
        self._clock = clock
        self._changed = threading.Condition()
        self._unsent: dict[int, _Unsent] = {}
        self._ended: list[Finished | Failed] = []
        self._messages: list[ToDaemon] = []
        self._streaming: frozenset[int] = frozenset()
        self._lossy: dict[int, RunError] = {}

    def delta(self, sequence: int, text: str, tokens: int) -> bool:
        """Add text. False: its backlog is over the bound, or its text can't be sent; stop it."""
        now_s = self._clock()
        with self._changed:
            if sequence in self._lossy:
                return False
            unsent = self._unsent.get(sequence)
            if unsent is None:
                unsent = self._unsent[sequence] = _Unsent(now_s)
            unsent.pieces.append(text)
            unsent.tokens += tokens
            self._changed.notify()
            within_age = now_s - unsent.since_s <= self._backlog_s
            return within_age and unsent.tokens <= self._backlog_tokens

    def finished(self, sequence: int, result: StepResult) -> None:
        """The sequence's decision, after all its text."""
        self._end(Finished(sequence, result))

    def failed(self, sequence: int, error: RunError) -> None:
        """The sequence's end without a decision."""
        self._end(Failed(sequence, error))

    def message(self, message: ToDaemon) -> None:
        """Anything that is not about a sequence; in order."""
        with self._changed:
            self._messages.append(message)
            self._changed.notify()

    def run(self) -> NoReturn:
        """Send until `send` raises, which this raises too."""
        while True:
            with self._changed:
                self._changed.wait_for(self._anything)
                self._changed.wait_for(self._step_complete, timeout=_STEP_WINDOW_S)
                frames = self._take()
            self._send(frames)

    def _end(self, end: Finished | Failed) -> None:
        with self._changed:
            self._ended.append(end)
            self._changed.notify()

    def _anything(self) -> bool:
        return bool(self._unsent or self._ended or self._messages)

    def _step_complete(self) -> bool:
        """Every sequence that streamed in the last write has something again."""
        return bool(self._ended or self._messages) or self._streaming <= self._unsent.keys()

    def _take(self) -> bytes:
        frames = [encode(message) for message in self._messages]
        if self._unsent or self._ended:
            deltas = tuple(
                Delta(sequence, "".join(unsent.pieces), unsent.tokens)
                for sequence, unsent in self._unsent.items()
            )
            ended = [self._truthful(end) for end in self._ended]
            try:
                frames.append(encode(_batch(*deltas, *ended)))
            except ValueError:
                frames += [self._alone(delta) for delta in deltas]
                frames += [self._alone(self._truthful(end)) for end in ended]
            self._streaming = frozenset(self._unsent) - {end.sequence for end in ended}
        self._messages, self._unsent, self._ended = [], {}, []
        return b"".join(frames)

    def _alone(self, item: Delta | Finished | Failed) -> bytes:
        """The frame of what could not be sent with others; nothing for text that can't be sent."""
        try:
            return encode(_batch(item))
        except ValueError as error:
            text = f"what the step decided can't be sent to the daemon: {error}"
            failure = RunError("ENGINE_FAILED", text)
        if isinstance(item, Delta):
            self._lossy[item.sequence] = failure
            return b""
        return encode(_batch(Failed(item.sequence, failure)))

    def _truthful(self, end: Finished | Failed) -> Finished | Failed:
        """A sequence whose text has a gap did not finish."""
        failure = self._lossy.pop(end.sequence, None)
        return end if failure is None else Failed(end.sequence, failure)


def _batch(*items: Delta | Finished | Failed) -> Batch:
    return Batch(
        tuple(item for item in items if isinstance(item, Delta)),
        tuple(item for item in items if isinstance(item, Finished)),
        tuple(item for item in items if isinstance(item, Failed)),
    )
