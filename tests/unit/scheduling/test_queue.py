"""The order of steps against a naive model, and what it promises: shares, bounds, no growth."""

import dataclasses
import itertools
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core import Priority
from edge_agent.scheduling.queue import OFFSETS_S, Key, StepQueue
from edge_agent.scheduling.values import QueuedStep
from tests.support.chaos import examples

IDS = itertools.count(1)
WEIGHTS = {"arm": 1.0, "base": 3.0, "eye": 0.5}
PRIORITIES = list(Priority)


def ask(
    engine: str = "a",
    client: str = "arm",
    priority: Priority = Priority.NORMAL,
    *,
    deadline_s: float | None = None,
    probe: bool = False,
) -> QueuedStep:
    return QueuedStep(
        next(IDS), engine, client, priority, 0.0, 1, deadline_s=deadline_s, probe=probe
    )


def first(q: StepQueue, engine: str = "a") -> tuple[Key, QueuedStep]:
    found = q.head(engine)
    assert found is not None
    return found


def queue() -> StepQueue:
    return StepQueue(lambda client: WEIGHTS.get(client, 1.0))


@dataclasses.dataclass
class Waiting:
    step: QueuedStep
    arrival: int
    paid: bool
    opened: int


class NaiveQueue:
    """The same by the book: everything is a list, everything is computed anew."""

    def __init__(self) -> None:
        self.virtual_s = 0.0
        self.tags: dict[tuple[str, Priority], float] = {}
        self.waiting: list[Waiting] = []
        self.arrivals = 0

    def of_flow(self, step: QueuedStep) -> list[Waiting]:
        flow = (step.client, step.priority)
        return [each for each in self.waiting if (each.step.client, each.step.priority) == flow]

    def add(self, step: QueuedStep, *, again: bool = False) -> None:
        self.arrivals += 1
        flow, mates = (step.client, step.priority), self.of_flow(step)
        if not mates:
            self.tags[flow] = max(self.tags.get(flow, 0.0), self.virtual_s)
        lane = [each.opened for each in mates if each.step.engine == step.engine]
        opened = lane[0] if lane else self.arrivals
        self.waiting.append(Waiting(step, self.arrivals, again, opened))

    def key(self, each: Waiting) -> tuple[float, int]:
        tag_s = self.tags[each.step.client, each.step.priority]
        return tag_s + OFFSETS_S[each.step.priority], each.opened

    def head(
        self, engine: str, *, probes: bool = True
    ) -> tuple[tuple[float, int], QueuedStep] | None:
        def order(each: Waiting) -> tuple[tuple[float, int], float, int]:
            due_s = math.inf if each.step.deadline_s is None else each.step.deadline_s
            return self.key(each), due_s, each.arrival

        found = [
            e for e in self.waiting if e.step.engine == engine and (probes or not e.step.probe)
        ]
        if not found:
            return None
        first = min(found, key=order)
        return self.key(first), first.step

    def discard(self, step: QueuedStep) -> None:
        self.waiting = [each for each in self.waiting if each.step.id != step.id]

    def take(self, step: QueuedStep, cost_s: float) -> None:
        taken = next(each for each in self.waiting if each.step.id == step.id)
        if not taken.paid:
            rivals = {
                (each.step.client, each.step.priority)
                for each in self.waiting
                if each.step.priority.rank <= step.priority.rank
            }
            cost_s = max(cost_s, 0.01)
            self.tags[step.client, step.priority] += cost_s / WEIGHTS[step.client]
            self.virtual_s += cost_s / sum(WEIGHTS[client] for client, _ in rivals)
        self.discard(step)


ACTS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "take", "take", "again", "discard"]),
        st.sampled_from(["a", "b"]),
        st.sampled_from(list(WEIGHTS)),
        st.sampled_from(PRIORITIES),
        st.sampled_from([None, None, 5.0, 9.0]),
        st.sampled_from([0.0, 0.5, 1.0, 400.0]),
        st.booleans(),
    ),
    max_size=60,
)


