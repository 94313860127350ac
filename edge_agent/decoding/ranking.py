"""Ranking of candidates by the log-probability of their distinguishing tokens. Pure.

One pass per place where candidates part, instead of one per candidate: at each such place the
likeliest next tokens are read once, and every candidate adds its own token's log-probability.
Scores are calibrated by subtracting their mean after prompts that ask for nothing in particular
(contextual calibration, Zhao et al. 2021, arXiv:2102.09690).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

NextTokenLogprobs = Callable[[Sequence[int]], Mapping[int, float]]
"""From the tokens after the prompt to the log-probabilities of the likeliest next ones."""

_UNLISTED_PENALTY = 1.0
"""How far below the least likely listed token, in nats, an unlisted one is taken to be."""


def rank(
    candidates: Mapping[str, Sequence[int]], next_token_logprobs: NextTokenLogprobs
) -> dict[str, float]:
    """Log-probability of each candidate relative to the others, summed where they part.

    Args:
        candidates: name -> token ids; no candidate is a prefix of another.
        next_token_logprobs: called once for each place where candidates part.

    Raises:
        ValueError: two candidates are the same, or one is a prefix of another.
    """
    scores = dict.fromkeys(candidates, 0.0)
    groups: list[tuple[int, list[str]]] = [(0, list(candidates))]
    while groups:
        depth, names = groups.pop()
        if len(names) < 2:  # noqa: PLR2004 - nothing to tell apart
            continue
        branches = _branches(candidates, names, depth)
        if len(branches) > 1:
            listed = next_token_logprobs(candidates[names[0]][:depth])
            floor = min(listed.values(), default=0.0) - _UNLISTED_PENALTY
            for token, group in branches.items():
                for name in group:
                    scores[name] += listed.get(token, floor)
        groups.extend((depth + 1, group) for group in branches.values())
    return scores


def _branches(
    candidates: Mapping[str, Sequence[int]], names: Iterable[str], depth: int
) -> dict[int, list[str]]:
    branches: dict[int, list[str]] = {}
    for name in names:
        tokens = candidates[name]
        if depth >= len(tokens):
            raise ValueError(f"candidate {name!r} is a prefix of another")
        branches.setdefault(tokens[depth], []).append(name)
    return branches


def mean(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each candidate's mean over several rankings of the same candidates; at least one."""
    return {name: sum(each[name] for each in scores) / len(scores) for name in scores[0]}


def calibrate(
    scores: Mapping[str, float], baseline: Mapping[str, float], share: float
) -> dict[str, float]:
    """What the prompt added to each candidate's score; `share` of the baseline is taken off."""
    return {name: score - share * baseline[name] for name, score in scores.items()}


def combine(
    scores: Mapping[str, float], more: Mapping[str, float], weight: float
) -> dict[str, float]:
    """Both scores of each of `scores`, the second `weight` times."""
    return {name: score + weight * more[name] for name, score in scores.items()}


def margin(scores: Mapping[str, float]) -> float:
    """How far the best is ahead, 0 to 1: its softmax share less the second's; 1 for one alone."""
    ordered = sorted(scores.values(), reverse=True)
    if len(ordered) == 1:
        return 1.0
    total = sum(math.exp(score - ordered[0]) for score in ordered)
    return (1.0 - math.exp(ordered[1] - ordered[0])) / total
