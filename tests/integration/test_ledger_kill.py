"""kill -9 of a process that writes the ledger: what it had acknowledged is there."""

import asyncio
import os
import random
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.core import RunState
from tests.support.chaos import TIMES
from tests.support.ledger import SETTINGS, ended, new, opened, went_on

KILLS = 6 * TIMES
CALLERS = 8
ROOMY = replace(SETTINGS, max_bytes=16 << 30)
"""So that no run has to make room for others."""


async def write_until_killed(directory: Path, life: int) -> None:
    """Runs from eight callers, each told of on stdout once it is acknowledged."""

    async def caller(number: int) -> None:
        for turn in range(1_000_000):
            name = f"run-{life}-{number}-{turn}"
            first = new(name)
            await ledger.commit(first)
            told(name, 0)
            went = went_on(first.run)
            await ledger.commit(went)
            told(name, went.run.sequence)
            last = ended(went.run)
            await ledger.commit(last)
            told(name, last.run.sequence)

    def told(name: str, sequence: int) -> None:
        os.write(1, f"{name} {sequence}\n".encode())

    async with opened(directory, ROOMY) as ledger:
        await asyncio.gather(*(caller(number) for number in range(CALLERS)))


def killed_after(directory: Path, life: int, wait_s: float) -> dict[str, int]:
    """What a process had told of when it was killed, about so long after its first word."""
    command = [sys.executable, __file__, str(directory), str(life)]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ) as process:
        assert process.stdout is not None
        select.select([process.stdout], [], [], 30)
        end_s = time.monotonic() + wait_s
        said = b""
        while (left_s := end_s - time.monotonic()) > 0:
            if select.select([process.stdout], [], [], left_s)[0]:
                said += os.read(process.stdout.fileno(), 1 << 16)
        said += os.read(process.stdout.fileno(), 1 << 16)  # and at once after its next word
        process.send_signal(signal.SIGKILL)
        said += process.stdout.read()
    lines = [line.split() for line in said.decode().splitlines()]
    return {name: int(sequence) for name, sequence in lines}


@pytest.mark.timeout(60 * TIMES)
def test_no_kill_loses_what_was_acknowledged(tmp_path: Path):
    async def check() -> None:
        async with opened(tmp_path, ROOMY) as ledger:
            assert ledger.degraded == ()
            for name, sequence in acked.items():
                stored = await ledger.find(name)
                assert stored is not None, name
                assert stored.run.sequence >= sequence
                assert stored.run.state is RunState.SUCCEEDED or stored.run.sequence < 5
            for stored in await ledger.unfinished():
                assert not stored.run.state.ended

    chance = random.Random(KILLS)  # noqa: S311
    acked: dict[str, int] = {}
    for life in range(KILLS):
        acked |= killed_after(tmp_path, life, chance.uniform(0.0, 0.25))
        asyncio.run(check())
    assert len(acked) > KILLS * CALLERS


if __name__ == "__main__":
    asyncio.run(write_until_killed(Path(sys.argv[1]), int(sys.argv[2])))