@given(ACTS)
@examples(300)
def test_it_does_what_the_naive_queue_does(acts):
    real, naive = queue(), NaiveQueue()
    for act, engine, client, priority, deadline_s, cost_s, probe in acts:
        head = real.head(engine)
        if act == "add":
            step = ask(engine, client, priority, deadline_s=deadline_s, probe=probe)
            real.add(step)
            naive.add(step)
        elif act == "discard" and naive.waiting:
            step = naive.waiting[len(naive.waiting) // 2].step
            assert real.discard(step.id) == step
            assert real.discard(step.id) is None
            naive.discard(step)
        elif act in ("take", "again") and head is not None:
            assert real.take(head[1], cost_s) == head[0]
            naive.take(head[1], cost_s)
            if act == "again":
                real.add(head[1], again=True)
                naive.add(head[1], again=True)
        for name in ("a", "b"):
            assert_same(real.head(name), naive.head(name))
            assert_same(real.head(name, probes=False), naive.head(name, probes=False))
            waits = [each.step for each in naive.waiting if each.step.engine == name]
            assert real.count(name) == len(waits)
            assert (name in set(real.engines())) == bool(waits)
        assert len(real) == len(naive.waiting) == len(real.in_order())
        assert {s.id for s in real.waiting()} == {each.step.id for each in naive.waiting}
        assert all(each.step.id in real for each in naive.waiting)


def assert_same(real, naive):
    assert (real is None) == (naive is None)
    if real is not None:
        assert real[0][0] == pytest.approx(naive[0][0])
        assert (real[0][1], real[1].id) == (naive[0][1], naive[1].id)


@given(st.lists(st.sampled_from(PRIORITIES), min_size=1, max_size=8), st.data())
@examples(60)
def test_a_key_never_changes_while_nobody_is_served(priorities, data):
    q = queue()
    keys = {}
    for number, priority in enumerate(priorities):
        engine = f"e{number}"
        q.add(ask(engine, f"c{number}", priority))
        keys[engine] = first(q, engine)[0]
        other = ask(engine, f"c{number}", priority, deadline_s=1.0)
        q.add(other)
        if data.draw(st.booleans()):
            q.discard(other.id)
        assert {name: first(q, name)[0] for name in keys} == keys


@given(
    st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=2, max_size=4),
    st.lists(st.sampled_from([0.1, 1.0, 7.0]), min_size=1, max_size=3),
)
@examples(60)
def test_clients_that_always_wait_share_service_by_weight(weights, costs):
    q = StepQueue(lambda client: weights[int(client)])
    service: Counter[str] = Counter()
    for client in range(len(weights)):
        q.add(ask(client=str(client)))
    cost = itertools.cycle(costs)
    for _ in range(600):
        step, cost_s = first(q)[1], next(cost)
        q.add(ask(client=step.client))
        q.take(step, cost_s)
        service[step.client] += cost_s
    parts = [service[str(client)] / weight for client, weight in enumerate(weights)]
    assert max(parts) - min(parts) <= 2 * max(costs) / min(weights) + 1e-6


@pytest.mark.parametrize("upper", [Priority.URGENT, Priority.INTERACTIVE, Priority.NORMAL])
@pytest.mark.parametrize("rivals", [1, 5])
@pytest.mark.parametrize("endless", ["one client", "new clients"])
def test_a_batch_step_is_overtaken_for_a_bounded_service(upper, rivals, endless):
    q = queue()
    numbers = itertools.count()
    late = ask(client="late", priority=Priority.BATCH)
    q.add(late)

    def rival() -> QueuedStep:
        number = next(numbers)
        return ask(
            client=f"r{number if endless == 'new clients' else number % rivals}", priority=upper
        )

    for _ in range(rivals):
        q.add(rival())
    service_s = 0.0
    while (step := first(q)[1]) is not late:
        q.take(step, 10.0)
        service_s += 10.0
        q.add(rival())
        assert service_s < 10_000.0
    bound_s = rivals * (OFFSETS_S[Priority.BATCH] - OFFSETS_S[upper])
    assert bound_s - 10.0 * rivals <= service_s <= bound_s + 10.0 * rivals


