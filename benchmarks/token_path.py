"""What our path from the engine to a caller costs, per token and to the first one.

The same engine with one thread decodes the same prompt in three ways, in alternating rounds: the
backend's own loop in a process without anything around it (`bare`), the library's own HTTP listener
read by a minimal SSE client (`http`), and a daemon with its worker, read by our client over gRPC.
Speed and CPU time are counted from the first token to the last. Ratios are medians over the rounds.
Engines are loaded anew in several blocks, each in another order: one and the same engine decodes up
to a tenth faster or slower for as long as its process lives, most often the first one faster.
The daemon's CPU time is set against that of a bare `grpc.aio` server that sends the same messages
at the same times, while an engine decodes beside it as it does beside the daemon.
"""

import asyncio
import base64
import itertools
import json
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._shared import (
    ENGINE,
    Arguments,
    Child,
    Target,
    median,
    parse_arguments,
    process_cpu_s,
    report,
    spread,
)
from edge_agent.api.convert_response import fill_event
from edge_agent.client import AsyncClient
from edge_agent.events import Event, TextDelta
from edge_agent.v1 import run_service_pb2 as pb
from tests.support.daemon import BASE_CONFIG, running_daemon

TARGETS = (
    Target("tok_s_ratio_vs_bare", 0.98, False, "tokens/s, ours against the backend's own loop"),
    Target("tok_s_ratio_vs_http", 1.0, False, "tokens/s, ours against the engine's HTTP listener"),
    Target("ttft_added_ms", 2.0, True, "first token, ours less bare, prefix cached"),
    Target("streams4_ratio_vs_bare", 0.97, False, "4 streams, all tokens/s, ours against bare"),
    Target("daemon_cpu_ratio_vs_grpc", 1.5, True, "daemon CPU a token against a bare gRPC server"),
)
GOAL = "Write a long story about a robot that works in a warehouse."
STREAMS = 4
_TTFT_TOKENS = 2
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How long each thing is measured, in seconds over all blocks, and the least rounds a block.

    `tokens` is the length of a stream: the model would write more, so that every stream ends there,
    but the sides of a round shall be seconds apart only, since a busy machine's speed wanders.
    """

    blocks: int
    tokens: int
    min_rounds: int
    single_s: float
    ttft_s: float
    streams_s: float
    cpu_s: float


QUICK = Plan(blocks=1, tokens=20, min_rounds=1, single_s=0, ttft_s=1, streams_s=0, cpu_s=0)
FULL = Plan(blocks=3, tokens=64, min_rounds=2, single_s=60, ttft_s=24, streams_s=45, cpu_s=30)


@dataclass(slots=True)
class Stream:
    """One completion as its reader saw it."""

    began_s: float
    pieces: list[tuple[float, int]] = field(default_factory=list)

    @property
    def first_s(self) -> float:
        """When the first text came."""
        return self.pieces[0][0]

    @property
    def last_s(self) -> float:
        """When the last text came."""
        return self.pieces[-1][0]

    @property
    def ttft_ms(self) -> float:
        """From before the call to the first text."""
        return (self.first_s - self.began_s) * 1000

    @property
    def tokens(self) -> int:
        """All of them."""
        return sum(tokens for _at_s, tokens in self.pieces)


def tokens_per_second(streams: Sequence[Stream]) -> float:
    """All tokens after the first of each stream, over the time from the first to the last one."""
    tokens = sum(stream.tokens - stream.pieces[0][1] for stream in streams)
    began_s = min(stream.first_s for stream in streams)
    return tokens / (max(stream.last_s for stream in streams) - began_s)


class Bare:
    """The backend's own loop, called in its own process."""

    def __init__(self, child: Child) -> None:
        self._child = child

    def begin(self, max_tokens: int) -> None:
        """Decode beside what is measured; `end` waits for it."""
        self._child.tell(goal=GOAL, streams=1, max_tokens=max_tokens)

    def end(self) -> None:
        """The decoding that `begin` began is over."""
        self._child.answer()

    def run(self, streams: int, max_tokens: int) -> list[Stream]:
        """Decode `streams` times at once."""
        done = self._child.ask(goal=GOAL, streams=streams, max_tokens=max_tokens)
        return [Stream(each["began_s"], each["pieces"]) for each in done]


class Http:
    """The library's own listener, read by the least that an SSE client can be."""

    def __init__(self, child: Child) -> None:
        self._address, self._key = child.hello["path"], child.hello["key"]
        self._prompt = child.ask(goal=GOAL)["prompt"]

    def run(self, _streams: int, max_tokens: int) -> list[Stream]:
        """Decode once; concurrent streams are not compared over HTTP."""
        body = json.dumps(
            {
                "prompt": self._prompt,
                "max_tokens": max_tokens,
                "temperature": 0,
                "stream": True,
                "cache_prompt": True,
            }
        ).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {self._key}\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        stream = Stream(time.monotonic())
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(_TIMEOUT_S)
            channel.connect(self._address)
            channel.sendall(head.encode() + body)
            for event in _sse(channel):
                if event["choices"][0]["text"]:
                    stream.pieces.append((time.monotonic(), 1))
        return [stream]


