"""NVML through the real pynvml, which loads a stand-in for the driver's library."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import msgspec
import pytest

from edge_agent.telemetry.nvml import LIBRARY_MISSING, Gpu, NvmlSnapshot
from edge_agent.telemetry.reading import Reading, ReadingStatus
from edge_agent.telemetry.snapshot import ThrottleReason
from tests.support.fake_nvml import library
from tests.support.fake_nvml.library import DISCRETE, GB10, ORIN, THOR, FakeNvml

READER = """
import os, sys
import msgspec
from edge_agent.telemetry.nvml import Nvml
nvml = Nvml()
for line in sys.stdin:
    if line == "fork\\n":
        if os.fork():
            os.wait()
            continue
    sys.stdout.buffer.write(msgspec.json.encode(nvml.read()) + b"\\n")
    sys.stdout.flush()
    if line == "fork\\n":
        os._exit(0)
"""
METRICS = {
    "utilisation": "utilisation_percent",
    "temperature_c": "temperature_milli_c",
    "power_mw": "power_mw",
    "clock_mhz": "clock_hz",
    "capability": "compute_capability",
    "memory_total": "memory_total_bytes",
    "memory_used": "memory_used_bytes",
    "event_reasons": "throttling",
    "name": "name",
}


class Reader:
    """A process that keeps one `Nvml` and reads when told to."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", READER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": ":".join(sys.path), **environ},
        )

    def read(self, how: str = "read") -> NvmlSnapshot:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{how}\n".encode())
        self._process.stdin.flush()
        return msgspec.json.decode(self._process.stdout.readline(), type=NvmlSnapshot)

    def gpu(self) -> Gpu:
        """The only GPU there is."""
        (found,) = self.read().gpus.value or ()
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=10)


@pytest.fixture
def nvml(fake_nvml_library: Path, tmp_path: Path) -> FakeNvml:
    return FakeNvml(tmp_path, fake_nvml_library)


@pytest.fixture
def reader(nvml: FakeNvml) -> Iterator[Reader]:
    with Reader(nvml.environ) as reader:
        yield reader


def known(reading: Reading[object]) -> object:
    """The value of a reading that went well."""
    assert reading.status is ReadingStatus.OK, reading
    return reading.value


def test_a_discrete_card_tells_everything(nvml: FakeNvml, reader: Reader):
    nvml.set(DISCRETE)
    snapshot = reader.read()
    assert known(snapshot.driver_version) == "580.95.05"
    assert known(snapshot.cuda_version) == (13, 0)
    (gpu,) = snapshot.gpus.value or ()
    assert known(gpu.name) == "NVIDIA GeForce RTX 4090"
    assert known(gpu.integrated) is False
    assert known(gpu.compute_capability) == (8, 9)
    assert known(gpu.memory_total_bytes) == 24_564 << 20
    assert known(gpu.memory_used_bytes) == 512 << 20
    assert known(gpu.utilisation_percent) == 0  # idle, which is not unknown
    assert known(gpu.temperature_milli_c) == 44_000
    assert known(gpu.power_mw) == 31_200
    assert known(gpu.clock_hz) == 2_520_000_000
    assert known(gpu.throttling) == ()  # idle: at a low clock, and by nothing held there


@pytest.mark.parametrize("state", [ORIN, THOR, GB10], ids=["orin", "thor", "gb10"])
def test_a_gpu_without_memory_of_its_own_is_integrated(
    nvml: FakeNvml, reader: Reader, state: Mapping[str, object]
):
    nvml.set(state)
    gpu = reader.gpu()
    assert known(gpu.integrated) is True
    assert gpu.memory_total_bytes.value is gpu.memory_used_bytes.value is None
    assert gpu.memory_total_bytes.status is ReadingStatus.UNSUPPORTED
    assert gpu.utilisation_percent.value == state.get("0.utilisation")


def test_whether_an_unknown_gpu_without_memory_is_integrated_is_unknown(
    nvml: FakeNvml, reader: Reader
):
    nvml.set(THOR, {"0.name": "NVIDIA Something"})
    assert reader.gpu().integrated.status is ReadingStatus.UNSUPPORTED