@pytest.mark.parametrize(
    ("lower", "upper", "seconds"),
    [
        (Priority.BATCH, Priority.URGENT, 900.0),
        (Priority.BATCH, Priority.INTERACTIVE, 780.0),
        (Priority.BATCH, Priority.NORMAL, 600.0),
        (Priority.NORMAL, Priority.INTERACTIVE, 180.0),
        (Priority.INTERACTIVE, Priority.URGENT, 120.0),
    ],
)
def test_after_so_much_service_to_others_a_step_goes_before_a_new_one_of_a_class_above(
    lower, upper, seconds
):
    for served_s, goes_first in ((seconds - 0.5, upper), (seconds + 0.5, lower)):
        q = StepQueue()
        q.add(ask(client="late", priority=lower))
        other = ask("another engine", "other", upper)
        q.add(other)
        q.take(other, served_s)
        q.add(ask(client="new", priority=upper))
        assert first(q)[1].priority is goes_first


def test_whoever_waits_is_listed_by_turn_then_by_deadline():
    q = queue()
    done = ask(client="arm")
    q.add(done)
    q.take(done, 50.0)
    second_turn = ask("b", "arm")
    batch = ask("b", "arm", Priority.BATCH, deadline_s=1.0)
    soon, sooner, urgent = ask(), ask("b"), ask(client="eye", priority=Priority.URGENT)
    early, late = ask(client="eye", deadline_s=5.0), ask(client="eye", deadline_s=9.0)
    for step in (batch, second_turn, soon, late, early, sooner, urgent):
        q.add(step)
    assert q.in_order() == [urgent, early, late, second_turn, soon, sooner, batch]


def test_the_earliest_deadline_goes_first_within_a_client():
    q = queue()
    steps = [ask(deadline_s=due) for due in (None, 30.0, 10.0, 20.0)]
    for step in steps:
        q.add(step)
    order = []
    while (head := q.head("a")) is not None:
        q.take(head[1], 1.0)
        order.append(head[1].deadline_s)
    assert order == [10.0, 20.0, 30.0, None]


def test_nobody_pays_twice_for_a_turn_that_was_cut_short():
    q = queue()
    step, rival = ask(client="x"), ask(client="y")
    q.add(step)
    q.add(rival)
    q.take(step, 5.0)
    q.add(step, again=True)
    q.take(rival, 5.0)
    before = first(q)[0]
    q.take(step, 5.0)
    q.add(ask(client="x"))
    assert first(q)[0][0] == before[0]


def test_a_client_that_was_away_has_saved_nothing_up():
    q = queue()
    for _ in range(10):
        q.add(ask(client="busy"))
        q.take(first(q)[1], 10.0)
    q.add(ask(client="busy"))
    q.add(ask(client="back"))
    q.add(ask(client="back"))
    q.take(first(q)[1], 1.0)
    assert {first(q)[1].client} <= {"busy", "back"}
    assert first(q)[0][0] == pytest.approx(OFFSETS_S[Priority.NORMAL] + 100.0)


def test_weights_follow_a_reload_at_once():
    weights = {"x": 1.0, "y": 1.0}
    q = StepQueue(lambda client: weights[client])
    for client in ("x", "y"):
        q.add(ask(client=client))
    weights["x"] = 9.0
    served: Counter[str] = Counter()
    for _ in range(100):
        step = first(q)[1]
        q.add(ask(client=step.client))
        q.take(step, 1.0)
        served[step.client] += 1
    assert served["x"] == pytest.approx(90, abs=2)


def test_nothing_grows_with_what_has_been_served():
    q = queue()
    stays = ask(client="patient", priority=Priority.BATCH)
    q.add(stays)
    for number in range(3000):
        step = ask("ab"[number % 2], f"c{number}", deadline_s=None if number % 3 else 1e6)
        q.add(step, again=number % 5 == 0)
        if number % 2:
            q.take(step, 0.1)
        else:
            q.discard(step.id)
    assert len(q._entries) == 1
    assert len(q._paid) == 0
    assert sum(len(lane.entries) for lanes in q._lanes.values() for lane in lanes.values()) == 1
    assert len(q._flows) <= 300
