"""What every benchmark needs: children, clocks, medians, and the table with its JSON line."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from edge_agent.config import Config
from edge_agent.engines.manifest import MANIFEST_NAME, Manifest, decode_manifest

REPOSITORY = Path(__file__).resolve().parent.parent
ENGINE = "smollm2-135m-instruct"
_CHILDREN = Path(__file__).with_name("_children.py")
_END_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Target:
    """A key of the JSON line, and what it should be."""

    key: str
    limit: float
    at_most: bool
    meaning: str

    def met(self, value: float) -> bool:
        """Whether `value` is within the limit."""
        return value <= self.limit if self.at_most else value >= self.limit


@dataclass(frozen=True, slots=True)
class Arguments:
    """The command line of every benchmark."""

    quick: bool
    store: Path

    @property
    def engine_directory(self) -> Path:
        """Where the engine's files are."""
        return self.store / ENGINE

    def manifest(self) -> Manifest:
        """Of the engine under test; ends the benchmark when it is not installed."""
        path = self.engine_directory / MANIFEST_NAME
        if not path.exists():
            sys.exit(f"no engine in {self.store}; run `make engine` first")
        return decode_manifest(path.read_bytes())

    def load_options(self) -> dict[str, Any]:
        """How a daemon with default settings and one thread loads the engine."""
        return {
            "slots": self.manifest().slots,
            "context_tokens": self.manifest().context_tokens,
            "threads": 1,
            "prefill_batch_tokens": Config().worker.prefill_batch_tokens,
        }


def parse_arguments(description: str | None) -> Arguments:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smoke run: figures mean little")
    parser.add_argument("--store", type=Path, default=REPOSITORY / "build" / "engines")
    parsed = parser.parse_args()
    return Arguments(parsed.quick, parsed.store.resolve())


class Child:
    """A process of `_children.py` that answers one JSON line with another."""

    def __init__(self, role: str, **arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(_CHILDREN), role, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.hello = self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, **request: object) -> Any:
        """Its answer to `request`."""
        self.tell(**request)
        return self._read()

    def tell(self, **request: object) -> None:
        """Send `request`; `answer` waits for what comes of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """The answer to what was told."""
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"child {self._process.args!r} ended: {self._process.wait()}")
        return json.loads(line)


def process_cpu_s(pid: int) -> float:
    """User and system time that a process has used, to the nanosecond."""
    # clock_getcpuclockid(3) makes a clock id of a process id in this way.
    return time.clock_gettime((~pid << 3) | 2)


def memory_mb(pid: int, field: str = "VmRSS") -> float:
    """A field of /proc/PID/status, in units of 1,000,000 bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024 / 1e6
    raise KeyError(field)


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the values do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


def spread(values: Sequence[float]) -> str:
    """The middle half of `values`, for the table."""
    if len(values) < 2:
        return ""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{low:.3g} to {high:.3g}"


def machine() -> str:
    """This machine in one line."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            model = line.partition(":")[2].strip()
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, Linux {platform.release()}, Python {platform.python_version()}"


def report(
    benchmark: str,
    targets: Sequence[Target],
    measured: Mapping[str, float],
    *,
    more: Mapping[str, float],
    spreads: Mapping[str, str],
    engine: str = ENGINE,
) -> None:
    """Print the table, what was missed, and last the JSON line."""
    host = machine()
    print(f"\n{benchmark} on {host}; engine {engine}, 1 thread")
    print(f"{'':26}{'target':>10}{'measured':>11}  {'middle half':18}")
    missed = []
    for target in targets:
        value = measured[target.key]
        sign = "<=" if target.at_most else ">="
        word = "" if target.met(value) else "  MISSED"
        if word:
            missed.append(target.key)
        middle = spreads.get(target.key, "")
        print(
            f"{target.key:26}{sign + f' {target.limit:g}':>10}{value:>11.3f}  {middle:18}"
            f"{target.meaning}{word}"
        )
    for key, value in more.items():
        print(f"{key:26}{'':10}{value:>11.3f}  {spreads.get(key, '')}")
    print(f"missed: {', '.join(missed)}" if missed else "every target met")
    print_line(benchmark, host, {**measured, **more}, engine=engine)


def print_line(
    benchmark: str, host: str, values: Mapping[str, object], *, engine: str = ENGINE
) -> None:
    """The JSON line, which is a benchmark's last."""
    line = {"benchmark": benchmark, "machine": host, "engine": engine, **values}
    print(json.dumps({key: _rounded(value) for key, value in line.items()}))


def _rounded(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value
