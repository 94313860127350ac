"""Room against the rule in words; victims against all subsets."""

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.scheduling import budget
from edge_agent.scheduling.budget import Candidate, Reservation, choose_victims
from edge_agent.scheduling.values import Memory, Rules
from tests.support.chaos import examples

BYTES = st.integers(0, 60)
LEDGER = st.lists(
    st.tuples(BYTES, BYTES).map(lambda pair: Reservation(max(pair), min(pair))), max_size=4
)


def rules(reserve: int, soft: int, most: int | None) -> Rules:
    return Rules(reserve, soft, 0, budget_bytes=most)


@given(st.integers(50, 200), st.none() | BYTES, LEDGER, BYTES, BYTES, st.none() | BYTES)
@examples(400)
def test_room_is_what_is_left_of_the_machine_and_of_the_budget(
    total, free, ledger, reserve, soft, most
):
    """Others keep their reserve, or what they use and the floor; engines keep their claims."""
    used_by_others = 0
    if free is not None:
        used_by_others = max(total - free - sum(each.held_bytes for each in ledger), 0)
    kept = max(used_by_others + soft, reserve)
    claimed = sum(each.committed_bytes for each in ledger)
    expected = total - kept - claimed
    if most is not None and most - claimed < expected:
        expected = most - claimed
    memory, given_rules = Memory(total, free), rules(reserve, soft, most)
    assert budget.room_bytes(memory, ledger, given_rules) == expected
    assert budget.kept_bytes(memory, ledger, given_rules) == kept
    nobody_knows = budget.others_bytes(memory, ledger) is None
    assert nobody_knows == (free is None)
    ceiling = budget.ceiling_bytes(memory, given_rules)
    assert ceiling >= budget.room_bytes(memory, [], given_rules)


def test_the_most_that_an_engine_can_get_is_what_the_larger_of_reserve_and_floor_leaves():
    assert budget.ceiling_bytes(Memory(100, 5), rules(20, 8, None)) == 80
    assert budget.ceiling_bytes(Memory(100, 5), rules(2, 8, None)) == 92
    assert budget.ceiling_bytes(Memory(100, 5), rules(20, 8, 50)) == 50
    assert budget.ceiling_bytes(Memory(100, 5), rules(20, 8, 90)) == 80


CANDIDATES = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from([0.0, 0.1, 0.2, 0.3, 3.0])), max_size=6
).map(lambda pairs: [Candidate(f"e{n}", *pair) for n, pair in enumerate(pairs)])


@given(CANDIDATES, st.integers(-5, 80), st.integers(-2, 4))
@examples(400)
def test_the_victims_are_the_cheapest_of_all_sets_that_are_enough(candidates, missing, places):
    subsets = [
        chosen
        for size in range(len(candidates) + 1)
        for chosen in itertools.combinations(candidates, size)
        if sum(each.frees_bytes for each in chosen) >= missing and len(chosen) >= places
    ]
    found = choose_victims(candidates, missing, places)
    if not subsets:
        assert found is None
        return
    assert found is not None
    assert {each.name for each in found} in [{each.name for each in chosen} for chosen in subsets]

    def rank(chosen):
        cost = math.fsum(each.cost for each in chosen)
        freed = sum(each.frees_bytes for each in chosen)
        return cost, len(chosen), freed, sorted(each.name for each in chosen)

    assert rank(found) == min(rank(chosen) for chosen in subsets)


def test_nobody_goes_where_nothing_is_missing():
    assert choose_victims([Candidate("a", 5, 1.0)], 0, 0) == ()
    assert choose_victims([Candidate("a", 5, 1.0)], 1, 0) == (Candidate("a", 5, 1.0),)


def test_costs_that_do_not_add_up_in_binary_take_no_engine_more():
    """0.1 + 0.2 + 0.3 is more than 0.6 when they are added one by one."""
    free = Candidate("free", 0, 0.0)
    needed = tuple(Candidate(f"e{n}", 1, n / 10) for n in (1, 2, 3))
    assert choose_victims([free, *needed], 3, 0) == needed
