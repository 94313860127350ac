"""A session's history: what a run leaves in it, and which of it makes room. Pure.

A turn is a user's message with all that follows it up to the next one. Turns are kept or dropped
whole, oldest first; the system's message is no part of any.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from edge_agent.core import Message, Role, TextPart

_CHARACTERS_OF_A_MARKER = 16
"""What stands around a message in a prompt, about."""
SUMMARY_PROMPT = (
    "You write minutes. Say in a few plain sentences what was asked, what was done and what was "
    "found out: names, places, numbers and results. Add nothing."
)
_SUMMARY_HEAD = "What was said and done before, in short: "


@dataclass(frozen=True, slots=True)
class Split:
    """A history in three: `head` is the system's message, if any; `oldest` is what makes room."""

    head: tuple[Message, ...]
    oldest: tuple[Message, ...]
    newest: tuple[Message, ...]


def left_by(
    said: Sequence[Message], transcript: Sequence[Message], number: int
) -> tuple[Message, ...]:
    """What the session's `number`th run leaves: its caller's messages and its transcript.

    Calls without results are left out, and so is what nobody has answered; a run that has decided
    nothing leaves nothing. Call ids are made the run's own, as each run counts its calls anew.
    """
    turns = _answered((*said, *transcript))
    while turns and turns[-1].role is Role.USER:
        turns = turns[:-1]
    if len(turns) <= len(_answered(said)):
        return ()
    return tuple(_renamed(turn, number) for turn in turns)


def characters(messages: Sequence[Message]) -> int:
    """About how long the messages are in a prompt."""
    return sum(
        len(message.text)
        + sum(len(call.name) + len(call.arguments_json) for call in message.tool_calls)
        + _CHARACTERS_OF_A_MARKER
        for message in messages
    )


def size_bytes(messages: Sequence[Message]) -> int:
    """The texts of the messages as UTF-8."""
    return sum(
        len(message.text.encode())
        + sum(len(call.name) + len(call.arguments_json.encode()) for call in message.tool_calls)
        for message in messages
    )


def split(history: Sequence[Message], too_long: int) -> Split:
    """As many of the oldest turns as are `too_long` characters together, at least one if any is."""
    begin = 1 if history and history[0].role is Role.SYSTEM else 0
    end, dropped = begin, 0
    while end < len(history) and (dropped < too_long or end == begin):
        after = _next_turn(history, end)
        dropped += characters(history[end:after])
        end = after
    return Split(tuple(history[:begin]), tuple(history[begin:end]), tuple(history[end:]))


def summary(text: str) -> Message:
    """The message that stands for older turns."""
    return Message(Role.USER, (TextPart(_SUMMARY_HEAD + text.strip()),), is_summary=True)


def to_summarise(messages: Sequence[Message]) -> tuple[Message, ...]:
    """What a model is to be asked for a summary of these: their words, as plain text."""
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    lines = [line for message in messages for line in _told(message, names)]
    return (
        Message(Role.SYSTEM, (TextPart(SUMMARY_PROMPT),)),
        Message(Role.USER, (TextPart("\n".join(lines)),)),
    )


def _told(message: Message, names: dict[str, str]) -> list[str]:
    if message.role is Role.TOOL:
        outcome = "failed" if message.is_error else "returned"
        return [f"{names.get(message.tool_call_id, 'tool')} {outcome}: {message.text}"]
    if message.tool_calls:
        return [f"called {call.name} {call.arguments_json}" for call in message.tool_calls]
    return [message.text if message.is_summary else f"{message.role}: {message.text}"]


def _next_turn(history: Sequence[Message], begin: int) -> int:
    at = begin + 1
    while at < len(history) and history[at].role is not Role.USER:
        at += 1
    return at


def _answered(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Without calls that have no result, and without what is empty then."""
    results = {message.tool_call_id for message in messages if message.role is Role.TOOL}
    found = []
    for message in messages:
        if message.tool_calls:
            calls = tuple(call for call in message.tool_calls if call.id in results)
            if not calls and not message.parts:
                continue
            message = dataclasses.replace(message, tool_calls=calls)  # noqa: PLW2901
        found.append(message)
    return tuple(found)


def _renamed(message: Message, number: int) -> Message:
    calls = tuple(
        dataclasses.replace(call, id=f"{number}/{call.id}") for call in message.tool_calls
    )
    answers = f"{number}/{message.tool_call_id}" if message.tool_call_id else ""
    return dataclasses.replace(message, tool_calls=calls, tool_call_id=answers)
