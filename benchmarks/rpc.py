"""What a call costs, how soon a run is let go of, and what callers do to each other.

A daemon with default settings and one engine thread beside a bare `grpc.aio` server with one
interceptor that answers the same calls with the same messages: the same client asks both in
alternating rounds. Ratios are medians over the rounds, a percentile is over all that was timed.
A step is let go of when EngineService.WatchEngines says that its place is free.
"""

import asyncio
import base64
import itertools
import os
import random
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message

from benchmarks._children import OWN_CONNECTION
from benchmarks._shared import (
    ENGINE,
    Arguments,
    Child,
    Target,
    median,
    memory_mb,
    parse_arguments,
    process_cpu_s,
    report,
    spread,
)
from benchmarks._workloads import workload
from edge_agent.client import AsyncClient
from edge_agent.config import Config
from edge_agent.core import HaltScope, RunState, Usage
from edge_agent.events import RunFinished, Snapshot, StateChanged, StepFinished, TextDelta
from edge_agent.v1 import engine_service_pb2 as engine_pb
from edge_agent.v1 import run_service_pb2 as run_pb
from edge_agent.v1 import system_service_pb2 as system_pb
from tests.support.daemon import BASE_CONFIG

GOAL = "Write a long story about a robot that works in a warehouse."
CLIENT = "benchmark"
METADATA = (("edge-agent-client", CLIENT),)
SLOTS = 4
CLIENTS = 64
RUNS = 64
SILENT = 100
KEY_CALL = "GetRun"
LONG_TOKENS = 1000
_WORDS = ("river", "gate", "lamp", "stone", "field", "cloud", "wheel", "bridge", "paper", "glass")
_TIMEOUT_S = 60.0
_CHUNK = 100


@dataclass(frozen=True, slots=True)
class Plan:
    """Seconds for each thing, the least number of rounds, and how a prefill is measured.

    While runs are cancelled, a prompt is the tools of `prefill_workload`, which are cached, and
    then a goal of `prefill_tokens`, which is not. To compare `sizes`, it is two of the largest.
    """

    unary_s: float
    clients_s: float
    creates: int
    halts_s: float
    decode_s: float
    prefill_s: float
    sizes_s: float
    silent_s: float
    min_rounds: int
    prefill_workload: str
    prefill_tokens: int
    sizes: tuple[int, ...]


DEFAULT_SIZE = Config().worker.prefill_batch_tokens
QUICK = Plan(0, 0, 10, 0, 0, 0, 0, 1, 1, "0.3k", DEFAULT_SIZE + 32, (DEFAULT_SIZE,))
FULL = Plan(25, 12, 300, 45, 24, 30, 25, 20, 2, "2.5k", 288, (8, 16, 32, 64, 128, 256))


