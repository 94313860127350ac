"""A worker's way out: what is written together, what is merged, and when a reader is too slow."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from edge_agent import frames
from edge_agent.core import FinishReason, RunError, StepResult, Usage
from edge_agent.engines.outbox import Outbox
from edge_agent.engines.protocol import (
    Batch,
    Delta,
    Failed,
    Finished,
    Pong,
    ToDaemon,
    to_daemon_decoder,
)
from edge_agent.frames import Framer

WAIT_S = 10.0
THE_END = Pong(-1)
"""The daemon hangs up when it reads this."""
RESULT = StepResult("done", (), FinishReason.STOP, Usage())
ERROR = RunError("CANCELLED", "the step was cancelled")


class Reader:
    """The daemon's end: takes a write when the test lets it, and a clock that the test turns."""

    def __init__(self) -> None:
        self.writes: list[list[ToDaemon]] = []
        self.now_s = 0.0
        self._framer = Framer()
        self._changed = threading.Condition()
        self._begun = 0
        self._blocked = False

    def send(self, frames: bytes) -> None:
        with self._changed:
            self._begun += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: not self._blocked, WAIT_S)
            write = [to_daemon_decoder.decode(body) for body in self._framer.feed(frames)]
            seen = [each for each in write if each != THE_END]
            if seen:
                self.writes.append(seen)
            self._changed.notify_all()
            if THE_END in write:
                raise BrokenPipeError

    def block(self) -> None:
        with self._changed:
            self._blocked = True

    def unblock(self) -> None:
        with self._changed:
            self._blocked = False
            self._changed.notify_all()

    def wait_for_write_begun(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._begun >= count, WAIT_S)

    def wait_for_writes(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.writes) >= count, WAIT_S)

    def clock(self) -> float:
        return self.now_s

    def batches(self) -> list[Batch]:
        return [each for write in self.writes for each in write if isinstance(each, Batch)]

    def ends(self) -> list[Finished | Failed]:
        found: list[Finished | Failed] = []
        for batch in self.batches():
            found += [*batch.finished, *batch.failed]
        return found


