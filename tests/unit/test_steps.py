"""From a request to a decision: which branch, in which order, and what reaches the caller."""

import contextlib
import json
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.backends.base import Cancelled
from edge_agent.core import (
    FinishReason,
    Message,
    Role,
    RunError,
    Sampling,
    StepRequest,
    StepResult,
    TextPart,
    Tool,
    ToolCall,
)
from edge_agent.decoding.steps import StepDecoder
from edge_agent.errors import StepFailed
from tests.support.toy_engine import CONTEXT_TOKENS, ToyBackend, manifest

LAMP = Tool(
    "set_lamp",
    "Switch a lamp.",
    '{"type":"object","properties":{"on":{"type":"boolean"}},"required":["on"],'
    '"additionalProperties":false}',
)
STOP = Tool("stop", "Stop.", '{"type":"object","additionalProperties":false}')
NEUTRAL = ("Now", "Ok")
RANKED = {"strategy": "ranked", "neutral_goals": NEUTRAL, "top_logprobs": 95}


class Decided:
    """A decoder over the toy, and what was streamed."""

    def __init__(self, writes: Sequence[str] = ("Hello",), **tools: Any) -> None:
        self.backend = ToyBackend()
        self.backend.writes = lambda _prompt: writes
        self.decoder = StepDecoder(self.backend, manifest(**tools), CONTEXT_TOKENS)
        self.streamed: list[tuple[str, int]] = []

    def __call__(self, *messages: Message, **more: Any) -> StepResult:
        wanted = StepRequest(messages or (said(Role.USER, "Lights on!"),), **more)
        return self.decoder.decide(
            wanted, threading.Event(), lambda text, tokens: self.streamed.append((text, tokens))
        )

    def refused(self, **more: Any) -> RunError:
        with pytest.raises(StepFailed) as caught:
            self(**more)
        return caught.value.error

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.streamed)

    @property
    def asked(self) -> dict[str, Any]:
        (only,) = self.backend.completions
        return only


def said(role: Role, text: str, **more: Any) -> Message:
    return Message(role, (TextPart(text),), **more)


class TestWithoutTools:
    def test_text_is_free_and_streamed_as_it_comes(self):
        decide = Decided(["Hel", "lo"])
        sampling = Sampling(0.5, 0.9, 7)
        result = decide(max_output_tokens=9, sampling=sampling)
        assert (result.text, result.finish_reason) == ("Hello", FinishReason.STOP)
        assert decide.streamed == [("Hel", 1), ("lo", 1)]
        assert decide.asked["prompt"].endswith("<|user|>Lights on!<|end|><|assistant|>")
        assert decide.asked["schema_json"] is None
        assert (decide.asked["max_tokens"], decide.asked["sampling"]) == (9, sampling)
        assert decide.asked["stop"] == ("<|end|>",)

    def test_usage_is_what_the_backend_counted(self):
        usage = Decided(["Hel", "lo"])().usage
        assert (usage.completion_tokens, usage.cached_tokens, usage.decode_s) == (2, 3, 0.5)
        assert usage.prompt_tokens > 10
        assert usage.ttft_ms is not None

    def test_a_limit_cuts_text_and_says_so(self):
        result = Decided(["Hel", "lo"])(max_output_tokens=1)
        assert (result.text, result.finish_reason) == ("Hel", FinishReason.TRUNCATED)

    def test_an_output_schema_is_decoded_and_checked(self):
        decide = Decided(["[1,", "2]"])
        schema = '{"type":"array","items":{"type":"integer"}}'
        assert decide(output_schema_json=schema).text == "[1,2]"
        assert decide.asked["schema_json"] == schema

    @pytest.mark.parametrize(("limit", "reason"), [(9, "OUTPUT_INVALID"), (1, "OUTPUT_TRUNCATED")])
    def test_output_that_is_not_as_asked_is_no_result(self, limit: int, reason: str):
        schema = '{"type":"array","items":{"type":"integer"}}'
        decide = Decided(["[1,", '"two"]'])
        assert decide.refused(output_schema_json=schema, max_output_tokens=limit).reason == reason


