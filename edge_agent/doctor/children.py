"""Asks questions in child processes, with a deadline: a wedged driver must not hang doctor.

A child that sits in the kernel can't even be killed, so nothing here waits for its end.
"""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import msgspec

from edge_agent.telemetry.nvml import NvmlSnapshot

_PROBE: Final = Path(__file__).with_name("probe.py")
_REAP_S: Final = 1.0
_NVML: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from edge_agent.doctor.children import answer_nvml; answer_nvml()"
)


class NoAnswer(Exception):
    """Why there is none: for a finding."""


def ask_libraries(python: str, names: tuple[str, ...], deadline_s: float) -> dict[str, Any]:
    """Whether a Python can import these modules, and their versions; see `doctor.probe`.

    Raises:
        NoAnswer: that Python can't be run, crashed or took too long.
    """
    return _object(_run([python, "-I", str(_PROBE), "libraries", *names], deadline_s))


def ask_cuda(python: str, deadline_s: float) -> dict[str, Any]:
    """The CUDA devices that a Python with pycuda sees; see `doctor.probe`.

    Raises:
        NoAnswer: as above.
    """
    return _object(_run([python, "-I", str(_PROBE), "cuda"], deadline_s))


def ask_nvml(deadline_s: float) -> NvmlSnapshot:
    """What NVML says, read by a child with the same imports as this process.

    Raises:
        NoAnswer: as above.
    """
    raw = _run([sys.executable, "-I", "-c", _NVML, json.dumps(sys.path)], deadline_s)
    try:
        return msgspec.json.decode(raw, type=NvmlSnapshot)
    except msgspec.DecodeError as error:
        raise NoAnswer(f"answered nonsense: {error}") from error


def answer_nvml() -> None:
    """In the child."""
    from edge_agent.telemetry.nvml import Nvml

    sys.stdout.buffer.write(msgspec.json.encode(Nvml().read()))


def _run(command: list[str], deadline_s: float) -> bytes:
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise NoAnswer(f"{command[0]}: {error.strerror}") from error
    try:
        output, errors = child.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=_REAP_S)
        raise NoAnswer(f"no answer within {deadline_s:g} s") from None
    if child.returncode < 0:
        raise NoAnswer(f"killed by signal {-child.returncode}")
    if child.returncode:
        last = errors.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise NoAnswer(f"exit code {child.returncode}: {''.join(last)}")
    return output


def _object(raw: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(b"".join(raw.splitlines()[-1:]), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise NoAnswer(f"answered nonsense: {error}") from error
