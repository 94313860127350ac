"""What a session saves: the first token of its second run, and how much of its prompts is cached.

Runs go through a daemon with the embedded engine, over its unix socket. Each session begins with a
system text or tools that no other one has, so that its first run is cold:

    ttft_second_step_ratio   the first text of a session's second run against its first, behind
                             1,000 tokens of system text. Beside it the workloads of
                             `_workloads.WORKLOADS` with their tools; 5k goes to the engine with the
                             longer context that `prefixes` makes.
    cached_token_share       of a session of 10 runs behind the same 1,000 tokens: how much of all
                             its prompts comes from the cache. The first can't have any: without it
                             is `cached_token_share_after_first`.
    ..._alternating          the same for two sessions whose runs take turns

Times are the caller's, medians over the rounds. `worst_...` is the lowest share of any one run.
"""

import asyncio
import secrets
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks._shared import ENGINE, Arguments, Target, median, parse_arguments, report
from benchmarks._workloads import workload
from benchmarks.prefixes import LONG_ENGINE, make_long_engine
from edge_agent.client import AsyncClient
from edge_agent.core import Tool, Usage
from edge_agent.events import RunFinished, StepFinished, TextDelta
from tests.support.daemon import DaemonProcess, running_daemon

TARGETS = (
    Target("ttft_second_step_ratio", 0.1, True, "second run's first text, 1,000 tokens before it"),
    Target("cached_token_share", 0.9, False, "of all prompts of 10 runs"),
    Target("ttft_second_step_ratio_alternating", 0.1, True, "the same, two sessions in turns"),
    Target("cached_token_share_alternating", 0.9, False, "the same, two sessions in turns"),
)
_OUTPUT_TOKENS = 24
_PREFIX_TOKENS = 1000
_PREFIX_TOLERANCE = 100
_SENTENCE = "Aisle {number} holds {number} pallets of {word}, and robot {word} keeps it tidy. "
_WORDS = ("lamps", "pumps", "valves", "cables", "boards", "motors", "screws", "hoses")
_SENTENCES = 47
_QUESTIONS = (
    "Say what aisle 3 holds.",
    "Which robot keeps aisle 7 tidy?",
    "Name one more aisle.",
    "And what is in it?",
    "How many pallets is that?",
    "Thank you. Who is next?",
    "Say hello to that robot.",
    "Which aisle is the last?",
    "Is it tidy?",
    "Good bye.",
)


@dataclass(slots=True)
class Measured:
    """Of each run of one session, in order: milliseconds to the first text, and its usage."""

    ms: list[float] = field(default_factory=list)
    used: list[Usage] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The second run against the first."""
        return self.ms[1] / self.ms[0]


class Talk:
    """One session: the same front at each run, another question."""

    def __init__(
        self, client: AsyncClient, engine: str, system: str, tools: Sequence[Tool] = ()
    ) -> None:
        self._client = client
        self._engine = engine
        self._system = system
        self._tools = tools
        self._session = secrets.token_hex(4)
        self.measured = Measured()

    async def say(self, text: str) -> None:
        """A run of one step, an answer in words."""
        options = {} if self.measured.ms else {"system": self._system}
        took_ms = None
        began_s = time.monotonic()
        events = self._client.execute(
            text,
            self._tools,
            engine=self._engine,
            session=self._session,
            max_steps=1,
            max_output_tokens=_OUTPUT_TOKENS,
            temperature=0.0,
            **options,  # type: ignore[arg-type]  # the system's text
        )
        async with aclosing(events) as happening:  # type: ignore[type-var]  # a generator
            async for event in happening:
                if took_ms is None and isinstance(event.body, TextDelta):
                    took_ms = (time.monotonic() - began_s) * 1000
                if isinstance(event.body, StepFinished):
                    self.measured.used.append(event.body.usage)
                if isinstance(event.body, RunFinished):
                    assert event.body.run.error is None, event.body.run.error
        assert took_ms is not None, "the model wrote nothing"
        self.measured.ms.append(took_ms)


def system_text() -> str:
    """About 1,000 tokens that no other session begins with."""
    name = secrets.token_hex(3)
    lines = (
        _SENTENCE.format(number=number, word=_WORDS[number % len(_WORDS)])
        for number in range(_SENTENCES)
    )
    return f"Robot {name}, you know this warehouse. " + "".join(lines)


async def second_steps(client: AsyncClient, name: str, engine: str, rounds: int) -> list[Measured]:
    """Two runs of each of so many sessions, behind a workload's tools, or behind 1k of text."""
    done = []
    for _ in range(rounds):
        if name == "1k":
            talk = Talk(client, engine, system_text())
            goals = _QUESTIONS[:2]
        else:
            (goal,), tools = workload(name)
            system = f"Robot {secrets.token_hex(3)}, you are a helpful assistant."
            talk = Talk(client, engine, system, tools)
            goals = (f"{goal.text} (1)", f"{goal.text} (2)")
        for text in goals:
            await talk.say(text)
        assert talk.measured.used[0].cached_tokens < _PREFIX_TOLERANCE, "the first was not cold"
        done.append(talk.measured)
    return done


