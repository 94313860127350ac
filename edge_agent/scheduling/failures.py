"""What a failed load means: too little memory, memory in too small pieces, or something else. Pure.

Libraries tell it in words only, so their words are looked for: those of the CUDA runtime, of NvMap
on Jetson, of llama.cpp and of the C++ library.
"""

import enum
import re
from collections.abc import Iterable
from typing import Final

from edge_agent.errors import LoadFailed

_SIGKILL: Final = -9
_FRAGMENTED: Final = re.compile(r"NvMapMemAlloc\w*: \d+ error 12|NvMapMemAlloc\w*.* error 12\b")
_MEMORY: Final = re.compile(
    r"out of memory|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|bad_alloc|"
    r"cannot allocate memory|(failed|unable) to allocate|MemoryError|alloc\w* failed",
    re.IGNORECASE,
)


class Failure(enum.Enum):
    """Why a load failed, as far as it matters for what to do next."""

    MEMORY = "memory"
    FRAGMENTED = "fragmented"
    OTHER = "other"


def classify(error: LoadFailed, output: Iterable[str], exit_code: int | None) -> Failure:
    """From the worker's error, its last lines of output, and how its process ended.

    A process that somebody killed while it loaded was killed for memory: nobody else does that.
    """
    said = [error.message, *output]
    if any(_FRAGMENTED.search(line) for line in said):
        return Failure.FRAGMENTED
    if exit_code == _SIGKILL or any(_MEMORY.search(line) for line in said):
        return Failure.MEMORY
    return Failure.OTHER


def out_of_memory(
    engine: str, failure: Failure, needed_bytes: int, available_bytes: int | None, words: str
) -> LoadFailed:
    """The error of an engine that found too little memory, also at its second attempt."""
    available = "an unknown number of" if available_bytes is None else available_bytes
    fragmented = failure is Failure.FRAGMENTED
    problem = "memory is free but in too small pieces" if fragmented else "out of memory"
    return LoadFailed(
        f"engine {engine}: {problem}: {needed_bytes} bytes needed, {available} available, twice: "
        f"{words}",
        reason="FRAGMENTED" if fragmented else "OUT_OF_MEMORY",
        metadata={
            "engine": engine,
            "needed_bytes": needed_bytes,
            "available_bytes": available,
        },
    )
