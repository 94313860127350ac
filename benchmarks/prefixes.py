"""What a robot's own tools cost: the first token with and without them cached, and a tool step.

Each of `_workloads.WORKLOADS` goes through a daemon with the embedded engine, over its unix socket:

    cold   the first text of an answer, nothing of the prompt in the cache: another system text
           in every round, so that even the first tokens differ
    warm   the same for the next goal, with the same system text and tools: only the goal is read
    first  a whole step that chooses a tool (strategy `ranked`) and writes its arguments, the
           tools' prompt cached; for new tools it also measures what each scores without a goal
    tool   the same step for the next goals; not for 11k, whose 118 tools would take minutes

Times are the caller's, medians over the rounds. The engine has one thread for each core here, since
a long prompt takes minutes with one.

The recipe's engine holds 4096 tokens. The workloads beyond that go to a second engine in a store
made for the purpose: the same weights with one slot and a longer context. The model was trained for
8192 tokens: 5k is within that, 11k is not. As the library refuses more than the model file says,
the copy's says 12,288. What the model writes there means nothing: time is measured, not quality.
"""

import asyncio
import hashlib
import json
import os
import secrets
import struct
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._shared import (
    ENGINE,
    Arguments,
    machine,
    median,
    parse_arguments,
    print_line,
)
from benchmarks._workloads import workload
from edge_agent.client import AsyncClient
from edge_agent.core import Message, Role, TextPart, Usage
from edge_agent.engines.manifest import MANIFEST_NAME
from edge_agent.events import RunFinished, StepFinished, TextDelta
from tests.support.daemon import DaemonProcess, running_daemon

LONG_ENGINE = f"{ENGINE}-long"
LONG_TOKENS = 12_288
TRAINED_TOKENS = 8192
_CONTEXT_KEY = b"llama.context_length"
_GGUF_UINT32 = 4
_OUTPUT_TOKENS = 48
_MAX_COMMON_TOKENS = 40
"""What prompts with different system texts share: a turn's opening and the text's first words."""


@dataclass(frozen=True, slots=True)
class Part:
    """A workload, the engine that takes it, and how often each thing is measured."""

    workload: str
    engine: str
    cold: int
    warm: int
    steps: int


QUICK = (Part("0.3k", ENGINE, 1, 1, 1), Part("0.3k", LONG_ENGINE, 1, 1, 1))
FULL = (
    Part("0.3k", ENGINE, cold=5, warm=9, steps=9),
    Part("2.5k", ENGINE, cold=1, warm=7, steps=5),
    Part("5k", LONG_ENGINE, cold=1, warm=5, steps=2),
    Part("11k", LONG_ENGINE, cold=1, warm=3, steps=0),
)
KINDS = ("cold", "warm", "first", "tool")


@dataclass(slots=True)
class Measured:
    """Of one part: milliseconds by kind, and the prompt's tokens."""

    part: Part
    tokens: int = 0
    ms: dict[str, list[float]] = field(default_factory=dict)


class Robot:
    """A caller with one workload's goal and tools."""

    def __init__(self, client: AsyncClient, part: Part) -> None:
        self._client = client
        self._messages, self._tools = workload(part.workload)
        self._number = 0
        self._part = part
        self.measured = Measured(part)

    async def measure(self) -> Measured:
        """All kinds, in the order in which each finds the cache as it wants it."""
        part, system = self._part, ""
        for _ in range(part.cold):
            system = f"Robot {secrets.token_hex(3)}, you are a helpful assistant."
            used = await self._answer("cold", system)
            assert used.cached_tokens <= _MAX_COMMON_TOKENS, "something of the prompt was cached"
            self.measured.tokens = used.prompt_tokens
        for _ in range(part.warm):
            used = await self._answer("warm", system)
            assert used.cached_tokens > used.prompt_tokens * 0.8, "the tools were not cached"
        for kind in ("first", *("tool",) * part.steps) if part.steps else ():
            await self._timed(kind, system, 2, StepFinished)
        return self.measured

    async def _answer(self, kind: str, system: str) -> Usage:
        """A run of one step, which is an answer in words; until its first text."""
        return await self._timed(kind, system, 1, TextDelta)

    async def _timed(self, kind: str, system: str, max_steps: int, until: type[object]) -> Usage:
        """Run the next goal; returns what its first step used."""
        took_ms, used = None, Usage()
        began_s = time.monotonic()
        async with aclosing(self._run(system, max_steps)) as events:
            async for event in events:
                if took_ms is None and isinstance(event.body, until):
                    took_ms = (time.monotonic() - began_s) * 1000
                if isinstance(event.body, StepFinished):
                    used = event.body.usage
                    break
                assert not isinstance(event.body, RunFinished), event.body.run.error
        assert took_ms is not None, "the model wrote nothing"
        self.measured.ms.setdefault(kind, []).append(took_ms)
        return used

    def _run(self, system: str, max_steps: int) -> Any:
        self._number += 1
        goal = Message(Role.USER, (TextPart(f"{self._messages[0].text} ({self._number})"),))
        return self._client.execute(
            [goal],
            self._tools,
            engine=self._part.engine,
            system=system,
            max_steps=max_steps,
            max_output_tokens=_OUTPUT_TOKENS,
            temperature=0.0,
        )


