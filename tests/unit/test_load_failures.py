"""What a failed load means, in the words that drivers and libraries use; and when to try again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import LoadFailed
from edge_agent.scheduling.backoff import Backoff
from edge_agent.scheduling.failures import Failure, classify, out_of_memory
from tests.support.chaos import examples

MIB = 1 << 20
ENDED = LoadFailed("the worker of alpha ended while loading")

MEMORY = [
    "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 4294967296",
    "llama_kv_cache_init: failed to allocate buffer for kv cache",
    (
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 4096.00 MiB on device 0: "
        "cudaMalloc failed: out of memory"
    ),
    "CUDA error: out of memory",
    "cudaErrorMemoryAllocation",
    (
        "[TRT] [E] 2: [virtualMemoryBuffer.cpp::resizePhysical::154] Error Code 2: OutOfMemory "
        "(no further information): CUDA_ERROR_OUT_OF_MEMORY"
    ),
    "terminate called after throwing an instance of 'std::bad_alloc'",
    "MemoryError",
    "mmap failed: Cannot allocate memory",
    "unable to allocate backend buffer",
]
FRAGMENTED = [
    "NvMapMemAllocInternalTagged: 1075072515 error 12",
    "NvMapMemHandleAlloc: error 0 NvMapMemAlloc failed, error 12 ",
]
OTHER = [
    "llama_model_load: error loading model: unknown model architecture: 'qwen9'",
    "gguf_init_from_file: invalid magic characters 'ABCD'",
    "error 12: no such tensor",
    "NvMapMemAllocInternalTagged: 1075072515 error 13",
    "the memory is fine",
    "",
]


@pytest.mark.parametrize("line", MEMORY)
def test_too_little_memory_is_known_by_its_words(line: str):
    assert classify(ENDED, ["loading", line, "bye"], 1) is Failure.MEMORY
    assert classify(LoadFailed(line), [], None) is Failure.MEMORY


@pytest.mark.parametrize("line", FRAGMENTED)
def test_memory_in_too_small_pieces_is_known_and_said_first(line: str):
    assert classify(ENDED, [line], 1) is Failure.FRAGMENTED
    assert classify(ENDED, [MEMORY[0], line], -9) is Failure.FRAGMENTED


@pytest.mark.parametrize("line", OTHER)
def test_anything_else_is_no_matter_of_memory(line: str):
    assert classify(ENDED, [line], 1) is Failure.OTHER
    assert classify(ENDED, [line], None) is Failure.OTHER
    assert classify(ENDED, [line], -11) is Failure.OTHER


def test_a_process_that_somebody_killed_died_for_memory():
    assert classify(ENDED, [], -9) is Failure.MEMORY


@pytest.mark.parametrize(
    ("failure", "reason", "words"),
    [
        (Failure.MEMORY, "OUT_OF_MEMORY", "out of memory"),
        (Failure.FRAGMENTED, "FRAGMENTED", "in too small pieces"),
    ],
)
def test_the_error_names_engine_and_numbers(failure: Failure, reason: str, words: str):
    error = out_of_memory("alpha", failure, 700, 300, "the worker ended")
    assert error.reason == reason
    assert words in error.message
    assert "700 bytes needed, 300 available" in error.message
    assert error.metadata == {"engine": "alpha", "needed_bytes": "700", "available_bytes": "300"}


def test_where_nobody_knows_what_is_available_it_says_so():
    error = out_of_memory("alpha", Failure.MEMORY, 700, None, "x")
    assert "an unknown number of available" in error.message


# --- trying again ---

FILES = ("digest", 1)
WRONG = LoadFailed("no model", metadata={"engine": "alpha"})


def refused(backoff: Backoff, now_s: float, files: object = FILES) -> LoadFailed | None:
    error = backoff.refusal(now_s, lambda: files)
    assert error is None or isinstance(error, LoadFailed)
    return error


def failed_times(count: int, error: LoadFailed = WRONG, now_s: float = 0.0) -> Backoff:
    backoff = Backoff()
    for _ in range(count):
        backoff.failed(error, FILES, now_s)
    return backoff


def test_one_failure_may_be_chance():
    assert refused(failed_times(1), 0.0) is None


@pytest.mark.parametrize(("failures", "pause_s"), [(2, 4.0), (3, 8.0), (5, 32.0), (6, 60.0)])
def test_from_the_second_in_a_row_on_the_same_error_comes_at_once_for_a_while(
    failures: int, pause_s: float
):
    backoff = failed_times(failures)
    error = refused(backoff, pause_s - 0.5)
    assert error is not None
    assert (error.reason, error.code) == (WRONG.reason, WRONG.code)
    assert error.message.startswith("no model; failed")
    assert error.metadata == {"engine": "alpha", "failures": str(failures), "pause_s": "0.5"}
    assert refused(backoff, pause_s) is None


@pytest.mark.parametrize("reason", ["OUT_OF_MEMORY", "FRAGMENTED", "LOAD_TIMEOUT"])
def test_what_time_may_mend_says_when_to_try_again(reason: str):
    error = refused(failed_times(2, LoadFailed("no", reason=reason)), 1.0)
    assert error is not None
    assert error.retry_after_s == 3.0


def test_what_time_does_not_mend_does_not():
    error = refused(failed_times(2), 1.0)
    assert error is not None
    assert error.retry_after_s is None


def test_other_files_begin_afresh():
    backoff = failed_times(4)
    assert refused(backoff, 0.0, ("digest", 2)) is None
    backoff.failed(WRONG, ("digest", 2), 0.0)
    assert refused(backoff, 0.0, ("digest", 2)) is None


def test_forgiven_is_forgotten():
    backoff = failed_times(4)
    backoff.forgive()
    assert refused(backoff, 0.0) is None
    backoff.failed(WRONG, FILES, 0.0)
    assert refused(backoff, 0.0) is None


def test_files_are_looked_at_only_when_it_matters():
    def look() -> object:
        raise AssertionError("read for nothing")

    assert failed_times(1).refusal(0.0, look) is None
    assert failed_times(3).refusal(9.0, look) is None


@examples(100)
@given(st.integers(2, 100_000), st.floats(0.0, 100.0))
def test_no_pause_is_longer_than_a_minute(failures: int, later_s: float):
    backoff = failed_times(min(failures, 1200))
    error = refused(backoff, later_s)
    assert (error is not None) == (later_s < min(2.0 ** min(failures, 10), 60.0))
