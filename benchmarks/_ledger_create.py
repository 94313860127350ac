"""How many runs a second a daemon accepts from 32 callers: durable ones, and ones that are not.

Each run is over as soon as it has begun (its time is a millisecond), so that accepting is what is
measured. Both kinds come from the same connection, one after the other.
"""

import asyncio
import time
from typing import Final

import grpc

from benchmarks._shared import Child
from edge_agent.api.convert_client import RunOptions, run_spec
from edge_agent.v1.run_service_pb2 import CreateRunRequest
from edge_agent.v1.run_service_pb2_grpc import RunServiceStub

CALLERS: Final = 32
_CONFIG: Final = (
    "worker: {{threads: 1}}\npreload: [{engine}]\n"
    "runs: {{default_engine: {engine}, max_active: 10000, max_retained: 100}}\n"
    "ledger: {{max_size: 1GiB}}\n"
)
_PAUSE_S: Final = 0.5
"""Between rounds: what has been accepted ends meanwhile."""


def measure_creates(store: str, engine: str, rounds: int, round_s: float) -> list[list[float]]:
    """Runs accepted a second, round by round: durable, and not."""
    with Child("daemon", store=store, config=_CONFIG.format(engine=engine)) as daemon:
        return asyncio.run(_rounds(daemon.hello["api"], rounds, round_s))


async def _rounds(socket: str, rounds: int, round_s: float) -> list[list[float]]:
    durable, ephemeral = list[float](), list[float]()
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        create = RunServiceStub(channel).CreateRun
        for number in range(rounds):
            for is_durable in (True, False) if number % 2 else (False, True):
                options: RunOptions = {"durable": is_durable, "timeout_s": 0.001}
                request = CreateRunRequest(spec=run_spec("Hello?", (), options))
                rate = await _per_s(create, request, round_s)
                (durable if is_durable else ephemeral).append(rate)
                await asyncio.sleep(_PAUSE_S)
    return [durable, ephemeral]


async def _per_s(create: object, request: CreateRunRequest, seconds: float) -> float:
    end_s = time.monotonic() + seconds
    done = 0

    async def caller() -> None:
        nonlocal done
        while time.monotonic() < end_s:
            await create(request)  # type: ignore[operator]  # of a generated stub
            done += 1

    began_s = time.monotonic()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return done / (time.monotonic() - began_s)
