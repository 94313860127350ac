"""Ranking of candidates: as scoring each alone, with one pass per place where they part."""

import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.decoding import ranking

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=6)
# Every candidate ends in its own token, so that none is a prefix of another.
CANDIDATES = st.lists(TOKENS, min_size=1, max_size=8).map(
    lambda heads: {f"tool{n}": [*head, 100 + n] for n, head in enumerate(heads)}
)
SCORES = st.dictionaries(
    st.text(max_size=3), st.floats(-1000, 0, allow_nan=False), min_size=1, max_size=8
)


class Model:
    """Log-probabilities that depend on everything before; counts how often it is asked."""

    def __init__(self, seed: int, listed: int) -> None:
        self._seed = seed
        self._listed = listed
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, tokens: Sequence[int]) -> Mapping[int, float]:
        self.asked.append(tuple(tokens))
        return self.logprobs(tokens)

    def logprobs(self, tokens: Sequence[int]) -> dict[int, float]:
        alphabet = [*range(4), *range(100, 108)]
        weights = {token: 1 + hash((self._seed, tuple(tokens), token)) % 997 for token in alphabet}
        total = sum(weights.values())
        likeliest = sorted(alphabet, key=lambda token: -weights[token])[: self._listed]
        return {token: math.log(weights[token] / total) for token in likeliest}


def branching_nodes(candidates: Mapping[str, Sequence[int]]) -> set[tuple[int, ...]]:
    """Prefixes after which not all candidates that share them go on alike."""
    prefixes = {tuple(each[:n]) for each in candidates.values() for n in range(len(each))}
    return {
        prefix
        for prefix in prefixes
        if len({c[len(prefix)] for c in candidates.values() if tuple(c[: len(prefix)]) == prefix})
        > 1
    }


@given(CANDIDATES, st.integers())
def test_a_score_is_the_sum_over_the_places_where_candidates_part(candidates, seed: int):
    model = Model(seed, listed=12)
    nodes = branching_nodes(candidates)
    scores = ranking.rank(candidates, model)
    for name, tokens in candidates.items():
        expected = sum(
            model.logprobs(tokens[:depth])[tokens[depth]]
            for depth in range(len(tokens))
            if tuple(tokens[:depth]) in nodes
        )
        assert scores[name] == pytest.approx(expected)


@given(CANDIDATES, st.integers())
def test_asks_the_model_once_for_each_place_where_candidates_part(candidates, seed: int):
    model = Model(seed, listed=12)
    ranking.rank(candidates, model)
    assert sorted(model.asked) == sorted(branching_nodes(candidates))


@given(CANDIDATES, st.integers())
def test_the_order_of_the_candidates_makes_no_difference(candidates, seed: int):
    model = Model(seed, listed=12)
    turned = dict(reversed(candidates.items()))
    assert ranking.rank(candidates, model) == pytest.approx(ranking.rank(turned, model))


@given(CANDIDATES, st.integers(), st.integers(1, 11))
def test_an_unlisted_token_is_less_likely_than_every_listed_one(candidates, seed: int, listed: int):
    model = Model(seed, listed)
    scores = ranking.rank(candidates, model)
    for prefix in branching_nodes(candidates):
        listing = model.logprobs(prefix)
        ends = {
            tokens[len(prefix)]: name
            for name, tokens in candidates.items()
            if tuple(tokens[:-1]) == prefix  # nothing but this token tells it apart from here on
        }
        worst_listed = [scores[ends[token]] for token in ends if token in listing]
        unlisted = [scores[ends[token]] for token in ends if token not in listing]
        assert not worst_listed or all(score < min(worst_listed) for score in unlisted)


@pytest.mark.parametrize(
    "candidates",
    [
        {"a": [1, 2], "b": [1, 2]},
        {"a": [1], "b": [1, 2]},
        {"a": [1, 2, 3], "b": [1, 2]},
        {"a": [], "b": [1]},
    ],
)
def test_refuses_a_candidate_that_is_a_prefix_of_another(candidates):
    with pytest.raises(ValueError, match="is a prefix of another"):
        ranking.rank(candidates, Model(0, listed=12))


def test_one_candidate_alone_needs_no_pass():
    model = Model(0, listed=12)
    assert ranking.rank({"only": [1, 2]}, model) == {"only": 0.0}
    assert model.asked == []


@given(SCORES)
def test_the_margin_is_a_share(scores):
    assert 0.0 <= ranking.margin(scores) <= 1.0


@given(SCORES, st.floats(-100, 100))
def test_the_margin_does_not_change_when_all_scores_do(scores, offset: float):
    moved = {name: score + offset for name, score in scores.items()}
    assert ranking.margin(moved) == pytest.approx(ranking.margin(scores), abs=1e-6)


@pytest.mark.parametrize(
    ("scores", "margin"),
    [
        ({"a": 0.0}, 1.0),
        ({"a": -1.0, "b": -1.0}, 0.0),
        ({"a": math.log(3), "b": 0.0}, 0.5),
        ({"a": 0.0, "b": -1000.0, "c": -1000.0}, 1.0),
    ],
)
def test_the_margin_of_known_scores(scores, margin: float):
    assert ranking.margin(scores) == pytest.approx(margin)


@given(st.lists(st.tuples(st.floats(-50, 0), st.floats(-50, 0)), min_size=1, max_size=5))
def test_calibration_takes_away_what_neutral_prompts_say_already(rows):
    baseline = ranking.mean([{"a": a, "b": b} for a, b in rows])
    assert baseline["a"] == pytest.approx(sum(a for a, _ in rows) / len(rows))
    calibrated = ranking.calibrate(baseline, baseline, 1.0)
    assert calibrated == {"a": 0.0, "b": 0.0}


@given(st.floats(-50, 0), st.floats(-50, 0), st.floats(0, 1))
def test_a_share_of_what_is_neutral_is_taken_off(score: float, neutral: float, share: float):
    calibrated = ranking.calibrate({"a": score}, {"a": neutral}, share)
    assert calibrated["a"] == pytest.approx(score - share * neutral)
    assert ranking.calibrate({"a": score}, {"a": neutral}, 0.0) == {"a": score}


@given(st.floats(-50, 0), st.floats(-50, 0), st.floats(0, 4))
def test_two_scores_add_up_by_their_weight(one: float, other: float, weight: float):
    both = ranking.combine({"a": one}, {"a": other, "b": 0.0}, weight)
    assert both == {"a": pytest.approx(one + weight * other)}
