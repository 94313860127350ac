"""Telemetry to the wire and back."""

import dataclasses
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration

from edge_agent.api import convert_client, convert_response, convert_telemetry
from edge_agent.core import Run, RunState, RunTelemetry
from edge_agent.errors import InvalidRequest
from edge_agent.telemetry.composition import When, gpu_metrics
from edge_agent.telemetry.nvml import Gpu
from edge_agent.telemetry.reading import Reading, ReadingStatus, ok, unsupported
from edge_agent.telemetry.sampler import Sampler
from edge_agent.telemetry.snapshot import TelemetrySnapshot, ThrottleReason
from edge_agent.v1 import system_service_pb2 as pb
from tests.support import sysroots


def sampled(root: Path, profile: str = "orin_nano") -> TelemetrySnapshot:
    sysroots.PROFILES[profile](root)
    sampler = Sampler(root, clock=lambda: 0.0, unix_clock=lambda: 1.8e9)
    for tick in range(12):
        sampler.sample(tick / 4)
    return sampler.sample(3.0)


def there_and_back(snapshot: TelemetrySnapshot) -> TelemetrySnapshot:
    message = pb.Telemetry.FromString(convert_telemetry.telemetry(snapshot).SerializeToString())
    return convert_telemetry.snapshot(message, snapshot.as_of_s)


@pytest.mark.parametrize("profile", sysroots.PROFILES)
@pytest.mark.parametrize("later_s", [0.0, 0.5, 60.0])
def test_every_machine_comes_back_as_it_went(profile: str, later_s: float, tmp_path: Path):
    snapshot = sampled(tmp_path, profile)
    aged = snapshot.at(snapshot.as_of_s + later_s)
    assert there_and_back(aged) == aged


def test_gpus_and_throttling_come_back_as_they_went(tmp_path: Path):
    nothing: Reading[object] = unsupported("f", "not supported")
    known = {"index": 1, "name": ok("A", "f"), "integrated": ok(False, "f"), "power_mw": ok(0, "f")}
    gpu = Gpu(**(dict.fromkeys(Gpu.__dataclass_fields__, nothing) | known))  # type: ignore[arg-type]
    snapshot = sampled(tmp_path)
    for reasons in ((), (ThrottleReason.POWER, ThrottleReason.THERMAL)):
        throttling = dataclasses.replace(snapshot.throttling, value=reasons)
        with_gpu = dataclasses.replace(
            snapshot, throttling=throttling, gpus=gpu_metrics([gpu], When(0.5, 1.0))
        )
        assert there_and_back(with_gpu) == with_gpu


def test_what_a_newer_daemon_says_is_not_believed_blindly(tmp_path: Path):
    message = convert_telemetry.telemetry(sampled(tmp_path))
    message.memory.free_bytes.origin.status = 17  # type: ignore[assignment]
    message.power_mw.origin.status = 17  # type: ignore[assignment]
    message.power_mw.ClearField("value")
    message.throttling.reasons.append(17)  # type: ignore[arg-type]
    found = convert_telemetry.snapshot(message, 5.0)
    assert (found.memory.free_bytes.status, found.memory.free_bytes.fresh) == (
        ReadingStatus.STALE,
        None,
    )
    assert found.power_mw.status is ReadingStatus.ERROR
    assert found.throttling.value == (ThrottleReason.HARDWARE,)


@pytest.mark.parametrize(
    ("interval", "problem"),
    [
        (Duration(), "0s is not above 0s"),
        (Duration(nanos=99_000_000), "0.099s is below the limit of 0.1s"),
        (Duration(seconds=3600, nanos=1), "3600s is above the limit of 3600s"),
        (Duration(seconds=-1), "-1s is not above 0s"),
    ],
)
def test_an_interval_out_of_bounds_is_refused(interval: Duration, problem: str):
    with pytest.raises(InvalidRequest) as refused:
        convert_telemetry.interval_s(pb.WatchTelemetryRequest(interval=interval))
    (violation,) = refused.value.violations
    assert (violation.field, violation.description) == ("interval", problem)


@pytest.mark.parametrize("seconds", [0.1, 1, 3600])
def test_an_interval_at_its_bounds_is_taken(seconds: float):
    assert convert_telemetry.interval_s(convert_telemetry.watch_request(seconds)) == seconds


def test_no_interval_is_one_second():
    assert convert_telemetry.interval_s(pb.WatchTelemetryRequest()) == 1.0


@pytest.mark.parametrize(
    "telemetry",
    [None, RunTelemetry(), RunTelemetry(0.0, 0, 0), RunTelemetry(15_392.25, 5 << 30, -5_000)],
)
def test_a_runs_telemetry_comes_back_as_it_went(telemetry: RunTelemetry | None):
    run = Run("r", "", "c", "", "e", RunState.SUCCEEDED, 1.0, telemetry=telemetry)
    assert convert_client.run(convert_response.run(run)) == run