class TestUnion:
    def test_a_call_is_not_streamed(self):
        decide = Decided(['{"name": "set_lamp", ', '"arguments": {"on": true}}'])
        result = decide(tools=(LAMP, STOP))
        assert result.tool_calls == (ToolCall("", "set_lamp", '{"on": true}'),)
        assert (result.text, result.finish_reason) == ("", FinishReason.TOOL_CALLS)
        assert decide.streamed == []

    def test_an_answer_is_streamed_without_its_json(self):
        decide = Decided(['{"ans', 'wer": "', "It is \\", "ud83e", "\\udd16", '."}'])
        result = decide(tools=(LAMP,))
        assert (result.text, decide.text) == ("It is 🤖.", "It is 🤖.")
        assert result.tool_calls == ()

    @given(st.text(), st.lists(st.integers(1, 5), max_size=20), st.booleans(), st.booleans())
    def test_any_answer_is_streamed_as_it_is_however_it_is_written(
        self, answer: str, sizes: list[int], ascii_only, spaced
    ):
        separators = (", ", " : ") if spaced else (",", ":")
        written = json.dumps({"answer": answer}, ensure_ascii=ascii_only, separators=separators)
        pieces, at = [], 0
        for size in [*sizes, len(written)]:
            pieces.append(written[at : at + size])
            at += size
        decide = Decided([piece for piece in pieces if piece])
        result = decide(tools=(LAMP,))
        assert result.text == decide.text == answer

    def test_an_answer_that_is_cut_is_what_was_streamed(self):
        decide = Decided(['{"answer": "', "It is", " on", '."}'])
        result = decide(tools=(LAMP,), max_output_tokens=2)
        assert (result.text, result.finish_reason) == ("It is", FinishReason.TRUNCATED)

    def test_a_call_that_is_cut_is_no_call(self):
        decide = Decided(['{"name": "set_lamp", ', '"arguments": {"on": true}}'])
        error = decide.refused(tools=(LAMP,), max_output_tokens=1)
        assert (error.reason, error.metadata["max_output_tokens"]) == ("OUTPUT_TRUNCATED", "1")

    def test_a_call_outside_its_schema_is_no_call(self):
        decide = Decided(['{"name": "set_lamp", "arguments": {"on": "yes"}}'])
        error = decide.refused(tools=(LAMP,))
        assert (error.reason, error.retryable) == ("OUTPUT_INVALID", True)

    def test_half_a_surrogate_pair_in_arguments_can_be_sent_on(self):
        tool = Tool("say", "", '{"type":"object","properties":{"text":{"type":"string"}}}')
        decide = Decided(['{"name": "say", "arguments": {"text": "\\ud83e"}}'])
        (call,) = decide(tools=(tool,)).tool_calls
        call.arguments_json.encode()

    def test_an_answer_of_an_output_schema_is_json_and_comes_at_the_end(self):
        decide = Decided(['{"answer": {"level"', ": 7}}"])
        result = decide(tools=(LAMP,), output_schema_json='{"type":"object"}')
        assert json.loads(result.text) == {"level": 7}
        assert decide.streamed == []


class TestLastStep:
    @pytest.mark.parametrize("tools", [{}, RANKED], ids=["schema", "ranked"])
    def test_only_the_answer_is_open(self, tools: dict[str, Any]):
        decide = Decided([' "It', ' is on."'], **tools)
        result = decide(tools=(LAMP,), answer_only=True)
        assert (result.text, decide.text) == ("It is on.", "It is on.")
        assert decide.asked["prompt"].endswith('<|assistant|>{"answer":')
        assert (decide.asked["lead"], decide.asked["schema_json"]) == (" ", '{"type":"string"}')
        assert decide.backend.rankings == []

    def test_an_output_schema_holds_for_it(self):
        decide = Decided([" [7", "]"])
        schema = '{"type":"array"}'
        result = decide(tools=(LAMP,), answer_only=True, output_schema_json=schema)
        assert result.text == "[7]"
        assert decide.asked["schema_json"] == schema


class Preference:
    """Scores the characters on the way to one text higher than all others."""

    def __init__(self, texts: dict[str, str], otherwise: str) -> None:
        self.texts, self.otherwise = texts, otherwise

    def __call__(self, prompt: str, character: str) -> float:
        turns, _, written = prompt.rpartition("<|assistant|>")
        wanted = next((t for said, t in self.texts.items() if said in turns), self.otherwise)
        return -0.1 if wanted.startswith(written + character) else -5.0


