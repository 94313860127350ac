"""One step over its attempts: what it is told as, what its caller reads, what it has cost."""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core import (
    FinishReason,
    Message,
    Priority,
    Role,
    RunState,
    Sampling,
    StepOrigin,
    StepRequest,
    StepResult,
    TextPart,
    Tool,
    ToolCall,
    Usage,
)
from edge_agent.scheduling.pending import PendingStep, queued_step
from tests.support.chaos import examples

SHAPE: dict[str, Any] = {"context_tokens": 2048, "max_output_tokens": 100}
TOOL = Tool("move", "Move.", '{"type":"object"}')
FREE: dict[str, Any] = {}
CONSTRAINED: dict[str, Any] = {"output_schema_json": "{}"}
WARM = Sampling(temperature=0.7)


def request(text: str = "Go", **more: Any) -> StepRequest:
    return StepRequest((Message(Role.USER, (TextPart(text),)),), **more)


class Told:
    """A step whose worker is played by its test; asked for at 100 s."""

    def __init__(self, **more: Any) -> None:
        self.texts: list[str] = []
        self.states: list[tuple[RunState, float | None]] = []
        wanted = request(**more)
        step = queued_step(1, "alpha", wanted, StepOrigin("robot"), 100.0, **SHAPE)
        self.pending = PendingStep(
            step,
            wanted,
            lambda text, _tokens: self.texts.append(text),
            lambda state, progress: self.states.append((state, progress)),
        )

    def begin(self, now_s: float, load_asked_s: float = 0.0, ready_s: float = 0.0) -> StepRequest:
        self.pending.started(now_s, load_asked_s, ready_s)
        return self.pending.next_request()

    def write(self, *words: str, now_s: float = 110.0) -> None:
        for word in words:
            self.pending.take_text(word, 1, now_s)

    def result(self, text: str, tokens: int, **usage: Any) -> StepResult:
        last = Usage(10, 4, tokens, **usage)
        return self.pending.result(StepResult(text, (), FinishReason.STOP, last))

    @property
    def text(self) -> str:
        return "".join(self.texts)


def told(scenario: Callable[[], None]) -> None:
    """A pending step is made on a loop."""

    async def on_a_loop() -> None:
        scenario()

    asyncio.run(on_a_loop())


# --- as the planner sees it ---


def test_what_it_may_need_is_its_bytes_and_its_output_up_to_the_context():
    step = queued_step(1, "alpha", request("ä" * 50), StepOrigin("robot"), 0.0, **SHAPE)
    assert (step.need_tokens, step.prompt_tokens, step.output_tokens) == (200, 25, 100)
    step = queued_step(
        1, "alpha", request("x" * 50, max_output_tokens=7), StepOrigin("robot"), 0.0, **SHAPE
    )
    assert (step.need_tokens, step.output_tokens) == (57, 7)
    step = queued_step(1, "alpha", request("x" * 9000), StepOrigin("robot"), 0.0, **SHAPE)
    assert (step.need_tokens, step.prompt_tokens) == (2048, 2048)


def test_tools_their_examples_and_earlier_calls_count_as_well():
    call = ToolCall("1", "move", '{"to": "dock"}')
    message = Message(Role.ASSISTANT, tool_calls=(call,))
    plain = queued_step(1, "alpha", request("Go"), StepOrigin("robot"), 0.0, **SHAPE)
    wanted = request("Go", tools=(TOOL,))
    more = queued_step(
        1,
        "alpha",
        dataclasses.replace(wanted, messages=(*wanted.messages, message)),
        StepOrigin("robot"),
        0.0,
        **SHAPE,
    )
    added = len(call.arguments_json) + len(TOOL.description) + len(TOOL.input_schema_json)
    assert more.need_tokens >= plain.need_tokens + added


@pytest.mark.parametrize(
    ("priority", "more", "expected"),
    [
        (Priority.BATCH, FREE, True),
        (Priority.BATCH, {"sampling": WARM}, True),
        (Priority.BATCH, CONSTRAINED, True),
        (Priority.BATCH, {"tools": (TOOL,)}, True),
        (Priority.BATCH, {**CONSTRAINED, "sampling": WARM}, False),
        (Priority.BATCH, {"tools": (TOOL,), "sampling": WARM}, False),
        (Priority.BATCH, {**CONSTRAINED, "sampling": Sampling(0.7, 1.0, 1)}, True),
        (Priority.NORMAL, FREE, False),
        (Priority.URGENT, FREE, False),
    ],
)
def test_only_a_batch_step_that_says_the_same_again_may_be_stopped(
    priority: Priority, more: dict[str, Any], expected: object
):
    step = queued_step(1, "alpha", request(**more), StepOrigin("cron", priority), 0.0, **SHAPE)
    assert step.preemptible is expected


# --- text over attempts ---


def test_free_text_goes_on_from_its_own_words():
    def scenario() -> None:
        step = Told(max_output_tokens=5)
        assert step.begin(101.0).resume_text == ""
        step.write("one ", "two ")
        step.pending.stopped(111.0)
        again = step.begin(112.0)
        assert (again.resume_text, again.max_output_tokens) == ("one two ", 3)
        step.write("three ")
        result = step.result("one two three ", 1)
        assert step.text == result.text
        assert result.usage.completion_tokens == 3

    told(scenario)