@dataclass(slots=True)
class Values:
    """What was measured, by key."""

    of: dict[str, list[float]] = field(default_factory=dict)

    def add(self, key: str, *values: float) -> None:
        """One or more measurements."""
        self.of.setdefault(key, []).extend(values)

    def percentile(self, key: str, percent: int) -> float:
        """The smallest value that so many percent do not exceed."""
        ordered = sorted(self.of[key])
        return ordered[-(-len(ordered) * percent // 100) - 1]


def rounds(min_rounds: int, seconds: float) -> Iterator[int]:
    """Numbers of rounds, at least so many and until the time is over."""
    until_s = time.monotonic() + seconds
    for number in itertools.count():
        if number >= min_rounds and time.monotonic() >= until_s:
            return
        yield number


def since_ms(began_s: float) -> float:
    return (time.monotonic() - began_s) * 1000


# --- unary calls ---


@dataclass(frozen=True, slots=True)
class Call:
    """A unary call with its request."""

    service: str
    name: str
    request: Message
    response: type[Message]

    @property
    def full_name(self) -> str:
        """As gRPC has it, without the slash before it."""
        return f"edge_agent.v1.{self.service}/{self.name}"

    def on(self, channel: Any) -> Callable[[], Any]:
        """The call over a channel, sync or aio."""
        ask = channel.unary_unary(
            f"/{self.full_name}",
            request_serializer=type(self.request).SerializeToString,
            response_deserializer=self.response.FromString,
        )
        return lambda: ask(self.request, metadata=METADATA, timeout=_TIMEOUT_S)


def calls_about(run_id: str) -> list[Call]:
    return [
        Call("RunService", "GetRun", run_pb.GetRunRequest(run_id=run_id), run_pb.GetRunResponse),
        Call(
            "RunService", "ListRuns", run_pb.ListRunsRequest(page_size=1), run_pb.ListRunsResponse
        ),
        Call(
            "EngineService",
            "GetEngine",
            engine_pb.GetEngineRequest(name=ENGINE),
            engine_pb.GetEngineResponse,
        ),
        Call(
            "SystemService", "GetStatus", system_pb.GetStatusRequest(), system_pb.GetStatusResponse
        ),
    ]


@dataclass(frozen=True, slots=True)
class Server:
    """The daemon or the echo."""

    address: str
    pid: int

    def channel(self) -> Any:
        """For blocking calls, whose client costs least."""
        return grpc.insecure_channel(f"unix:{self.address}", OWN_CONNECTION)


def measure_unary(
    values: Values, plan: Plan, calls: Sequence[Call], ours: Server, echo: Server
) -> None:
    """Median latency and server CPU time of each call, ours against the echo's."""
    with ours.channel() as our_channel, echo.channel() as echo_channel:
        for number in rounds(plan.min_rounds, plan.unary_s):
            for call in calls:
                sides = [(ours, call.on(our_channel)), (echo, call.on(echo_channel))]
                if number % 2:
                    sides.reverse()
                timed = {server: _time_calls(ask, server.pid) for server, ask in sides}
                (our_us, our_cpu_us), (echo_us, echo_cpu_us) = timed[ours], timed[echo]
                values.add(f"{call.name}_p50_us", our_us)
                values.add(f"{call.name}_echo_p50_us", echo_us)
                values.add(f"{call.name}_p50_ratio", our_us / echo_us)
                values.add(f"{call.name}_cpu_ratio", our_cpu_us / echo_cpu_us)


def _time_calls(ask: Callable[[], Any], pid: int) -> tuple[float, float]:
    """Median latency and mean CPU time of the server, in microseconds."""
    ask()
    took_s = []
    cpu_s = process_cpu_s(pid)
    for _ in range(_CHUNK):
        began_s = time.monotonic()
        ask()
        took_s.append(time.monotonic() - began_s)
    return median(took_s) * 1e6, (process_cpu_s(pid) - cpu_s) / _CHUNK * 1e6


async def measure_clients(values: Values, plan: Plan, call: Call, ours: Server) -> None:
    """The 99th percentile of many clients that ask all the time, in fair shares of one's median."""
    channels = [
        grpc.aio.insecure_channel(f"unix:{ours.address}", options=OWN_CONNECTION)
        for _ in range(CLIENTS)
    ]
    asks = [call.on(channel) for channel in channels]
    await asyncio.gather(*(ask() for ask in asks))
    for _ in rounds(plan.min_rounds, plan.clients_s):
        one_ms = await _ask_often(asks[0], _CHUNK)
        many_ms = [
            ms for took in await asyncio.gather(*(_ask_often(a, 20) for a in asks)) for ms in took
        ]
        p99_ms = sorted(many_ms)[len(many_ms) * 99 // 100]
        values.add("clients64_p99_ms", p99_ms)
        values.add("clients1_p50_ms", median(one_ms))
        values.add("clients64_p99_ratio", p99_ms / (CLIENTS * median(one_ms)))
    await asyncio.gather(*(channel.close() for channel in channels))


async def _ask_often(ask: Callable[[], Awaitable[object]], times: int) -> list[float]:
    took_ms = []
    for _ in range(times):
        began_s = time.monotonic()
        await ask()
        took_ms.append(since_ms(began_s))
    return took_ms


# --- runs ---


class Places:
    """How many steps hold a place in the engine, as WatchEngines tells it."""

    def __init__(self, channel: Any) -> None:
        self._call = channel.unary_stream(
            "/edge_agent.v1.EngineService/WatchEngines",
            request_serializer=engine_pb.WatchEnginesRequest.SerializeToString,
            response_deserializer=engine_pb.WatchEnginesResponse.FromString,
        )(engine_pb.WatchEnginesRequest(), metadata=METADATA)
        self._told = asyncio.Condition()
        self.taken = 0

    async def follow(self) -> None:
        """Until cancelled."""
        async for response in self._call:
            if response.engine.name == ENGINE:
                async with self._told:
                    self.taken = response.engine.worker.active_steps
                    self._told.notify_all()

    async def until(self, taken: int) -> None:
        """Return once so many places are taken."""
        async with asyncio.timeout(_TIMEOUT_S), self._told:
            await self._told.wait_for(lambda: self.taken == taken)


@dataclass(slots=True)
class Bench:
    """A daemon with its engine loaded, and clients of it."""

    client: AsyncClient
    admin: AsyncClient
    places: Places
    values: Values
    plan: Plan

    def story(self, tokens: int = LONG_TOKENS) -> Any:
        """The events of a new run that writes so many tokens, from a warm prefix."""
        return self.client.execute(
            GOAL, engine=ENGINE, max_output_tokens=tokens, temperature=0.0, max_steps=1
        )

    def _prompt(self) -> Any:
        """The events of a new run with a goal that is not cached."""
        goal = _fresh_prompt(self.plan.prefill_tokens)
        _, tools = workload(self.plan.prefill_workload)
        return self.client.execute(goal, tools, engine=ENGINE, max_output_tokens=1, max_steps=1)

    async def create(self) -> str:
        """A run like `story` that goes on without us; returns its id."""
        run = await self.client.create(
            GOAL, engine=ENGINE, max_output_tokens=LONG_TOKENS, temperature=0.0, max_steps=1
        )
        return run.id

    async def cancel_all(self, run_ids: Iterable[str]) -> None:
        """End these runs and wait for their places."""
        for run_id in run_ids:
            await self.client.cancel(run_id)
        await self.places.until(0)

    # --- cancelling ---

    async def measure_cancel_decode(self) -> None:
        """From CancelRun, or the end of the stream, while text is being written."""
        for beside in (0, SLOTS - 1):
            others = [await self.create() for _ in range(beside)]
            await self.places.until(beside)
            for number in rounds(max(2, self.plan.min_rounds), self.plan.decode_s / 2):
                await self._cancel_decoding(beside, by_call=number % 2 == 0)
                if self.places.taken < beside:  # one has come to its end
                    others += [await self.create() for _ in range(beside - self.places.taken)]
                    await self.places.until(beside)
            await self.cancel_all(others)

    async def _cancel_decoding(self, beside: int, *, by_call: bool) -> None:
        async with aclosing(self.story()) as events:
            seen = 0
            async for event in events:
                seen += isinstance(event.body, TextDelta)
                if seen == 3:
                    break
            await asyncio.sleep(random.uniform(0, 0.1))  # noqa: S311 - at any time of a step
            if self.places.taken != beside + 1:
                return
            took_ms = await self._timed_cancel(events, event.run_id, beside, by_call=by_call)
        self.values.add("cancel_decode_ms", took_ms)
        self.values.add(f"cancel_decode_ms_beside_{beside}", took_ms)

    async def _timed_cancel(
        self, events: Any, run_id: str, places_left: int, *, by_call: bool
    ) -> float:
        began_s = time.monotonic()
        if by_call:
            await self.client.cancel(run_id)
        else:
            await events.aclose()
        await self.places.until(places_left)
        return since_ms(began_s)

    async def measure_cancel_prefill(self) -> None:
        """While a goal that is not cached is being read; beside it, what a batch takes."""
        async for _event in self._prompt():
            pass  # the tools are cached now
        ms_per_token = await self._whole_prefill()
        for number in rounds(self.plan.min_rounds, self.plan.prefill_s):
            if number % 5 == 4:
                ms_per_token = await self._whole_prefill()
            await self._cancel_prefill(ms_per_token, by_call=number % 2 == 0)

    async def _whole_prefill(self) -> float:
        """Milliseconds per token of a whole prefill."""
        used = Usage()
        async for event in self._prompt():
            if isinstance(event.body, StepFinished):
                used = event.body.usage
        assert used.ttft_ms is not None, "the model wrote nothing"
        ms_per_token = used.ttft_ms / (used.prompt_tokens - used.cached_tokens)
        self.values.add("prefill_ms_per_token", ms_per_token)
        self.values.add("prefill_batch_ms", ms_per_token * DEFAULT_SIZE)
        return ms_per_token

    async def _cancel_prefill(self, ms_per_token: float, *, by_call: bool) -> None:
        whole_s = self.plan.prefill_tokens * ms_per_token / 1000
        async with aclosing(self._prompt()) as events:
            async for event in events:
                if isinstance(event.body, StateChanged) and event.body.state is RunState.RUNNING:
                    break
            await asyncio.sleep(random.uniform(0.3, 0.7) * whole_s)  # noqa: S311
            if self.places.taken == 1:
                took_ms = await self._timed_cancel(events, event.run_id, 0, by_call=by_call)
                self.values.add("cancel_prefill_ms", took_ms)

    # --- many runs ---

    async def measure_create(self) -> None:
        """CreateRun while every place of the engine is taken."""
        busy = [await self.create() for _ in range(2 * SLOTS)]
        await self.places.until(SLOTS)
        made = []
        for _ in range(self.plan.creates):
            began_s = time.monotonic()
            made.append(await self.create())
            self.values.add("create_run_ms", since_ms(began_s))
            if len(made) == RUNS:
                while made:
                    await self.client.cancel(made.pop())
        assert self.places.taken == SLOTS, "the engine was not busy all the time"
        await self.cancel_all([*made, *reversed(busy)])

    async def measure_halt(self) -> None:
        """Halt with scope ALL: until the answer, and until every run's last event."""
        for _ in rounds(self.plan.min_rounds, self.plan.halts_s):
            run_ids = [await self.create() for _ in range(RUNS)]
            seen = asyncio.Barrier(RUNS + 1)
            watching = [asyncio.create_task(self._end_of(run_id, seen)) for run_id in run_ids]
            await seen.wait()
            await self.places.until(SLOTS)
            await asyncio.sleep(random.uniform(0.05, 0.15))  # noqa: S311 - at any time of a step
            began_s = time.monotonic()
            outcome = await self.client.halt(HaltScope.ALL, reason="benchmark")
            self.values.add("halt_ms", since_ms(began_s))
            ended_s = await asyncio.gather(*watching)
            self.values.add("halt_last_end_ms", (max(ended_s) - began_s) * 1000)
            assert outcome.runs_stopped == RUNS
            assert outcome.recorded
            await self.admin.clear_halt(outcome.halt.id)
            await self.places.until(0)
            self.values.add("halt_to_idle_ms", since_ms(began_s))

    async def _end_of(self, run_id: str, seen: asyncio.Barrier) -> float:
        async for event in self.client.watch(run_id):
            if isinstance(event.body, Snapshot):
                await seen.wait()
            elif isinstance(event.body, RunFinished):
                return time.monotonic()
        raise AssertionError("a stream ended before its run")


def _fresh_prompt(tokens: int) -> str:
    """Roughly so many tokens, which no cache knows."""
    words = random.choices(_WORDS, k=tokens - 40)  # noqa: S311
    return f"{random.random()} " + " ".join(words)  # noqa: S311


@asynccontextmanager
async def bench_of(hello: dict[str, Any], values: Values, plan: Plan) -> Any:
    """Clients of a daemon whose engine is loaded and has the story's prompt in each slot."""
    channel = grpc.aio.insecure_channel(f"unix:{hello['api']}")
    async with (
        channel,
        AsyncClient(hello["api"], name=CLIENT) as client,
        AsyncClient(hello["admin"], name=CLIENT) as admin,
    ):
        await admin.load(ENGINE)
        bench = Bench(client, admin, Places(channel), values, plan)
        following = asyncio.create_task(bench.places.follow())
        warm = [await bench.create() for _ in range(SLOTS)]
        await bench.places.until(SLOTS)
        await asyncio.sleep(1)
        await bench.cancel_all(warm)
        try:
            yield bench
        finally:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following


# --- prefill batches ---


def measure_sizes(values: Values, plan: Plan, arguments: Arguments) -> None:
    """What a prefill costs, and its cancel takes, by size of its batches; the backend alone."""
    options = {**arguments.load_options(), "slots": 1, "context_tokens": 1024}
    with ExitStack() as stack:
        children = {
            size: stack.enter_context(
                Child(
                    "prefill",
                    directory=str(arguments.engine_directory),
                    options={**options, "prefill_batch_tokens": size},
                )
            )
            for size in plan.sizes
        }
        tokens = 2 * max(plan.sizes)
        for _ in rounds(plan.min_rounds, plan.sizes_s):
            for size, child in children.items():
                whole_ms = child.ask(tokens=tokens)["ms"]
                values.add(f"prefill_ms_per_token_at_{size}", whole_ms / tokens)
                after_s = random.uniform(0.1, 0.4) * whole_ms / 1000  # noqa: S311
                stopped = child.ask(tokens=tokens, cancel_after_s=after_s)
                if stopped["cancelled"]:
                    values.add(f"prefill_cancel_ms_at_{size}", stopped["ms"])


# --- clients that read nothing ---


async def measure_silent(values: Values, plan: Plan, arguments: Arguments) -> None:
    """How a fresh daemon grows with clients that watch runs and read nothing from their sockets."""
    with Child("daemon", store=str(arguments.store), config=BASE_CONFIG) as daemon:
        async with bench_of(daemon.hello, values, plan) as bench:
            run_ids = [await bench.create() for _ in range(SLOTS)]
            await bench.places.until(SLOTS)
            before_mb = memory_mb(daemon.hello["pid"])
            watched = [run_ids[number % SLOTS] for number in range(SILENT)]
            with Child("silent", socket=daemon.hello["api"], run_ids=watched) as silent:
                os.kill(silent.pid, signal.SIGSTOP)
                grown_mb = 0.0
                for _ in rounds(1, plan.silent_s):
                    await asyncio.sleep(0.2)
                    grown_mb = max(grown_mb, memory_mb(daemon.hello["pid"]) - before_mb)
                os.kill(silent.pid, signal.SIGCONT)
                assert silent.ask()["watching"] or bench.places.taken < SLOTS
            values.add("slow_reader_rss_mb", grown_mb)
            await bench.cancel_all(run_ids)


# --- all of it ---


async def measure(values: Values, plan: Plan, arguments: Arguments) -> None:
    """Start every side, measure one thing after the other."""
    with ExitStack() as stack:
        daemon = stack.enter_context(
            Child("daemon", store=str(arguments.store), config=BASE_CONFIG)
        )
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="ea-"))
        ours = Server(daemon.hello["api"], daemon.hello["pid"])
        async with bench_of(daemon.hello, values, plan) as bench:
            run = await bench.client.run("Say hello.", engine=ENGINE, max_output_tokens=40)
            calls = calls_about(run.id)
            with ours.channel() as channel:
                answers = {
                    call.full_name: base64.b64encode(
                        call.on(channel)().SerializeToString()
                    ).decode()
                    for call in calls
                }
            path = f"{directory}/echo.sock"
            echo = stack.enter_context(Child("echo", socket=path, answers=answers))
            measure_unary(values, plan, calls, ours, Server(path, echo.pid))
            await measure_clients(values, plan, calls[0], ours)
            await bench.measure_create()
            await bench.measure_cancel_decode()
            await bench.measure_cancel_prefill()
            await bench.measure_halt()
    measure_sizes(values, plan, arguments)
    await measure_silent(values, plan, arguments)


def targets(prefill_batch_ms: float) -> tuple[Target, ...]:
    return (
        Target("unary_p50_ratio", 1.5, True, f"{KEY_CALL}, ours against a bare gRPC server"),
        Target("cancel_decode_ms_p95", 50, True, "cancel while decoding, until let go"),
        Target("cancel_prefill_ms_p95", 1.2 * prefill_batch_ms, True, "the same in a prefill"),
        Target("halt_ms_p99", 100, True, f"Halt of {RUNS} runs, until its answer"),
        Target("clients64_p99_ratio", 2, True, "p99 of 64 clients over 64 times the p50 of one"),
        Target("create_run_ms_p99", 20, True, "CreateRun while the engine is busy"),
        Target("slow_reader_rss_mb", 50, True, f"growth by {SILENT} clients that read nothing"),
    )


PERCENTILES = {
    "cancel_decode_ms": 95,
    "cancel_prefill_ms": 95,
    "halt_ms": 99,
    "halt_last_end_ms": 99,
    "create_run_ms": 99,
}


def main() -> None:
    arguments = parse_arguments(__doc__)
    values = Values()
    asyncio.run(measure(values, QUICK if arguments.quick else FULL, arguments))
    figures = {key: median(each) for key, each in values.of.items()}
    figures["unary_p50_ratio"] = figures[f"{KEY_CALL}_p50_ratio"]
    values.of["unary_p50_ratio"] = values.of[f"{KEY_CALL}_p50_ratio"]
    for key, percent in PERCENTILES.items():
        figures[f"{key}_p{percent}"] = values.percentile(key, percent)
        figures[f"{key}_n"] = float(len(values.of[key]))
        values.of[f"{key}_p{percent}"] = values.of[key]
    aims = targets(figures["prefill_batch_ms"])
    keys = [target.key for target in aims]
    report(
        "rpc",
        aims,
        {key: figures[key] for key in keys},
        more={key: value for key, value in sorted(figures.items()) if key not in keys},
        spreads={key: spread(each) for key, each in values.of.items()},
    )


if __name__ == "__main__":
    main()