def make_long_engine(arguments: Arguments, store: Path) -> None:
    """The engine with one slot and a longer context, alone in its store."""
    manifest = json.loads((arguments.engine_directory / MANIFEST_NAME).read_bytes())
    (store / LONG_ENGINE).mkdir()
    (spec,) = manifest["files"]
    model = bytearray((arguments.engine_directory / spec["path"]).read_bytes())
    at = model.index(_CONTEXT_KEY) + len(_CONTEXT_KEY)
    assert struct.unpack_from("<II", model, at) == (_GGUF_UINT32, TRAINED_TOKENS)
    struct.pack_into("<I", model, at + 4, LONG_TOKENS)
    (store / LONG_ENGINE / spec["path"]).write_bytes(model)
    spec["sha256"] = hashlib.sha256(model).hexdigest()
    manifest |= {"name": LONG_ENGINE, "slots": 1, "context_tokens": LONG_TOKENS}
    (store / LONG_ENGINE / MANIFEST_NAME).write_text(json.dumps(manifest))


def measure(store: Path, threads: int, parts: Sequence[Part]) -> list[Measured]:
    """One part after the other, in a daemon of their own."""
    with running_daemon(store, f"worker: {{threads: {threads}}}\n") as daemon:
        return asyncio.run(_measure(daemon, parts))


async def _measure(daemon: DaemonProcess, parts: Sequence[Part]) -> list[Measured]:
    async with (
        AsyncClient(str(daemon.api_socket), name="benchmark") as client,
        AsyncClient(str(daemon.admin_socket), name="benchmark") as admin,
    ):
        for engine in {part.engine for part in parts}:
            await admin.load(engine)  # else the first run's time would have it
        return [await Robot(client, part).measure() for part in parts]


def print_table(host: str, threads: int, done: Sequence[Measured]) -> None:
    print(f"\nprefixes on {host}; engine {ENGINE}, threads: {threads}; medians, ms")
    print(f"{'':8}{'tools':>6}{'tokens':>8}" + "".join(f"{kind:>10}" for kind in KINDS))
    for each in done:
        tools = len(workload(each.part.workload)[1])
        middles = "".join(
            f"{median(each.ms[kind]):>10.0f}" if kind in each.ms else f"{'-':>10}" for kind in KINDS
        )
        print(f"{each.part.workload:8}{tools:>6}{each.tokens:>8}{middles}{_note(each)}")


def _note(measured: Measured) -> str:
    if measured.tokens > TRAINED_TOKENS:
        return f"  beyond the {TRAINED_TOKENS} that the model was trained for: time, not quality"
    return "  beyond the recipe's context" if measured.part.engine == LONG_ENGINE else ""


def main() -> None:
    arguments = parse_arguments(__doc__)
    arguments.manifest()
    threads = len(os.sched_getaffinity(0))
    plan = QUICK if arguments.quick else FULL
    done = measure(arguments.store, threads, [part for part in plan if part.engine == ENGINE])
    with tempfile.TemporaryDirectory(prefix="ea-") as directory:
        make_long_engine(arguments, Path(directory))
        long = [part for part in plan if part.engine == LONG_ENGINE]
        done += measure(Path(directory), threads, long)
    host = machine()
    print_table(host, threads, done)
    values = {}
    for each in done:
        values[f"tokens_{each.part.workload}"] = float(each.tokens)
        for kind, ms in each.ms.items():
            values[f"{kind}_ms_{each.part.workload}"] = median(ms)
    print_line("prefixes", host, {"threads": threads, **values})


if __name__ == "__main__":
    main()