def _sse(channel: socket.socket) -> Iterator[dict[str, Any]]:
    """The events of a response; lines of HTTP's chunked coding never begin with `data: `."""
    pending = b""
    while data := channel.recv(65536):
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


class Grpc:
    """Our client at a daemon, or at whatever else serves ExecuteRun on a socket."""

    def __init__(self, runner: asyncio.Runner, address: Path) -> None:
        self._runner = runner
        self._client = runner.run(_connect(address))
        self._watched = 0
        self._cpu_s: list[float] = []
        self.messages: list[tuple[float, bytes]] = []
        """What the last single stream brought, and how long after its beginning."""

    def close(self) -> None:
        """Hang up."""
        self._runner.run(self._client.close())

    def run(self, streams: int, max_tokens: int) -> list[Stream]:
        """Decode `streams` times at once."""
        return self._runner.run(self._run(streams, max_tokens))

    async def _run(self, streams: int, max_tokens: int) -> list[Stream]:
        return await asyncio.gather(*(self._stream(max_tokens) for _ in range(streams)))

    def cpu_us_per_token(self, server: int, max_tokens: int) -> float:
        """CPU time of the server process from the first token to the last, over those tokens."""
        self._watched, self._cpu_s = server, []
        (stream,) = self.run(1, max_tokens)
        self._watched = 0
        return (self._cpu_s[-1] - self._cpu_s[0]) * 1e6 / (stream.tokens - stream.pieces[0][1])

    async def _stream(self, max_tokens: int) -> Stream:
        events: list[tuple[float, Event]] = []
        stream = Stream(time.monotonic())
        async for event in self._client.execute(
            GOAL, engine=ENGINE, max_output_tokens=max_tokens, temperature=0.0, max_steps=1
        ):
            now_s = time.monotonic()
            events.append((now_s, event))
            if isinstance(event.body, TextDelta):
                stream.pieces.append((now_s, event.body.tokens))
                if self._watched:
                    self._cpu_s.append(process_cpu_s(self._watched))
        self.messages = [(at_s - stream.began_s, _encoded(event)) for at_s, event in events]
        return stream


async def _connect(address: Path) -> AsyncClient:
    return AsyncClient(str(address), name="benchmark")


def _encoded(event: Event) -> bytes:
    message = pb.ExecuteRunResponse()
    fill_event(message.event, event)
    return message.SerializeToString()


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


Side = Callable[[int, int], list[Stream]]


def rounds(min_rounds: int, seconds: float) -> Iterator[int]:
    """Numbers of rounds, at least so many and until the time is over."""
    until_s = time.monotonic() + seconds
    for number in itertools.count():
        if number >= min_rounds and time.monotonic() >= until_s:
            return
        yield number


def one_round(
    number: int, sides: dict[str, Side], streams: int, max_tokens: int
) -> dict[str, list[Stream]]:
    """Run every side once; each round begins with another one."""
    names = list(sides)
    turn = number % len(names)
    return {name: sides[name](streams, max_tokens) for name in names[turn:] + names[:turn]}