@pytest.mark.parametrize("key", METRICS)
def test_not_supported_is_no_value_and_never_0(nvml: FakeNvml, reader: Reader, key: str):
    nvml.set(DISCRETE, {f"0.{key}": None})
    reading = getattr(reader.gpu(), METRICS[key])
    assert (reading.value, reading.status) == (None, ReadingStatus.UNSUPPORTED)
    nvml.set(DISCRETE)  # and is asked again each time
    known(getattr(reader.gpu(), METRICS[key]))


@pytest.mark.parametrize("key", METRICS)
def test_one_metric_that_fails_leaves_the_others(nvml: FakeNvml, reader: Reader, key: str):
    nvml.set(DISCRETE, {f"0.{key}": "!999"})
    gpu = reader.gpu()
    reading = getattr(gpu, METRICS[key])
    assert (reading.value, reading.status) == (None, ReadingStatus.ERROR)
    assert "999" in reading.detail
    failing = {METRICS[key]} | (
        {"memory_total_bytes", "memory_used_bytes"} if "mem" in key else set()
    )
    for other in set(METRICS.values()) - failing:
        known(getattr(gpu, other))


@pytest.mark.parametrize("key", ["utilisation", "event_reasons"])
def test_what_nvgpu_answers_with_zeros_is_not_believed(nvml: FakeNvml, reader: Reader, key: str):
    nvml.set(ORIN, {f"0.{key}": 0})
    reading = getattr(reader.gpu(), METRICS[key])
    assert (reading.value, reading.status) == (None, ReadingStatus.UNSUPPORTED)


@pytest.mark.parametrize(
    ("mask", "reasons"),
    [
        (0x102, ()),  # clocks that an operator or the display has set
        (0x04, (ThrottleReason.POWER,)),
        (0x08, (ThrottleReason.HARDWARE,)),
        (0x20, (ThrottleReason.THERMAL,)),
        (0x40, (ThrottleReason.THERMAL,)),
        (0x80, (ThrottleReason.POWER,)),
        (0xE5, (ThrottleReason.POWER, ThrottleReason.THERMAL)),
    ],
)
def test_what_slows_a_gpu_down_is_told_from_what_does_not(
    nvml: FakeNvml, reader: Reader, mask: int, reasons: tuple[ThrottleReason, ...]
):
    nvml.set(DISCRETE, {"0.event_reasons": mask})
    assert known(reader.gpu().throttling) == reasons


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("utilisation", 101),
        ("utilisation", 4_294_967_295),
        ("memory_used", 1 << 60),
        ("memory_total", 0),
        ("name", "\udcff\udcfe"),
        ("name", ""),
    ],
)
def test_nonsense_is_an_error(nvml: FakeNvml, reader: Reader, key: str, value: object):
    nvml.set(DISCRETE, {f"0.{key}": value})
    reading = getattr(reader.gpu(), METRICS[key])
    assert (reading.value, reading.status) == (None, ReadingStatus.ERROR)


def test_memory_may_be_full(nvml: FakeNvml, reader: Reader):
    nvml.set(DISCRETE, {"0.memory_used": DISCRETE["0.memory_total"]})
    assert known(reader.gpu().memory_used_bytes) == DISCRETE["0.memory_total"]


def test_a_nonsense_count_or_version_is_an_error(nvml: FakeNvml, reader: Reader):
    nvml.set(DISCRETE, count=65, cuda=0)
    snapshot = reader.read()
    assert snapshot.gpus.status is snapshot.cuda_version.status is ReadingStatus.ERROR


def test_no_gpu_is_known_to_be_none(nvml: FakeNvml, reader: Reader):
    nvml.set(DISCRETE, count=0)
    assert known(reader.read().gpus) == ()


def test_several_gpus_are_kept_apart(nvml: FakeNvml, reader: Reader):
    nvml.set(DISCRETE, {"count": 2, "1.name": "second", "1.utilisation": 90})
    first, second = reader.read().gpus.value or ()
    assert (first.index, first.utilisation_percent.value) == (0, 0)
    assert (second.index, second.name.value, second.utilisation_percent.value) == (1, "second", 90)
    assert second.memory_total_bytes.status is ReadingStatus.UNSUPPORTED


def test_a_gpu_that_can_not_be_opened_leaves_the_others(nvml: FakeNvml, reader: Reader):
    nvml.set(DISCRETE, {"count": 2, "0.handle": "!4", "1.name": "second"})
    first, second = reader.read().gpus.value or ()
    for name in METRICS.values():
        reading = getattr(first, name)
        assert (reading.value, reading.source) == (None, "nvmlDeviceGetHandleByIndex")
    assert first.integrated.status is ReadingStatus.ERROR
    assert known(second.name) == "second"


