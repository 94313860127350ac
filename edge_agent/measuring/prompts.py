"""The two prompts that engines are measured with, made here: a short and a long one.

Pure. Each `mark` makes a conversation of its own: it stands at the very start, so that no engine
has seen what follows. The two questions of one mark share all but their end.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

_LOG_LINES: Final = 36
"""As many as make the long prompt about 600 tokens with a common tokenizer."""
_PLACES: Final = ("north gate", "packing hall", "pump room", "cold store", "loading dock")
_FINDINGS: Final = (
    "the door was closed",
    "a box stood in the way",
    "the floor was wet",
    "everything was as usual",
    "the light did not work",
    "two people were at work",
    "the fan was loud",
)


class Question(IntEnum):
    """What stands at a prompt's end."""

    FIRST = 0
    SECOND = 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a run is given."""

    system: str
    goal: str


PromptMaker = Callable[[str, Question], Prompt]
"""From a mark and a question."""


def short_prompt(mark: str, question: Question) -> Prompt:
    """A line. It asks for a long answer, so that there is something to measure."""
    hero = ("looks after a greenhouse", "guards a lighthouse")[question]
    return Prompt(_system(mark), f"Write a long story about a robot that {hero}.")


def long_prompt(mark: str, question: Question) -> Prompt:
    """A patrol's log of some 600 tokens, and a question about it."""
    place = _PLACES[question]
    goal = f"{_log()}\n\nTell the story of this patrol, and say much about the {place}."
    return Prompt(_system(mark), goal)


def _system(mark: str) -> str:
    return f"{mark}: You are a helpful assistant."


def _log() -> str:
    seen = zip(itertools.cycle(_PLACES), itertools.cycle(_FINDINGS), strict=False)
    return "\n".join(
        f"Stop {number}: at the {place} {finding}."
        for number, (place, finding) in enumerate(itertools.islice(seen, _LOG_LINES), 1)
    )