def head(name: str) -> str:
    return '{"answer":' if name == "answer" else f'{{"name": "{name}", "arguments":'


class TestRanking:
    def decided(self, preferred: str, otherwise: str = "stop") -> Decided:
        decide = Decided([' {"on": true}'], **RANKED)
        decide.backend.prefers = Preference({"Lights on!": head(preferred)}, head(otherwise))
        return decide

    def test_the_likeliest_tool_is_called_under_its_schema(self):
        decide = self.decided("set_lamp")
        result = decide(tools=(LAMP, STOP))
        assert result.tool_calls == (ToolCall("", "set_lamp", '{"on": true}'),)
        assert decide.asked["prompt"].endswith(head("set_lamp"))
        assert (decide.asked["schema_json"], decide.asked["lead"]) == (LAMP.input_schema_json, " ")
        assert result.tool_margin is not None
        assert result.tool_margin > 0.5

    def test_arguments_outside_their_schema_are_no_call(self):
        decide = self.decided("set_lamp")
        decide.backend.writes = lambda _prompt: [' {"on": 7}']
        assert decide.refused(tools=(LAMP, STOP)).reason == "OUTPUT_INVALID"

    def test_arguments_that_are_cut_are_no_call(self):
        decide = self.decided("set_lamp")
        decide.backend.writes = lambda _prompt: [' {"on":', " true}"]
        error = decide.refused(tools=(LAMP, STOP), max_output_tokens=1)
        assert error.reason == "OUTPUT_TRUNCATED"

    def test_what_is_likely_whatever_is_asked_does_not_count(self):
        """Both texts prefer `stop`; the goal says nothing for it, so it is not ahead."""
        decide = self.decided("stop", otherwise="stop")
        result = decide(tools=(LAMP, STOP))
        assert result.tool_margin == pytest.approx(0.0)

    def test_the_answer_is_one_of_those_ranked(self):
        decide = self.decided("answer")
        decide.backend.writes = lambda _prompt: [' "No."']
        result = decide(tools=(LAMP, STOP))
        assert (result.text, result.tool_calls) == ("No.", ())
        assert decide.asked["prompt"].endswith(head("answer"))

    def test_cached_tokens_are_those_from_before_the_ranking(self):
        decide = Decided(["{}"], **RANKED)
        result = decide(tools=(STOP, LAMP), max_output_tokens=5)
        assert len(decide.backend.rankings) > 1
        assert result.usage.cached_tokens == 1  # the toy counts its calls; a completion says 3

    def test_neutral_goals_stand_under_the_callers_own_system_text(self):
        decide = Decided(["{}"], **RANKED)
        goal = said(Role.USER, "Lights on!")
        decide(said(Role.SYSTEM, "You are a lamp."), goal, tools=(STOP, LAMP), max_output_tokens=5)
        assert all("You are a lamp." in text for text in decide.backend.rankings)
        first = len(decide.backend.rankings)
        decide(said(Role.SYSTEM, "You are a door."), goal, tools=(STOP, LAMP), max_output_tokens=5)
        neutral = [t for t in decide.backend.rankings[first:] if "<|user|>Now<|end|>" in t]
        assert neutral
        assert all("You are a door." in text for text in neutral)

    def test_neutral_goals_are_measured_once_for_a_set_of_tools(self):
        decide = self.decided("set_lamp")
        decide(tools=(LAMP, STOP))
        first = len(decide.backend.rankings)
        decide(tools=(LAMP, STOP))
        again = len(decide.backend.rankings) - first
        assert first == again * (1 + len(NEUTRAL))
        for goal in NEUTRAL:
            assert any(f"<|user|>{goal}<|end|>" in text for text in decide.backend.rankings)

    @pytest.mark.parametrize("preferred", ["answer", "set_lamp"])
    def test_after_a_result_the_raw_scores_say_whether_to_answer(self, preferred: str):
        """Neutral goals prefer the answer too: calibrated, it could never win here."""
        decide = self.decided(preferred, otherwise="answer")
        decide.backend.writes = lambda _prompt: (
            [' "Done."'] if preferred == "answer" else [' {"on": true}']
        )
        call = ToolCall("call-1", "stop", "{}")
        result = decide(
            said(Role.USER, "Lights on!"),
            Message(Role.ASSISTANT, (), (call,)),
            said(Role.TOOL, "ok", tool_call_id="call-1"),
            tools=(LAMP, STOP),
        )
        called = [each.name for each in result.tool_calls]
        assert called == ([] if preferred == "answer" else ["set_lamp"])

    def test_one_tool_alone_after_a_result_has_a_whole_margin(self):
        decide = self.decided("set_lamp", otherwise="answer")
        call = ToolCall("call-1", "set_lamp", "{}")
        result = decide(
            said(Role.USER, "Lights on!"),
            Message(Role.ASSISTANT, (), (call,)),
            said(Role.TOOL, "ok", tool_call_id="call-1"),
            tools=(LAMP,),
        )
        assert result.tool_margin == 1.0


