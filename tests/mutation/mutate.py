"""Mutation testing of the pure modules that decide: small bugs are put in, the tests must notice.

    python tests/mutation/mutate.py [--limit-s 3600] [--jobs 1] [module ...]

Each mutant is one changed operator, constant, condition or returned value. It lives in memory only:
a forked child imports the module from the changed source and runs that module's tests until one
fails. Names each mutant that survives, that ran out of time (noticed: it took many times what the
tests take) or whose process died (not noticed: no test has said so).

`equivalent.txt` lists what nothing can notice, one a line, as it is named here:
`module.function: before -> after  # why`. Exits with 1 when a mutant survives that is not listed,
when a process died, or when a mutant is listed that does not survive.

Coverage says that a line ran, this says that somebody looked at what it did.
"""

import argparse
import contextlib
import dataclasses
import importlib.abc
import importlib.util
import io
import math
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.mutation.mutants import Mutant, mutants

ROOT = Path(__file__).parents[2]
OF_RUNS = (
    "holds",
    "history",
    "limits",
    "recovery",
    "turns",
    "verification",
)
"""Those of `edge_agent.runs`; all others are of `edge_agent.scheduling`."""
TESTS = ROOT / "tests" / "unit"
EQUIVALENT = Path(__file__).with_name("equivalent.txt")
EXPLAIN = "test_scheduler_explain.py"
WHOLE = (
    "scheduling/test_preemption.py",
    "scheduling/test_worst_cases.py",
    "scheduling/test_planner_model.py::TestPlanner",
)
MODULES = {
    "holds": ("test_holds.py",),
    "history": ("test_run_history.py",),
    "limits": ("test_run_limits.py",),
    "recovery": ("test_run_recovery.py",),
    "turns": ("test_turns.py",),
    "verification": ("test_verification.py",),
    "queue": ("scheduling/test_queue.py",),
    "budget": ("scheduling/test_budget.py",),
    "pressure": ("scheduling/test_pressure.py",),
    "pace": ("scheduling/test_pace.py",),
    "refusals": ("scheduling/test_refusals.py",),
    "footprint": ("test_footprint.py",),
    "failures": ("test_load_failures.py",),
    "backoff": ("test_load_failures.py",),
    "reserve": ("scheduling/test_reserve.py",),
    "quarantine": ("test_quarantine.py",),
    "explain": (EXPLAIN,),
    "residents": ("scheduling/test_residents.py", EXPLAIN, *WHOLE),
    "eviction": ("scheduling/test_eviction.py",),
    "state": ("scheduling/test_state.py",),
    "making_room": ("scheduling/test_making_room.py",),
    "planner": (
        "scheduling/test_planner.py",
        "scheduling/test_preemption.py",
        "scheduling/test_power_mode.py",
    ),
}
_OPTIONS = ("-x", "-q", "--tb=no", "--timeout=0", "-p", "no:cacheprovider", "-p", "no:xdist")
_QUIET = ("-W", "ignore::pytest.PytestWarning")
"""What the parent has imported already can't be rewritten, and need not be."""
_LIMIT_TIMES, _LIMIT_MORE_S = 10.0, 5.0
"""A mutant may take so many times what the tests take without one, and so much more. It is the
processor's time, so a busy machine alone ends nobody."""
_BLOCKED_TIMES = 4
"""So many times that limit by the clock: for a mutant that waits and does not work."""
_MEMORY_BYTES = 4 << 30
_TIMED_OUT = (signal.SIGXCPU, signal.SIGALRM)


class _Planted(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module its changed code."""

    def __init__(self, name: str, code: CodeType) -> None:
        self.name, self.code = name, code

    def find_spec(self, name, path, target=None):  # noqa: ARG002 - the signature is Python's
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def exec_module(self, module):
        exec(self.code, module.__dict__)  # noqa: S102 - that is what is tried here


@dataclass(frozen=True, slots=True)
class _Module:
    """What is tried: the module, its tests, and the processor's seconds that a child may take."""

    name: str
    tests: tuple[str, ...]
    scratch: str
    limit_s: float = math.inf

    def start(self, mutant: Mutant | None) -> int:
        """Run the tests in a child of its own, None: without any change; returns its id."""
        child = os.fork()
        if child == 0:
            code: object = 1
            with contextlib.suppress(BaseException), contextlib.redirect_stdout(io.StringIO()):
                self._limit()
                code = self._run(mutant)
            os._exit(0 if code == 0 else 1)
        return child

    def _limit(self) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
        if self.limit_s < math.inf:
            limit_s = math.ceil(self.limit_s)
            resource.setrlimit(resource.RLIMIT_CPU, (limit_s, resource.RLIM_INFINITY))
            signal.alarm(limit_s * _BLOCKED_TIMES)

    def _run(self, mutant: Mutant | None) -> object:
        if mutant is not None:
            sys.meta_path.insert(0, _Planted(_dotted(self.name), mutant.code))
        random.seed(0)
        hypothesis.settings.register_profile(
            "mutation",
            database=None,
            deadline=None,
            derandomize=True,
            phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),  # some look at the time
        )
        hypothesis.settings.load_profile("mutation")
        scratch = f"--basetemp={self.scratch}/{os.getpid()}"
        paths = [str(TESTS / test) for test in self.tests]
        return pytest.main([*_OPTIONS, *_QUIET, scratch, *paths])