async def long_talks(client: AsyncClient, sessions: int, turns: int) -> list[Measured]:
    """So many sessions at a time, whose runs take turns."""
    talks = [Talk(client, ENGINE, system_text()) for _ in range(sessions)]
    for question in _QUESTIONS[:turns]:
        for talk in talks:
            await talk.say(question)
    return [talk.measured for talk in talks]


def share(measured: Sequence[Measured], first: int) -> float:
    """How much of the prompts' tokens was cached, from the run with this index on."""
    used = [usage for each in measured for usage in each.used[first:]]
    return sum(each.cached_tokens for each in used) / sum(each.prompt_tokens for each in used)


def worst(measured: Sequence[Measured]) -> float:
    """The lowest share of any run but the first of its session."""
    used = [usage for each in measured for usage in each.used[1:]]
    return min(each.cached_tokens / each.prompt_tokens for each in used)


async def _connected(daemon: DaemonProcess, engine: str) -> AsyncClient:
    async with AsyncClient(str(daemon.admin_socket), name="benchmark") as admin:
        await admin.load(engine)  # else the first run's time would have it
    return AsyncClient(str(daemon.api_socket), name="benchmark")


def measure(arguments: Arguments) -> dict[str, float]:
    """Everything with the recipe's engine, in one daemon."""
    quick = arguments.quick
    names, rounds, turns = (("1k",), 1, 3) if quick else (("1k", "0.3k", "2.5k"), 3, 10)

    async def run(daemon: DaemonProcess) -> dict[str, float]:
        async with await _connected(daemon, ENGINE) as client:
            values: dict[str, float] = {}
            for name in names:
                done = await second_steps(client, name, ENGINE, 1 if name == "2.5k" else rounds)
                values |= _second(name, done)
            alone = await long_talks(client, 1, turns)
            both = await long_talks(client, 2, turns)
        values["ttft_second_step_ratio"] = values["ttft_second_step_ratio_1k"]
        values["cached_token_share"] = share(alone, 0)
        values["cached_token_share_after_first"] = share(alone, 1)
        values["worst_cached_token_share"] = worst(alone)
        values["ttft_second_step_ratio_alternating"] = median(each.ratio for each in both)
        values["cached_token_share_alternating"] = share(both, 0)
        values["cached_token_share_after_first_alternating"] = share(both, 1)
        values["worst_cached_token_share_alternating"] = worst(both)
        return values

    with running_daemon(arguments.store, "worker: {threads: 1}\n") as daemon:
        return asyncio.run(run(daemon))


def measure_long(arguments: Arguments) -> dict[str, float]:
    """5k, with the engine that has room for it."""

    async def run(daemon: DaemonProcess) -> dict[str, float]:
        async with await _connected(daemon, LONG_ENGINE) as client:
            return _second("5k", await second_steps(client, "5k", LONG_ENGINE, 1))

    with tempfile.TemporaryDirectory(prefix="ea-") as directory:
        make_long_engine(arguments, Path(directory))
        with running_daemon(Path(directory), "worker: {threads: 1}\n") as daemon:
            return asyncio.run(run(daemon))


def _second(name: str, done: Sequence[Measured]) -> dict[str, float]:
    return {
        f"tokens_{name}": float(median(each.used[0].prompt_tokens for each in done)),
        f"cold_ms_{name}": median(each.ms[0] for each in done),
        f"second_ms_{name}": median(each.ms[1] for each in done),
        f"ttft_second_step_ratio_{name}": median(each.ratio for each in done),
    }


def main() -> None:
    arguments = parse_arguments(__doc__)
    arguments.manifest()
    values = measure(arguments)
    if not arguments.quick:
        values |= measure_long(arguments)
        tokens = values["tokens_1k"]
        assert abs(tokens - _PREFIX_TOKENS) < _PREFIX_TOLERANCE, f"1k has {tokens} tokens"
    keys = {target.key for target in TARGETS}
    report(
        "sessions",
        TARGETS,
        {key: value for key, value in values.items() if key in keys},
        more={key: value for key, value in values.items() if key not in keys},
        spreads={},
    )


if __name__ == "__main__":
    main()
