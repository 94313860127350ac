"""Holds: two calls never have the same resource, and everybody's turn comes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from edge_agent.core import Fence
from edge_agent.runs.holds import Granted, Holder, Holding, Holds, Refused, Waits

NAMES = ("arm", "base", "gripper", "lamp")


def holder(number: int, holding: Holding = Holding.INSTANT) -> Holder:
    return Holder(f"run-{number}", "call-1", "move", "client", "agent", holding)


def test_what_nobody_has_is_granted_with_a_fence_of_this_epoch():
    assert Holds(7).ask(holder(1), ["arm", "base"]) == Granted(Fence(7, 1))


def test_each_grant_has_a_higher_fence():
    holds = Holds(7)
    first, second = holds.ask(holder(1), ["arm"]), holds.ask(holder(2), ["base"])
    assert isinstance(first, Granted)
    assert isinstance(second, Granted)
    assert second.fence > first.fence


def test_a_fence_of_a_later_epoch_is_higher_whatever_its_number():
    assert Fence(2, 1) > Fence(1, 1000)


def test_an_instant_holder_is_waited_for_and_its_release_tells_who_is_next():
    holds = Holds(1)
    holds.ask(holder(1), ["arm"])
    assert holds.ask(holder(2), ["arm"]) == Waits("arm", holder(1))
    assert holds.release("run-1", "call-1") == [(holder(2), Granted(Fence(1, 2)))]
    assert holds.holders() == {"arm": holder(2)}


@pytest.mark.parametrize("holding", [Holding.BACKGROUND, Holding.UNKNOWN])
def test_who_has_it_for_as_long_as_he_likes_is_named(holding):
    holds = Holds(1)
    holds.ask(holder(1, holding), ["base"])
    assert holds.ask(holder(2), ["arm", "base"]) == Refused("base", holder(1, holding))
    assert "arm" not in holds.holders()


def test_a_holder_that_goes_on_in_the_background_refuses_who_waited_and_lets_the_next_one_pass():
    holds = Holds(1)
    holds.ask(holder(1), ["arm"])
    assert isinstance(holds.ask(holder(2), ["arm", "base"]), Waits)
    assert holds.ask(holder(3), ["base"]) == Waits("base", holder(2))
    told = holds.change("run-1", "call-1", Holding.BACKGROUND)
    assert told == [
        (holder(2), Refused("arm", holder(1, Holding.BACKGROUND))),
        (holder(3), Granted(Fence(1, 2))),
    ]


def test_who_waits_for_two_is_not_overtaken_by_who_wants_one_of_them():
    holds = Holds(1)
    holds.ask(holder(1), ["arm"])
    holds.ask(holder(2), ["arm", "base"])
    assert holds.ask(holder(3), ["base"]) == Waits("base", holder(2))
    assert holds.ask(holder(4), ["lamp"]) == Granted(Fence(1, 2))


def test_who_waits_no_more_is_in_nobodys_way():
    holds = Holds(1)
    holds.ask(holder(1), ["arm"])
    holds.ask(holder(2), ["arm", "base"])
    holds.ask(holder(3), ["base"])
    assert holds.withdraw("run-2", "call-1") == [(holder(3), Granted(Fence(1, 2)))]
    assert holds.release("run-1", "call-1") == []


def test_two_calls_of_one_run_do_not_share_a_resource_either():
    holds = Holds(1)
    one = Holder("run-1", "call-1", "move", "c", "a", Holding.INSTANT)
    other = Holder("run-1", "call-2", "move", "c", "a", Holding.INSTANT)
    holds.ask(one, ["arm"])
    assert holds.ask(other, ["arm"]) == Waits("arm", one)


def test_what_was_held_before_a_restart_is_held_after_it():
    holds = Holds(2)
    holds.retake(holder(1, Holding.BACKGROUND), ["arm"])
    assert isinstance(holds.ask(holder(2), ["arm"]), Refused)


class HoldsMachine(RuleBasedStateMachine):
    """Calls come and go; a model knows who was granted what and has not let go."""

    holds_class = Holds

    def __init__(self):
        super().__init__()
        self.holds = self.holds_class(1)
        self.number = 0
        self.wants: dict[int, frozenset[str]] = {}
        self.has: dict[int, frozenset[str]] = {}
        self.waits: list[int] = []
        self.kinds: dict[int, Holding] = {}
        self.last = Fence(0, 0)

    def take(self, number, decision):
        if isinstance(decision, Granted):
            assert decision.fence > self.last
            self.last = decision.fence
            self.has[number] = self.wants[number]

    def told(self, decisions):
        for who, decision in decisions:
            number = int(who.run_id.removeprefix("run-"))
            self.waits.remove(number)
            self.take(number, decision)

    @rule(names=st.frozensets(st.sampled_from(NAMES), min_size=1, max_size=3))
    def ask(self, names):
        self.number += 1
        self.wants[self.number], self.kinds[self.number] = names, Holding.INSTANT
        decision = self.holds.ask(holder(self.number), names)
        if isinstance(decision, Waits):
            self.waits.append(self.number)
        self.take(self.number, decision)

    @precondition(lambda self: self.has)
    @rule(data=st.data())
    def release(self, data):
        number = data.draw(st.sampled_from(sorted(self.has)))
        del self.has[number]
        self.told(self.holds.release(f"run-{number}", "call-1"))

    @precondition(lambda self: self.has)
    @rule(data=st.data(), kind=st.sampled_from([Holding.BACKGROUND, Holding.UNKNOWN]))
    def goes_on(self, data, kind):
        number = data.draw(st.sampled_from(sorted(self.has)))
        self.kinds[number] = kind
        self.told(self.holds.change(f"run-{number}", "call-1", kind))

    @precondition(lambda self: self.waits)
    @rule(data=st.data())
    def withdraw(self, data):
        number = data.draw(st.sampled_from(self.waits))
        self.waits.remove(number)
        self.told(self.holds.withdraw(f"run-{number}", "call-1"))

    @invariant()
    def nobody_shares(self):
        held = [name for names in self.has.values() for name in names]
        assert len(held) == len(set(held)), "two calls have one resource"
        assert sorted(held) == sorted(self.holds.holders())

    @invariant()
    def nobody_waits_for_nothing(self):
        """The first who waits wants something that an INSTANT holder has."""
        if self.waits:
            wanted = self.wants[self.waits[0]]
            ahead = [number for number, names in self.has.items() if names & wanted]
            assert ahead, "the first in line waits for nobody"

    @invariant()
    def nobody_waits_for_who_does_not_end(self):
        for number in self.waits:
            for other, names in self.has.items():
                if names & self.wants[number]:
                    assert self.kinds[other] is Holding.INSTANT


HoldsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestHolds = HoldsMachine.TestCase


class _Sharing(Holds):
    """A planted bug: a release frees everything."""

    def release(self, run_id, call_id):
        self._held.clear()
        return super().release(run_id, call_id)


def test_the_model_notices_a_planted_bug():
    class Planted(HoldsMachine):
        holds_class = _Sharing

    found = settings(HoldsMachine.TestCase.settings, derandomize=True, report_multiple_bugs=False)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Planted, settings=found)


@given(
    wanted=st.lists(
        st.frozensets(st.sampled_from(NAMES), min_size=1, max_size=4), min_size=1, max_size=12
    )
)
def test_everybody_who_waits_is_served_in_the_end(wanted):
    holds, going, served = Holds(1), [], set()
    for number, names in enumerate(wanted):
        if isinstance(holds.ask(holder(number), names), Granted):
            going.append(number)
            served.add(number)
    while going:
        for who, decision in holds.release(f"run-{going.pop(0)}", "call-1"):
            assert isinstance(decision, Granted)
            going.append(int(who.run_id.removeprefix("run-")))
            served.add(going[-1])
    assert served == set(range(len(wanted)))
    assert holds.holders() == {}


def test_who_waits_behind_somebody_is_told_of_the_first_of_what_they_share():
    holds = Holds(1)
    holds.ask(holder(1), ["lamp"])
    holds.ask(holder(2), ["arm", "base", "lamp"])
    assert holds.ask(holder(3), ["base", "arm"]) == Waits("arm", holder(2))
