"""The simulated device of the scheduler benchmark: it conserves memory, and every step ends."""

import pytest

from benchmarks._sched_bound import least_load_s
from benchmarks._sched_devices import ORIN_NANO_8, ORIN_NX_16
from benchmarks._sched_policies import PEERS, KeepAliveOrder, LeastRecentByCount, Ours, Peer
from benchmarks._sched_records import Tally
from benchmarks._sched_workloads import WORKLOADS, Agent, Trace, make_trace
from benchmarks._sched_world import World
from benchmarks.scheduler import bound_of, longest_waits
from edge_agent.core import Priority
from edge_agent.scheduling.values import Action

DAYS = 0.02


class Watched(Ours):
    """Ours, comparing at each decision what it knows to be held with what the world says."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self.world: World | None = None
        self.compared = 0
        self.least_available_bytes = trace.device.total_bytes
        self.decide = self._decide

    def _decide(self, now_s: float) -> list[Action]:
        assert self.world is not None
        available = self.world.available_bytes()
        self.least_available_bytes = min(self.least_available_bytes, available)
        if not self.planner.state.in_transition():
            known = sum(each.held_bytes for each in self.planner.state.residents.values())
            others = self.world.others_bytes()
            assert available + others + known == self.world.trace.device.total_bytes
            self.compared += 1
        return self.planner.decide(now_s)


def run(trace: Trace, policy: type[Ours | Peer]) -> Tally:
    return World(trace, policy(trace)).run()


@pytest.mark.parametrize("workload", WORKLOADS)
def test_engines_others_and_what_is_available_are_always_the_total(workload: str):
    trace = make_trace(workload, ORIN_NANO_8, DAYS, 1)
    policy = Watched(trace)
    policy.world = World(trace, policy)
    policy.world.run()
    assert policy.compared > len(trace.tasks)
    assert policy.least_available_bytes >= 0


@pytest.mark.parametrize("policy", [Ours, *PEERS.values()])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_each_step_has_one_outcome(workload: str, policy: type[Ours | Peer]):
    trace = make_trace(workload, ORIN_NANO_8, DAYS, 1)
    tally = run(trace, policy)
    assert sorted(o.step.id for o in tally.outcomes) == [task.step.id for task in trace.tasks]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_under_ours_every_step_ends_or_has_missed_its_deadline(workload: str):
    tally = run(make_trace(workload, ORIN_NX_16, DAYS, 2), Ours)
    assert all(outcome.ended_s is not None or outcome.missed for outcome in tally.outcomes)
    assert tally.floor_violations == tally.oom_kills == 0


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_bound_is_never_above_ours(workload: str, seed: int):
    trace = make_trace(workload, ORIN_NANO_8, 0.05, seed).cut(1200.0, 400.0)
    tally = run(trace, Ours)
    bound = bound_of(trace, tally, branch_s=0.0)
    assert bound.feasible
    assert 0 < bound.relaxed_load_s <= tally.load_s + 1e-6


def test_the_bound_falls_where_steps_may_wait_for_longer():
    trace = make_trace("ping-pong", ORIN_NANO_8, 0.05, 1).cut(600.0, 400.0)
    short = least_load_s(trace, dict.fromkeys(Priority, 40.0), dt_s=1.0)
    long = least_load_s(trace, dict.fromkeys(Priority, 150.0), dt_s=1.0)
    assert short.feasible
    assert long.feasible
    assert long.relaxed_load_s < short.relaxed_load_s


def test_a_trace_is_the_same_for_the_same_seed():
    first, again, other = (make_trace("mix", ORIN_NX_16, DAYS, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_cut_keeps_what_happens_inside_it_and_moves_the_clock():
    whole = make_trace("mix", ORIN_NANO_8, 0.05, 1)
    part = whole.cut(1000.0, 500.0)
    inside = [task for task in whole.tasks if 1000.0 <= task.step.asked_s < 1500.0]
    assert [task.step.asked_s + 1000.0 for task in part.tasks] == pytest.approx(
        [task.step.asked_s for task in inside]
    )
    assert part.others_bytes(100.0) == pytest.approx(whole.others_bytes(1100.0), abs=2)


def test_who_counts_engines_kills_a_busy_one_and_its_step_comes_back():
    trace = make_trace("ping-pong", ORIN_NANO_8, 0.01, 1)
    tally = run(trace, LeastRecentByCount)
    assert tally.busy_evictions > 0


def test_keep_alive_order_kills_nobody_that_is_busy():
    assert run(make_trace("ping-pong", ORIN_NANO_8, DAYS, 1), KeepAliveOrder).busy_evictions == 0


def test_ours_kills_nobody_that_is_busy_where_others_keep_to_their_reserve():
    for workload in ("ping-pong", "bursts", "robot"):
        assert run(make_trace(workload, ORIN_NANO_8, DAYS, 1), Ours).busy_evictions == 0


def test_waits_are_the_longest_of_each_class():
    tally = run(make_trace("bursts", ORIN_NANO_8, DAYS, 1), Ours)
    longest = longest_waits(tally)
    assert max(longest.values()) == max(outcome.wait_s for outcome in tally.outcomes)
    assert set(longest) == {Agent("a", "b").priority, Priority.NORMAL}
