"""Which engine makes room: only when there is none, an idle one first, the longest unused."""

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.scheduling.residency import Resident, choose_victim

RESIDENTS = st.lists(
    st.builds(
        Resident, st.text(min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 5).map(float)
    ),
    unique_by=lambda each: each.name,
    max_size=6,
)


@given(RESIDENTS, st.integers(1, 8))
def test_nobody_goes_while_there_is_room(residents, maximum: int):
    assert (choose_victim(residents, maximum) is None) == (len(residents) < maximum)


@given(RESIDENTS, st.integers(1, 6))
def test_a_busy_engine_goes_only_when_all_are_busy(residents, maximum: int):
    victim = choose_victim(residents, maximum)
    chosen = [each for each in residents if each.name == victim]
    if chosen and chosen[0].busy_steps:
        assert all(each.busy_steps for each in residents)


@given(RESIDENTS, st.integers(1, 6))
def test_nobody_alike_was_used_longer_ago(residents, maximum: int):
    victim = choose_victim(residents, maximum)
    for chosen in (each for each in residents if each.name == victim):
        alike = [each for each in residents if bool(each.busy_steps) == bool(chosen.busy_steps)]
        assert chosen.last_used_s == min(each.last_used_s for each in alike)


@given(RESIDENTS, st.integers(1, 6), st.randoms(use_true_random=False))
def test_the_order_of_the_engines_makes_no_difference(residents, maximum: int, random):
    shuffled = list(residents)
    random.shuffle(shuffled)
    assert choose_victim(shuffled, maximum) == choose_victim(residents, maximum)


@given(RESIDENTS, st.integers(1, 6))
def test_unloading_the_victims_one_by_one_makes_room(residents, maximum: int):
    left = {each.name: each for each in residents}
    while (victim := choose_victim(left.values(), maximum)) is not None:
        del left[victim]
    assert len(left) == min(len(residents), maximum - 1)