def test_a_value_changes_while_the_process_runs(nvml: FakeNvml, reader: Reader):
    for percent in (37, 91, 0):
        nvml.set(THOR, {"0.utilisation": percent})
        assert known(reader.gpu().utilisation_percent) == percent


def test_a_lost_gpu_is_an_error_and_comes_back(nvml: FakeNvml, reader: Reader):
    nvml.set(DISCRETE)
    known(reader.gpu().name)
    nvml.set(DISCRETE, fail="!15")
    snapshot = reader.read()
    assert snapshot.driver_version.status is ReadingStatus.ERROR
    assert snapshot.driver_version.detail == "the GPU is lost"
    assert snapshot.gpus.value is None
    nvml.set(DISCRETE)
    assert known(reader.gpu().name) == DISCRETE["0.name"]


def test_a_gpu_that_is_lost_in_the_middle_of_a_read(nvml: FakeNvml, reader: Reader):
    nvml.set(DISCRETE, {"0.temperature_c": "!15"})
    gpu = reader.gpu()
    assert gpu.temperature_milli_c.detail == "the GPU is lost"
    assert gpu.power_mw.status is gpu.clock_hz.status is ReadingStatus.ERROR
    nvml.set(DISCRETE)
    known(reader.gpu().power_mw)


@pytest.mark.parametrize("error", [1, 9, 15, 16, 18])
def test_what_a_new_initialisation_may_mend_is_followed_by_one(
    nvml: FakeNvml, reader: Reader, error: int
):
    nvml.set(DISCRETE, {"0.clock_mhz": f"!{error}"})
    assert reader.gpu().clock_hz.status is ReadingStatus.ERROR
    nvml.set(DISCRETE)
    known(reader.gpu().clock_hz)


def test_a_driver_that_is_loaded_late_is_found(nvml: FakeNvml, reader: Reader):
    nvml.set(DISCRETE, init="!9")
    snapshot = reader.read()
    for reading in (snapshot.driver_version, snapshot.cuda_version, snapshot.gpus):
        assert (reading.value, reading.status) == (None, ReadingStatus.ERROR)
        assert reading.detail == "the driver is not loaded"
    nvml.set(DISCRETE)
    known(reader.gpu().name)


def test_a_library_that_is_missing_is_unsupported_until_it_is_there(
    fake_nvml_library: Path, tmp_path: Path
):
    (tmp_path / "lib").mkdir()
    nvml = FakeNvml(tmp_path, tmp_path / "lib")
    nvml.set(THOR)
    with Reader(nvml.environ) as reader:
        snapshot = reader.read()
        for reading in (snapshot.driver_version, snapshot.cuda_version, snapshot.gpus):
            assert (reading.value, reading.status) == (None, ReadingStatus.UNSUPPORTED)
            assert reading.detail == LIBRARY_MISSING
        (tmp_path / "lib" / library.SONAME).symlink_to(fake_nvml_library / library.SONAME)
        known(reader.gpu().name)


def test_a_file_that_is_no_library_is_as_good_as_none(tmp_path: Path):
    (tmp_path / library.SONAME).write_bytes(b"\x7fELF and then nonsense")
    with Reader({"LD_LIBRARY_PATH": str(tmp_path)}) as reader:
        assert reader.read().gpus.status is ReadingStatus.UNSUPPORTED


def test_a_driver_without_a_function_does_not_support_it(tmp_path: Path):
    nvml = FakeNvml(tmp_path, library.build(tmp_path / "old", "-DOLD_DRIVER"))
    nvml.set(DISCRETE)
    with Reader(nvml.environ) as reader:
        gpu = reader.gpu()
        assert gpu.compute_capability.status is ReadingStatus.UNSUPPORTED
        known(gpu.name)


def test_a_forked_process_initialises_for_itself(nvml: FakeNvml, reader: Reader):
    nvml.set(THOR)
    known(reader.read().driver_version)
    known(reader.read("fork").driver_version)
    known(reader.read().driver_version)


def test_importing_the_module_loads_no_pynvml():
    program = "import sys, edge_agent.telemetry.nvml; print('pynvml' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"