class TestBudget:
    def test_what_is_left_of_the_context_bounds_the_output(self):
        decide = Decided()
        decide(said(Role.USER, "x" * 1500))
        prompt = decide.backend.tokenize(decide.asked["prompt"], markers=True)
        assert decide.asked["max_tokens"] == CONTEXT_TOKENS - len(prompt)

    @pytest.mark.parametrize("tools", [{}, RANKED], ids=["schema", "ranked"])
    @pytest.mark.parametrize("answer_only", [False, True])
    def test_prompt_head_and_output_never_exceed_the_context(self, tools, answer_only):
        decide = Decided([' "a"'] if answer_only else ['{"answer": "a"}'], **tools)
        for size in range(1700, 2000, 7):
            decide.backend.completions.clear()
            with contextlib.suppress(StepFailed):
                decide(said(Role.USER, "x" * size), tools=(STOP,), answer_only=answer_only)
            for asked in decide.backend.completions:
                prompt = decide.backend.tokenize(asked["prompt"], markers=True)
                assert len(prompt) + asked["max_tokens"] <= CONTEXT_TOKENS
                assert asked["max_tokens"] >= 1

    def test_nothing_is_decoded_of_a_prompt_that_is_too_long(self):
        decide = Decided()
        with pytest.raises(StepFailed) as caught:
            decide(said(Role.USER, "x" * 2100))
        error = caught.value.error
        assert (error.reason, error.metadata["context_tokens"]) == ("PROMPT_TOO_LONG", "2048")
        assert int(error.metadata["prompt_tokens"]) > 2100
        assert decide.backend.completions == []

    def test_a_text_far_too_long_is_measured_by_its_beginning(self):
        decide = Decided()
        tokenized: list[int] = []

        def tokenize(text: str, *, markers: bool) -> list[int]:
            tokenized.append(len(text))
            return ToyBackend().tokenize(text, markers=markers)

        decide.backend.tokenize = tokenize  # type: ignore[method-assign]  # the real one, watched
        with pytest.raises(StepFailed) as caught:
            decide(said(Role.USER, "x" * 4_000_000))
        error = caught.value.error
        assert error.reason == "PROMPT_TOO_LONG"
        assert "at least 32768 tokens" in error.message
        assert error.metadata["prompt_tokens"] == "32768"
        assert max(tokenized) == CONTEXT_TOKENS * 16

    def test_more_output_than_the_engines_maximum_is_refused(self):
        error = Decided().refused(max_output_tokens=1025)
        assert (error.reason, error.metadata["max_output_tokens"]) == (
            "MAX_OUTPUT_TOO_LONG",
            "1025",
        )


class TestCancelling:
    @pytest.mark.parametrize("tools", [{}, RANKED], ids=["schema", "ranked"])
    def test_ends_ranking_and_decoding(self, tools: dict[str, Any]):
        decide = Decided(**tools)
        cancel = threading.Event()
        cancel.set()
        wanted = StepRequest((said(Role.USER, "Lights on!"),), tools=(LAMP,))
        with pytest.raises(Cancelled):
            decide.decoder.decide(wanted, cancel, lambda _text, _tokens: None)
        assert decide.streamed == []


def test_many_threads_decide_at_once():
    decide = Decided(['{"answer": "', "Hello", '"}'])
    results: list[str] = []

    def work() -> None:
        results.extend(decide(tools=(LAMP,)).text for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["Hello"] * 80
