"""The sampler with NVML: the real pynvml on a stand-in for the driver's library."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import msgspec
import pytest

from edge_agent.telemetry.nvml import LIBRARY_MISSING
from edge_agent.telemetry.reading import ReadingStatus
from edge_agent.telemetry.snapshot import Metric, TelemetrySnapshot, ThrottleReason
from tests.support import sysroots
from tests.support.fake_nvml import library
from tests.support.fake_nvml.library import DISCRETE, GB10, ORIN, THOR, FakeNvml

PROGRAM = """
import sys
from pathlib import Path
import msgspec
from edge_agent.telemetry.nvml import Nvml
from edge_agent.telemetry.sampler import Sampler
sampler = Sampler(Path(sys.argv[1]), clock=lambda: 0.0, nvml=Nvml())
for line in sys.stdin:
    sys.stdout.buffer.write(msgspec.json.encode(sampler.sample(float(line))) + b"\\n")
    sys.stdout.flush()
"""


class Sampling:
    """A process with a sampler whose clock is driven from here."""

    def __init__(self, root: Path, nvml: FakeNvml) -> None:
        self.root, self.nvml = root, nvml
        self._now_s = 0.0
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": ":".join(sys.path), **nvml.environ},
        )

    def after(self, seconds: float) -> TelemetrySnapshot:
        """Sample so many seconds later."""
        self._now_s += seconds
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{self._now_s}\n".encode())
        self._process.stdin.flush()
        return msgspec.json.decode(self._process.stdout.readline(), type=TelemetrySnapshot)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=10)


Start = Callable[..., Sampling]


@pytest.fixture
def start(fake_nvml_library: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a sampler on one machine's tree, with a library that tells of a GPU."""
    running: list[Sampling] = []

    def begin(profile: str, state: dict[str, object], libraries: Path | None = None) -> Sampling:
        sysroots.PROFILES[profile](tmp_path / "root")
        nvml = FakeNvml(tmp_path, libraries or fake_nvml_library)
        nvml.set(state)
        running.append(Sampling(tmp_path / "root", nvml))
        first = running[-1].after(0)  # without NVML
        assert first.driver_version.detail == "not read yet"
        return running[-1]

    yield begin
    for each in running:
        each.__exit__()


def known(metric: Metric[object]) -> object:
    """The value of a metric that went well."""
    assert metric.status is ReadingStatus.OK, metric
    return metric.value


def test_on_orin_the_load_is_devfreqs_and_never_nvmls(start: Start):
    sampling = start("orin_nano", {**ORIN, "0.utilisation": 0})
    found = sampling.after(0.25)
    assert (known(found.driver_version), known(found.cuda_version)) == ("540.5.0", "13.2")
    assert known(found.gpu_utilisation_percent) == 34.5
    (sampling.root / "sys/class/devfreq/17000000.gpu").unlink()
    found = sampling.after(5)
    assert found.gpu_utilisation_percent.value is None
    assert found.is_throttled is False  # by its thermal zones


def test_on_thor_the_load_is_nvmls_once_a_second(start: Start):
    sampling = start("thor", THOR)
    found = sampling.after(0.25)
    assert known(found.gpu_utilisation_percent) == 37.0
    assert found.gpu_utilisation_percent.source == "nvmlDeviceGetUtilizationRates"
    assert known(found.gpu_clock_hz) == 1_575_000_000
    sampling.nvml.set(THOR, {"0.utilisation": 91})
    assert known(sampling.after(0.5).gpu_utilisation_percent) == 37.0
    assert known(sampling.after(0.5).gpu_utilisation_percent) == 91.0


def test_on_orin_nvml_is_asked_every_5_seconds(start: Start):
    sampling = start("orin_nano", ORIN)
    sampling.after(0.25)
    sampling.nvml.set(ORIN, {"driver": "540.6.0"})
    assert known(sampling.after(4.75).driver_version) == "540.5.0"
    assert known(sampling.after(0.25).driver_version) == "540.6.0"


def test_on_gb10_temperature_and_the_gpus_power_are_nvmls(start: Start):
    found = start("gb10", GB10).after(0.25)
    assert known(found.gpu_utilisation_percent) == 12.0
    assert [(z.name, known(z.temperature_milli_c)) for z in found.zones] == [("gpu", 51_000)]
    assert [(rail.name, known(rail.power_mw)) for rail in found.rails] == [("gpu", 14_700)]
    assert found.power_mw.status is ReadingStatus.UNSUPPORTED  # not the whole machine's
    assert found.gpus[0].memory_total_bytes.status is ReadingStatus.UNSUPPORTED
    assert found.is_throttled is None


def test_a_card_has_memory_of_its_own_and_says_what_slows_it_down(start: Start):
    sampling = start("discrete", DISCRETE)
    found = sampling.after(0.25)
    (gpu,) = found.gpus
    assert known(gpu.memory_used_bytes) == 512 << 20
    assert known(found.gpu_clock_hz) == 2_520_000_000
    assert known(found.throttling) == ()
    sampling.nvml.set(DISCRETE, {"0.event_reasons": 0x44})
    found = sampling.after(1)
    assert known(found.throttling) == (ThrottleReason.POWER, ThrottleReason.THERMAL)
    sampling.nvml.set(DISCRETE, {"0.event_reasons": None})
    assert sampling.after(1).is_throttled is None


def test_a_source_that_fails_makes_room_for_the_next_one(start: Start):
    sampling = start("discrete", DISCRETE)
    load = "sys/class/devfreq/gpu/device/load"
    sysroots.put(sampling.root, {load: "garbage\n"})
    found = sampling.after(1).gpu_utilisation_percent
    assert (known(found), found.source) == (0.0, "nvmlDeviceGetUtilizationRates")
    sampling.nvml.set(DISCRETE, {"0.utilisation": None})
    failed = sampling.after(5).gpu_utilisation_percent  # an error says more than "not supported"
    assert (failed.status, failed.source) == (ReadingStatus.ERROR, f"/{load}")


def test_a_gpu_that_is_lost_comes_back(start: Start):
    sampling = start("discrete", DISCRETE)
    known(sampling.after(0.25).gpu_utilisation_percent)
    sampling.nvml.set(DISCRETE, {"fail": "!15"})
    lost = sampling.after(1)
    assert lost.gpus == ()
    assert lost.driver_version.detail == "the GPU is lost"
    assert lost.mem_available_bytes
    sampling.nvml.set(DISCRETE)
    assert known(sampling.after(5).gpu_utilisation_percent) == 0.0


def test_a_driver_that_is_not_loaded_yet_is_found_when_it_is(start: Start):
    sampling = start("thor", {**THOR, "init": "!9"})
    found = sampling.after(0.25)
    assert found.driver_version.detail == "the driver is not loaded"
    assert found.gpu_utilisation_percent.value is None
    sampling.nvml.set(THOR)
    assert known(sampling.after(5).gpu_utilisation_percent) == 37.0


def test_a_library_that_is_installed_later_is_found(
    start: Start, fake_nvml_library: Path, tmp_path: Path
):
    (tmp_path / "lib").mkdir()
    sampling = start("thor", THOR, tmp_path / "lib")
    found = sampling.after(0.25)
    assert (found.driver_version.status, found.driver_version.detail) == (
        ReadingStatus.UNSUPPORTED,
        LIBRARY_MISSING,
    )
    (tmp_path / "lib" / library.SONAME).symlink_to(fake_nvml_library / library.SONAME)
    assert known(sampling.after(5).gpu_utilisation_percent) == 37.0