class LookingOutbox(Outbox):
    """Tells when its writer has looked whether an engine step is complete."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.looked = threading.Event()
        super().__init__(*arguments, **named)

    def _step_complete(self) -> bool:
        complete = super()._step_complete()
        self.looked.set()
        return complete


def run_to_its_end(outbox: Outbox) -> None:
    with suppress(BrokenPipeError):
        outbox.run()


@contextmanager
def running(
    reader: Reader, backlog_tokens: int = 1000, backlog_s: float = 1000.0
) -> Iterator["LookingOutbox"]:
    outbox = LookingOutbox(
        reader.send, backlog_tokens=backlog_tokens, backlog_s=backlog_s, clock=reader.clock
    )
    thread = threading.Thread(target=run_to_its_end, args=(outbox,))
    thread.start()
    try:
        yield outbox
    finally:
        reader.unblock()
        outbox.message(THE_END)
        thread.join(WAIT_S)
        assert not thread.is_alive()


@contextmanager
def write_in_flight(reader: Reader, outbox: Outbox) -> Iterator[None]:
    """A write that does not return; what is put in meanwhile waits."""
    reader.block()
    outbox.message(Pong(0))
    reader.wait_for_write_begun(1)
    yield
    reader.unblock()


def test_text_put_in_while_a_write_is_blocked_is_merged():
    reader = Reader()
    with running(reader) as outbox:
        with write_in_flight(reader, outbox):
            for piece in ("Hel", "lo", "!"):
                assert outbox.delta(1, piece, 2)
            assert outbox.delta(2, "Bye", 1)
        reader.wait_for_writes(2)
    assert reader.writes == [
        [Pong(0)],
        [Batch((Delta(1, "Hello!", 6), Delta(2, "Bye", 1)))],
    ]


def test_an_engine_step_of_all_active_sequences_is_one_write():
    reader = Reader()
    with running(reader) as outbox:
        with write_in_flight(reader, outbox):
            for sequence in (1, 2, 3):
                outbox.delta(sequence, "a", 1)
        reader.wait_for_writes(2)  # from now on all three are known to stream
        for step in range(1, 4):
            with outbox._changed:  # one engine step: all its texts come before the writer looks
                for sequence in (1, 2, 3):
                    outbox.delta(sequence, f"{step}", 1)
            reader.wait_for_writes(2 + step)
    steps = [[delta.text for delta in batch.deltas] for batch in reader.batches()[1:]]
    assert steps == [["1"] * 3, ["2"] * 3, ["3"] * 3]


def test_the_first_text_of_an_engine_step_waits_a_moment_for_the_others(monkeypatch):
    monkeypatch.setattr("edge_agent.engines.outbox._STEP_WINDOW_S", 6 * WAIT_S)
    reader = Reader()
    with running(reader) as outbox:
        with write_in_flight(reader, outbox):
            outbox.delta(1, "a", 1)
            outbox.delta(2, "b", 1)
        reader.wait_for_writes(2)
        outbox.looked.clear()
        outbox.delta(1, "c", 1)
        assert outbox.looked.wait(WAIT_S)  # whether the step is complete: it is not
        outbox.delta(2, "d", 1)
        reader.wait_for_writes(3)
    assert reader.batches()[1] == Batch((Delta(1, "c", 1), Delta(2, "d", 1)))


def test_nobody_waits_for_a_sequence_that_has_ended(monkeypatch):
    monkeypatch.setattr("edge_agent.engines.outbox._STEP_WINDOW_S", 6 * WAIT_S)
    reader = Reader()
    with running(reader) as outbox:
        with write_in_flight(reader, outbox):
            outbox.delta(1, "a", 1)
            outbox.delta(2, "b", 1)
            outbox.finished(2, RESULT)
        reader.wait_for_writes(2)
        outbox.delta(1, "c", 1)
        reader.wait_for_writes(3)  # at once, else this waits out the window and fails
    assert reader.batches()[1] == Batch((Delta(1, "c", 1),))


@pytest.mark.parametrize("end", ["finished", "failed"])
def test_all_text_of_a_sequence_comes_before_its_end(end: str):
    reader = Reader()
    with running(reader) as outbox:
        for number in range(200):
            outbox.delta(1, f"{number} ", 1)
        if end == "finished":
            outbox.finished(1, RESULT)
        else:
            outbox.failed(1, ERROR)
    batches = reader.batches()
    text = "".join(delta.text for batch in batches for delta in batch.deltas)
    assert text == "".join(f"{number} " for number in range(200))
    assert not any(batch.finished or batch.failed for batch in batches[:-1])
    assert batches[-1].finished == ((Finished(1, RESULT),) if end == "finished" else ())
    assert batches[-1].failed == ((Failed(1, ERROR),) if end == "failed" else ())


def test_messages_keep_their_order():
    reader = Reader()
    with running(reader) as outbox:
        for nonce in range(100):
            outbox.message(Pong(nonce))
    assert [each for write in reader.writes for each in write] == [Pong(n) for n in range(100)]


class TestBacklog:
    def test_a_sequence_is_given_up_above_the_bound_in_tokens(self):
        reader = Reader()
        with (
            running(reader, backlog_tokens=3) as outbox,
            write_in_flight(reader, outbox),
        ):
            assert outbox.delta(1, "a", 1)
            assert outbox.delta(1, "b", 2)
            assert not outbox.delta(1, "c", 1)
            assert outbox.delta(2, "d", 3)  # another sequence has its own bound

    def test_a_sequence_is_given_up_above_the_bound_in_age(self):
        reader = Reader()
        with (
            running(reader, backlog_s=2.0) as outbox,
            write_in_flight(reader, outbox),
        ):
            assert outbox.delta(1, "a", 1)
            reader.now_s = 2.0
            assert outbox.delta(1, "b", 1)
            assert outbox.delta(2, "c", 1)
            reader.now_s = 2.1
            assert not outbox.delta(1, "d", 1)
            assert outbox.delta(2, "e", 1)  # younger

    def test_what_was_sent_counts_no_more(self):
        reader = Reader()
        with running(reader, backlog_tokens=3, backlog_s=2.0) as outbox:
            for count in range(1, 6):
                assert outbox.delta(1, "a", 3)
                reader.wait_for_writes(count)
                reader.now_s += 10.0


class TestWhatCannotBeSent:
    @pytest.fixture
    def small_frames(self, monkeypatch: pytest.MonkeyPatch) -> int:
        monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 1000)
        return frames.MAX_FRAME_BYTES

    def test_steps_that_are_too_much_together_are_sent_apart(self, small_frames: int):
        reader, text = Reader(), "x" * (small_frames // 2)
        with running(reader) as outbox, write_in_flight(reader, outbox):
            outbox.delta(1, text, 1)
            outbox.delta(2, text, 1)
            outbox.finished(2, RESULT)
        assert reader.batches() == [
            Batch((Delta(1, text, 1),)),
            Batch((Delta(2, text, 1),)),
            Batch((), (Finished(2, RESULT),)),
        ]

    def test_a_decision_that_is_too_large_fails_its_step_alone(self, small_frames: int):
        reader, text = Reader(), "x" * small_frames
        with running(reader) as outbox, write_in_flight(reader, outbox):
            outbox.finished(1, StepResult(text, (), FinishReason.STOP, Usage()))
            outbox.finished(2, RESULT)
        first, second = reader.batches()
        assert second == Batch((), (Finished(2, RESULT),))
        (failed,) = first.failed
        assert (failed.sequence, failed.error.reason) == (1, "ENGINE_FAILED")
        assert f"at most {small_frames}" in failed.error.message
        assert not failed.error.retryable

    def test_an_error_that_is_too_large_is_told_as_one_all_the_same(self, small_frames: int):
        reader = Reader()
        with running(reader) as outbox:
            outbox.failed(1, RunError("STEP_FAILED", "x" * small_frames))
        (batch,) = reader.batches()
        assert [(each.sequence, each.error.reason) for each in batch.failed] == [
            (1, "ENGINE_FAILED")
        ]

    def test_a_step_whose_text_cannot_be_sent_is_stopped_and_fails(self, small_frames: int):
        reader = Reader()
        with running(reader) as outbox:
            with write_in_flight(reader, outbox):
                outbox.delta(1, "x" * small_frames, 1)
                outbox.message(Pong(1))
            reader.wait_for_writes(2)
            assert not outbox.delta(1, "y", 1)
            outbox.finished(1, RESULT)
            outbox.delta(2, "z", 1)
        (end,) = reader.ends()
        assert isinstance(end, Failed)
        assert end.error.reason == "ENGINE_FAILED"
        assert reader.batches()[-1].deltas == (Delta(2, "z", 1),)

    def test_text_that_is_none_fails_its_step_alone(self):
        reader = Reader()
        with running(reader) as outbox, write_in_flight(reader, outbox):
            outbox.delta(1, "\ud800", 1)
            outbox.finished(1, RESULT)
            outbox.finished(2, RESULT)
        assert [(type(end), end.sequence) for end in reader.ends()] == [(Failed, 1), (Finished, 2)]


def test_a_broken_socket_ends_run():
    def broken(_frames: bytes) -> None:
        raise BrokenPipeError

    outbox = Outbox(broken, backlog_tokens=1, backlog_s=1.0)
    outbox.message(Pong(1))
    with pytest.raises(BrokenPipeError):
        outbox.run()