@dataclass(slots=True)
class Bench:
    """The sides, ready and warm, and what has been measured."""

    bare: Bare
    http: Http
    grpc: Grpc
    daemon_pid: int
    tokens: int
    min_rounds: int
    values: dict[str, list[float]] = field(default_factory=dict)

    @property
    def sides(self) -> dict[str, Side]:
        """By name."""
        return {"bare": self.bare.run, "http": self.http.run, "grpc": self.grpc.run}

    def warm_up(self) -> None:
        """Put the prompt into the cache of every slot."""
        for side in (self.bare, self.grpc):
            side.run(STREAMS, 16)
        for one in (self.bare, self.http, self.grpc):
            (stream,) = one.run(1, self.tokens)
            assert stream.tokens >= self.tokens * 0.95, "the model stopped early: the rounds differ"

    def measure_single(self, seconds: float) -> None:
        """Tokens a second of one stream."""
        for number in rounds(self.min_rounds, seconds):
            done = one_round(number, self.sides, 1, self.tokens)
            speeds = {name: tokens_per_second(streams) for name, streams in done.items()}
            for name, speed in speeds.items():
                self._add(f"{name}_tok_s", speed)
            self._add("tok_s_ratio_vs_bare", speeds["grpc"] / speeds["bare"])
            self._add("tok_s_ratio_vs_http", speeds["grpc"] / speeds["http"])

    def measure_ttft(self, seconds: float, replay: Child, replayed: Grpc) -> None:
        """Milliseconds to the first token; `floor`: to the first message of a bare gRPC server."""
        self.grpc.run(1, _TTFT_TOKENS)
        replay.ask(messages=[(0, _base64(raw)) for _after_s, raw in self.grpc.messages[-3:]])
        sides = {**self.sides, "floor": replayed.run}
        for number in rounds(self.min_rounds, seconds):
            done = one_round(number, sides, 1, _TTFT_TOKENS)
            for name, (stream,) in done.items():
                self._add(f"{name}_ttft_ms", stream.ttft_ms)
            self._add("ttft_added_ms", done["grpc"][0].ttft_ms - done["bare"][0].ttft_ms)

    def measure_streams(self, seconds: float) -> None:
        """Tokens a second of several streams at once."""
        sides = {name: self.sides[name] for name in ("bare", "grpc")}
        for number in rounds(self.min_rounds, seconds):
            done = one_round(number, sides, STREAMS, self.tokens)
            speeds = {name: tokens_per_second(streams) for name, streams in done.items()}
            for name, speed in speeds.items():
                self._add(f"{name}_streams{STREAMS}_tok_s", speed)
            self._add(f"streams{STREAMS}_ratio_vs_bare", speeds["grpc"] / speeds["bare"])

    def measure_cpu(self, seconds: float, replay: Child, replayed: Grpc) -> None:
        """CPU time a token of the daemon, and of a bare server that sends the same."""
        for _ in rounds(self.min_rounds, seconds):
            ours_us = self.grpc.cpu_us_per_token(self.daemon_pid, self.tokens)
            replay.ask(messages=[(after_s, _base64(raw)) for after_s, raw in self.grpc.messages])
            self.bare.begin(self.tokens)
            bare_us = replayed.cpu_us_per_token(replay.pid, self.tokens)
            self.bare.end()
            self._add("daemon_cpu_us_per_token", ours_us)
            self._add("grpc_cpu_us_per_token", bare_us)
            self._add("daemon_cpu_ratio_vs_grpc", ours_us / bare_us)

    def _add(self, key: str, value: float) -> None:
        self.values.setdefault(key, []).append(value)


def measure(arguments: Arguments, plan: Plan) -> dict[str, list[float]]:
    """Everything, in blocks."""
    values: dict[str, list[float]] = {}
    for block in range(plan.blocks):
        for key, measured in measure_block(arguments, plan, block).items():
            values.setdefault(key, []).extend(measured)
    return values


def measure_block(arguments: Arguments, plan: Plan, block: int) -> dict[str, list[float]]:
    """Start every side, beginning with another one in each block, and run all rounds."""
    engine = {
        "directory": str(arguments.engine_directory), "options": arguments.load_options(),
    }  # fmt: skip
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ea-")))
        daemon = stack.enter_context(running_daemon(arguments.store, BASE_CONFIG))
        grpc = Grpc(runner, daemon.api_socket)
        stack.callback(grpc.close)
        children: dict[str, Child] = {}
        names = ["bare", "http", "grpc"]
        turn = block % len(names)
        for name in names[turn:] + names[:turn]:
            if name == "grpc":
                grpc.run(1, _TTFT_TOKENS)  # loads the daemon's engine
            else:
                children[name] = stack.enter_context(Child("engine", **engine))
        bare, http = children["bare"], children["http"]
        replay = stack.enter_context(Child("replay", socket=str(directory / "replay.sock")))
        replayed = Grpc(runner, directory / "replay.sock")
        stack.callback(replayed.close)
        bench = Bench(
            Bare(bare), Http(http), grpc, daemon.process.pid, plan.tokens, plan.min_rounds
        )
        bare.ask(goal=GOAL)
        bench.warm_up()
        bench.measure_single(plan.single_s / plan.blocks)
        bench.measure_ttft(plan.ttft_s / plan.blocks, replay, replayed)
        bench.measure_streams(plan.streams_s / plan.blocks)
        bench.measure_cpu(plan.cpu_s / plan.blocks, replay, replayed)
        return bench.values


def main() -> None:
    arguments = parse_arguments(__doc__)
    values = measure(arguments, QUICK if arguments.quick else FULL)
    medians = {key: median(each) for key, each in values.items()}
    # The difference of the medians, as the two sides' waits are not paired.
    medians["ttft_added_ms"] = medians["grpc_ttft_ms"] - medians["bare_ttft_ms"]
    keys = [target.key for target in TARGETS]
    report(
        "token_path",
        TARGETS,
        {key: medians[key] for key in keys},
        more={key: value for key, value in medians.items() if key not in keys},
        spreads={key: spread(each) for key, each in values.items()},
    )


if __name__ == "__main__":
    main()