def test_what_may_be_written_is_counted_over_all_attempts_also_without_a_wish():
    def scenario() -> None:
        step = Told()
        step.begin(101.0)
        step.write(*["x"] * 60)
        step.pending.stopped(111.0)
        assert step.begin(112.0).max_output_tokens == 40
        step.write(*["x"] * 40)
        step.pending.stopped(113.0)
        assert step.begin(114.0).max_output_tokens == 1

    told(scenario)


@examples(100)
@given(
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=8),
    st.lists(st.integers(0, 8), max_size=3),
    st.integers(1, 4),
)
def test_what_is_written_anew_is_told_once_however_it_is_cut(
    words: list[str], stops: list[int], size: int
):
    def scenario() -> None:
        step, whole = Told(**CONSTRAINED), "".join(words)
        written = 0
        for attempt, stop in enumerate(stops):
            assert step.begin(101.0).resume_text == ""
            done = words[:stop]
            if attempt % 2:  # the engine's pieces need not be the same again
                text = "".join(done)
                done = [text[at : at + size] for at in range(0, len(text), size)]
            step.write(*done)
            written += len(done)
            step.pending.stopped(111.0)
            assert whole.startswith(step.text)
        step.begin(112.0)
        step.write(*words)
        result = step.result(whole, len(words))
        assert step.text == whole
        assert result.usage.completion_tokens == written + len(words)

    told(scenario)


def test_where_it_does_not_say_the_same_again_nobody_is_told_two_things():
    def scenario() -> None:
        step = Told(**CONSTRAINED, sampling=WARM)
        step.begin(101.0)
        step.write("left ")
        step.pending.stopped(111.0)
        step.begin(112.0)
        step.write("right ", "left ")
        assert step.text == "left "
        assert step.result("right left ", 2).text == "right left "

    told(scenario)


def test_what_it_wrote_while_it_was_being_stopped_is_told_with_its_result():
    def scenario() -> None:
        step = Told()
        step.begin(101.0)
        step.write("one ")
        step.pending.stopping = True
        result = step.result("one two ", 2)
        assert step.texts == ["one ", "two "]
        assert result.usage.completion_tokens == 2

    told(scenario)


# --- time over attempts ---


def test_waiting_loading_and_writing_are_counted_once_each():
    def scenario() -> None:
        step = Told()
        step.begin(108.0, load_asked_s=101.0, ready_s=107.0)  # of 8 s 6 were the load
        step.write("one ", now_s=109.0)
        step.pending.stopped(112.0)
        step.begin(115.0, load_asked_s=101.0, ready_s=107.0)  # the load was before this wait
        step.write("two ", now_s=116.0)
        step.pending.stopped(117.0)
        step.begin(118.0, load_asked_s=101.0, ready_s=107.0)
        usage = step.result("one two three ", 1, decode_s=2.0, ttft_ms=50.0).usage
        assert (usage.load_s, usage.queue_s) == (6.0, 2.0 + 3.0 + 1.0)
        assert usage.decode_s == 3.0 + 1.0 + 2.0
        assert usage.ttft_ms == 1000.0  # of the first text that the caller read
        assert (usage.prompt_tokens, usage.cached_tokens) == (10, 4)

    told(scenario)


def test_a_step_of_one_attempt_keeps_the_workers_figures():
    def scenario() -> None:
        step = Told()
        step.begin(103.0)
        step.write("one ")
        usage = step.result("one ", 1, decode_s=2.0, ttft_ms=50.0).usage
        assert usage == Usage(10, 4, 1, queue_s=3.0, decode_s=2.0, ttft_ms=50.0)

    told(scenario)


def test_an_attempt_that_wrote_nothing_leaves_no_trace():
    def scenario() -> None:
        step = Told()
        step.begin(103.0)
        step.pending.stopped(105.0)
        assert step.begin(106.0) == step.pending.request
        usage = step.result("one ", 1, decode_s=2.0, ttft_ms=50.0).usage
        assert usage == Usage(10, 4, 1, queue_s=4.0, decode_s=2.0, ttft_ms=50.0)

    told(scenario)


# --- states ---


def test_each_change_of_state_is_told_once_and_progress_always():
    def scenario() -> None:
        step = Told()
        for state in (RunState.QUEUED, RunState.QUEUED, RunState.LOADING, RunState.LOADING):
            step.pending.tell(state)
        step.pending.tell(RunState.LOADING, 0.5)
        step.pending.tell(RunState.RUNNING)
        assert step.states == [
            (RunState.QUEUED, None),
            (RunState.LOADING, None),
            (RunState.LOADING, 0.5),
            (RunState.RUNNING, None),
        ]

    told(scenario)


def test_who_has_given_up_is_told_nothing():
    def scenario() -> None:
        step = Told()
        step.pending.abandoned = True
        step.pending.tell(RunState.RUNNING)
        assert step.states == []

    told(scenario)
