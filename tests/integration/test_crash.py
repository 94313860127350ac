"""Runs whose process is killed for real, at every statement and at any instant: nothing
acknowledged is lost, nothing is marked done that was not, nothing that acts once acts twice."""

import asyncio
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from edge_agent.ledger.ledger import Ledger
from edge_agent.records import Effect
from tests.support.chaos import TIMES
from tests.support.crash_child import BUGS, LEDGER

LIFE_TIMEOUT_S = 60.0
EVERY = 1 if TIMES > 1 else 3
"""`make chaos` dies with every statement of the ledger, `make test` with every third."""
REPOSITORY = Path(__file__).resolve().parents[2]


class Lives:
    """The lives of one daemon on one directory, and what all of them have acknowledged."""

    def __init__(self, directory: Path, runs: int, bug: str = "") -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self._bug = bug
        self._runs = runs
        self.created: dict[str, str] = {}
        self.ended: dict[str, str] = {}
        self.submitted: set[tuple[str, str]] = set()

    def live(self, *, crash_at: int = 0, kill_after_s: float | None = None) -> bool:
        """One life; returns whether it came to its own end."""
        command = [sys.executable, "-m", "tests.support.crash_child"]
        arguments = [str(self.directory), str(self._runs), str(crash_at), self._bug]
        with subprocess.Popen(
            command + arguments, stdout=subprocess.PIPE, cwd=REPOSITORY, text=True
        ) as child:
            assert child.stdout is not None
            said = iter(child.stdout)
            self._note(next(said, ""))  # it has begun
            kill = threading.Timer(kill_after_s or LIFE_TIMEOUT_S, child.kill)
            kill.start()
            try:
                for line in said:
                    self._note(line)
                child.wait(LIFE_TIMEOUT_S)
            finally:
                kill.cancel()
                child.kill()
        assert child.returncode in (0, -signal.SIGKILL)
        return child.returncode == 0

    def _note(self, line: str) -> None:
        match line.split():
            case ["created", request_id, run_id]:
                assert self.created.setdefault(request_id, run_id) == run_id
            case ["ended", run_id, state]:
                assert self.ended.setdefault(run_id, state) == state
            case ["submitted", run_id, call_id]:
                self.submitted.add((run_id, call_id))
            case ["recovered", troubles]:
                assert troubles == "0"

    async def check(self) -> None:
        """What is on disk agrees with what was acknowledged and with what was done."""
        effects = self._effects()
        ledger = Ledger.open(self.directory, LEDGER)
        try:
            assert ledger.degraded == ()
            for run_id in self.created.values():
                stored = await ledger.find(run_id)
                assert stored is not None, f"acknowledged and lost: {run_id}"
                if run_id in self.ended:
                    assert stored.run.state.value == self.ended[run_id]
                _, calls = await ledger.trace(run_id)
                for call in calls:
                    if call.effect is Effect.DONE:
                        assert effects[f"{call.tool} {run_id}"], f"done that was not: {call}"
            for run_id, _call_id in self.submitted:
                assert effects[f"grip {run_id}"]
        finally:
            await ledger.close()
        twice = [done for done, times_ in effects.items() if times_ > 1 and "clock" not in done]
        assert twice == []

    def _effects(self) -> Counter[str]:
        path = self.directory / "effects"
        return Counter(path.read_text().splitlines() if path.exists() else [])


def kill_with_every_statement(directory: Path, every: int, bug: str = "") -> None:
    for statement in range(1, 500, every):
        lives = Lives(directory / str(statement), 1, bug)
        whole = lives.live(crash_at=statement)
        asyncio.run(lives.check())
        assert lives.live()
        asyncio.run(lives.check())
        assert len(lives.ended) == 1
        if whole:
            return
    raise AssertionError("the workload has no end")


def test_killed_with_every_statement_nothing_is_lost_or_done_twice(tmp_path: Path) -> None:
    kill_with_every_statement(tmp_path, EVERY)


def test_killed_with_every_statement_of_a_recovery_nothing_is_done_twice(tmp_path: Path) -> None:
    """A second daemon dies of taking over what the first one was doing."""
    died_acting = next(
        directory
        for statement in range(1, 500)
        if (directory := killed_at(tmp_path / f"first-{statement}", statement)) is not None
    )
    for statement in range(1, 13):
        directory = tmp_path / f"second-{statement}"
        shutil.copytree(died_acting, directory)
        lives = Lives(directory, 1)
        lives.live(crash_at=statement)
        assert lives.live()
        asyncio.run(lives.check())


def killed_at(directory: Path, statement: int) -> Path | None:
    """What is left of a life that this statement ended, if it had done something by then."""
    Lives(directory, 1).live(crash_at=statement)
    return directory if (directory / "effects").stat().st_size else None


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(tmp_path: Path, bug: str) -> None:
    with pytest.raises(AssertionError):
        kill_with_every_statement(tmp_path, 1, bug)


def test_killed_at_any_instant_nothing_is_lost_or_done_twice(tmp_path: Path) -> None:
    chance = random.Random(20261125)  # noqa: S311 - it is to be the same each time
    for number in range(4 * TIMES):
        lives = Lives(tmp_path / str(number), 20)
        while not lives.live(kill_after_s=chance.uniform(0.0, 0.25)):
            asyncio.run(lives.check())
        asyncio.run(lives.check())
        assert len(lives.created) == len(lives.ended) == 20