def outcomes(
    module: _Module, tried: Iterable[Mutant], jobs: int, end_s: float
) -> Iterator[tuple[Mutant, str]]:
    """What became of each mutant, as they end; stops early when the time is over."""
    running: dict[int, Mutant] = {}
    left = iter(tried)
    while True:
        while len(running) < jobs and time.monotonic() < end_s and (mutant := next(left, None)):
            running[module.start(mutant)] = mutant
        if not running:
            return
        child, status = os.wait()
        signalled = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        if signalled is not None:
            outcome = "timed out" if signalled in _TIMED_OUT else "crashed"
        else:
            outcome = "killed" if status else "survived"
        yield running.pop(child), outcome


def listed() -> set[str]:
    """The mutants that nothing can notice; each has its reason."""
    names = []
    for line in filter(None, map(str.strip, EQUIVALENT.read_text().splitlines())):
        name, _, why = line.partition("  # ")
        if not why:
            raise SystemExit(f"{EQUIVALENT.name}: no reason: {line}")
        names.append(name)
    return set(names)


def _dotted(module: str) -> str:
    return f"edge_agent.{'runs' if module in OF_RUNS else 'scheduling'}.{module}"


def _tried(module: str) -> list[Mutant]:
    path = ROOT.joinpath(*_dotted(module).split(".")).with_suffix(".py")
    return mutants(path.read_text(), module, str(path))


def nowhere() -> set[str]:
    """What is listed and is no mutant of any module: misspelt, or its line has changed since."""
    return listed() - {mutant.name for module in MODULES for mutant in _tried(module)}


def check(module: _Module, known: set[str], jobs: int, end_s: float) -> bool:
    """Try a module's mutants, say what became of them; whether all is well."""
    tried, began_s = _tried(module.name), time.monotonic()
    counts: Counter[str] = Counter()
    survived = set()
    for mutant, outcome in outcomes(module, tried, jobs, end_s):
        equivalent = outcome == "survived" and mutant.name in known
        counts["equivalent" if equivalent else outcome] += 1
        if outcome == "survived":
            survived.add(mutant.name)
        if outcome != "killed" and not equivalent:
            _say(f"{outcome}: line {mutant.line}: {mutant.name}")
    ended = counts.total() == len(tried)
    stale = sorted(
        name for name in known if name.startswith(f"{module.name}.") and name not in survived
    )
    if ended:
        for name in stale:
            _say(f"listed, but does not survive: {name}")
    words = ", ".join(
        f"{counts[each]} {each}"
        for each in ("killed", "equivalent", "survived", "timed out", "crashed")
    )
    rest = "" if ended else f", {len(tried) - counts.total()} not tried: out of time"
    _say(f"{module.name}: {words}{rest} ({time.monotonic() - began_s:.0f} s)")
    return ended and not (stale or counts["survived"] or counts["crashed"])


def _measured(module: _Module) -> _Module:
    """With a limit by what the tests take without a mutant; they must pass."""
    _, status, used = os.wait4(module.start(None), 0)
    if status:
        raise SystemExit(f"{module.name}: the tests fail without a mutant")
    limit_s = (used.ru_utime + used.ru_stime) * _LIMIT_TIMES + _LIMIT_MORE_S
    return dataclasses.replace(module, limit_s=limit_s)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a program for people


def main() -> int:
    """Try each mutant of the named modules, or of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=list(MODULES))
    parser.add_argument("--limit-s", type=float, default=3600.0, help="stop after so long")
    parser.add_argument("--jobs", type=int, default=1, help="so many mutants at a time")
    arguments = parser.parse_args()
    os.environ["EDGE_AGENT_CHAOS"] = "1"
    known, end_s, well = listed(), time.monotonic() + arguments.limit_s, True
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.modules:
            module = _measured(_Module(name, MODULES[name], scratch))
            well &= check(module, known, arguments.jobs, end_s)
    return 0 if well else 1


if __name__ == "__main__":
    raise SystemExit(main())
