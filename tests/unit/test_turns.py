"""What a run leaves in its session's history, and which of it makes room."""

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core import Message, Role, TextPart, ToolCall
from edge_agent.runs import turns


def said(role: Role, text: str = "words") -> Message:
    return Message(role, (TextPart(text),))


def user(text: str = "words") -> Message:
    return said(Role.USER, text)


def answer(text: str = "words") -> Message:
    return said(Role.ASSISTANT, text)


def called(*ids: str) -> Message:
    return Message(Role.ASSISTANT, (), tuple(ToolCall(each, "move", "{}") for each in ids))


def result(call_id: str) -> Message:
    return Message(Role.TOOL, (TextPart("ok"),), (), call_id)


SYSTEM = said(Role.SYSTEM)
HISTORIES = st.lists(
    st.sampled_from([Role.USER, Role.ASSISTANT, Role.TOOL]).flatmap(
        lambda role: st.text(max_size=30).map(lambda text: said(role, text))
    ),
    max_size=30,
).map(lambda rest: (SYSTEM, user("first"), *rest))


class TestWhatARunLeaves:
    def test_its_caller_s_messages_and_its_answer(self):
        assert turns.left_by([SYSTEM, user()], [answer()], 1) == (SYSTEM, user(), answer())

    def test_its_calls_with_ids_that_no_other_run_s_have(self):
        left = turns.left_by([user()], [called("call-1"), result("call-1"), answer()], 7)
        assert left == (user(), called("7/call-1"), result("7/call-1"), answer())

    def test_no_call_without_a_result_and_no_turn_that_made_only_such(self):
        transcript = [called("a", "b"), result("b"), called("c")]
        assert turns.left_by([user()], transcript, 1) == (user(), called("1/b"), result("1/b"))

    def test_what_came_after_a_turn_of_calls_without_results_stays(self):
        transcript = [called("a"), user("never mind"), answer()]
        left = turns.left_by([user()], transcript, 1)
        assert left == (user(), user("never mind"), answer())

    def test_nothing_where_no_step_has_decided_anything(self):
        assert turns.left_by([SYSTEM, user(), answer(), user()], [], 1) == ()
        assert turns.left_by([user()], [called("a")], 1) == ()
        assert turns.left_by([user()], [user("more")], 1) == ()
        assert turns.left_by([user(), called("a"), result("a")], [], 1) == ()

    def test_not_what_was_said_to_it_last_and_nobody_has_answered(self):
        left = turns.left_by([user()], [called("a"), result("a"), user("stop")], 1)
        assert left == (user(), called("1/a"), result("1/a"))


class TestMakingRoom:
    @given(HISTORIES, st.integers(-10, 2000))
    def test_whole_turns_from_the_oldest_and_never_the_system(self, history, too_long):
        parts = turns.split(history, too_long)
        assert (*parts.head, *parts.oldest, *parts.newest) == history
        assert parts.head == (SYSTEM,)
        assert not parts.newest or parts.newest[0].role is Role.USER

    @given(HISTORIES, st.integers(-10, 2000))
    def test_as_much_as_is_too_long_and_no_turn_more(self, history, too_long):
        parts = turns.split(history, too_long)
        assert parts.oldest
        assert not parts.newest or turns.characters(parts.oldest) >= too_long
        last = max(at for at, turn in enumerate(parts.oldest) if not at or turn.role is Role.USER)
        assert not last or turns.characters(parts.oldest[:last]) < too_long

    def test_nothing_of_a_history_that_has_no_turns(self):
        assert turns.split((), 5).oldest == ()
        assert turns.split((SYSTEM,), 5) == turns.Split((SYSTEM,), (), ())

    def test_a_turn_that_is_just_enough_is_enough(self):
        history = (user(), answer(), user(), answer(), user())
        size = turns.characters(history[:2])
        assert turns.split(history, size) == turns.Split((), history[:2], history[2:])
        assert turns.split(history, size + 1) == turns.Split((), history[:4], history[4:])

    def test_a_summary_is_the_oldest_turn(self):
        summary = turns.summary("they spoke")
        assert summary.is_summary
        parts = turns.split((SYSTEM, summary, user(), answer()), 1)
        assert (parts.oldest, parts.newest) == ((summary,), (user(), answer()))


class TestSummaries:
    def test_what_is_to_be_summed_up_is_told_in_words(self):
        system, asked = turns.to_summarise(
            [turns.summary("old"), user("Go"), called("a"), result("a"), answer("Gone")]
        )
        assert (system.role, asked.role) == (Role.SYSTEM, Role.USER)
        lines = asked.text.splitlines()
        assert lines[0].endswith("old")
        assert lines[1:] == ["user: Go", "called move {}", "move returned: ok", "assistant: Gone"]

    def test_a_tool_s_failure_is_told_as_one(self):
        failed = Message(Role.TOOL, (TextPart("stuck"),), (), "a", is_error=True)
        _system, asked = turns.to_summarise([called("a"), failed])
        assert asked.text.splitlines()[-1] == "move failed: stuck"


def test_texts_and_calls_count_and_what_stands_around_them_in_a_prompt():
    call = Message(Role.ASSISTANT, (TextPart("für"),), (ToolCall("a", "move", '{"ü":1}'),))
    assert turns.characters([call, user("1234")]) == 16 + 3 + 4 + 7 + 16 + 4
    assert turns.size_bytes([call, user("1234")]) == 4 + 4 + 8 + 4


@given(HISTORIES)
def test_a_longer_history_counts_more(history):
    assert turns.characters(history) > turns.characters(history[:-1])
    assert turns.size_bytes(history) >= len("".join(turn.text for turn in history))
