"""Telemetry on the wire and back, and the request that asks for it.

Owns how metrics look there. Decides nothing about them.
"""

from typing import Final, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from edge_agent.api.spans import filled, seconds
from edge_agent.api.validation import Violations
from edge_agent.core import RunTelemetry
from edge_agent.telemetry.reading import ReadingStatus
from edge_agent.telemetry.snapshot import (
    GpuMetrics,
    MemoryMetrics,
    Metric,
    PressureMetrics,
    RailMetrics,
    TelemetrySnapshot,
    ThrottleReason,
    ZoneMetrics,
)
from edge_agent.telemetry.thermal import HottestZone, TripPoint
from edge_agent.v1 import run_service_pb2
from edge_agent.v1 import system_service_pb2 as pb

DEFAULT_INTERVAL_S: Final = 1.0
MIN_INTERVAL_S: Final = 0.1
MAX_INTERVAL_S: Final = 3600.0

T = TypeVar("T")
_STATUSES = {
    status: pb.MetricStatus.Value(f"METRIC_STATUS_{status.name}") for status in ReadingStatus
}
_READ_STATUSES = {value: status for status, value in _STATUSES.items()}
_REASONS = {
    reason: pb.ThrottleReason.Value(f"THROTTLE_REASON_{reason}") for reason in ThrottleReason
}
_READ_REASONS = {value: reason for reason, value in _REASONS.items()}


def interval_s(request: pb.WatchTelemetryRequest) -> float:
    """How often to send. Raises InvalidRequest."""
    if not request.HasField("interval"):
        return DEFAULT_INTERVAL_S
    found = Violations()
    value = found.duration_s("interval", request.interval, MAX_INTERVAL_S)
    if value is not None and value < MIN_INTERVAL_S:
        found.add("interval", f"{value:g}s is below the limit of {MIN_INTERVAL_S:g}s")
    found.raise_if_any()
    return DEFAULT_INTERVAL_S if value is None else value


def watch_request(every_s: float) -> pb.WatchTelemetryRequest:
    """The request for a message every so many seconds."""
    return pb.WatchTelemetryRequest(interval=filled(Duration(), every_s))


def telemetry(snapshot: TelemetrySnapshot) -> pb.Telemetry:
    """The machine at one time."""
    memory, pressure = snapshot.memory, snapshot.pressure
    return pb.Telemetry(
        sampled_at=filled(Timestamp(), snapshot.sampled_at_unix_s),
        age=filled(Duration(), max(0.0, snapshot.as_of_s - snapshot.sampled_at_s)),
        memory=pb.MemoryTelemetry(
            total_bytes=_int(memory.total_bytes),
            available_bytes=_int(memory.available_bytes),
            free_bytes=_int(memory.free_bytes),
            swap_total_bytes=_int(memory.swap_total_bytes),
            swap_free_bytes=_int(memory.swap_free_bytes),
            cma_total_bytes=_int(memory.cma_total_bytes),
            cma_free_bytes=_int(memory.cma_free_bytes),
            largest_free_block_bytes=_int(memory.largest_free_block_bytes),
            nvmap_used_bytes=_int(memory.nvmap_used_bytes),
        ),
        pressure=pb.PressureTelemetry(
            some_avg10_percent=_double(pressure.some_avg10_percent),
            some_avg60_percent=_double(pressure.some_avg60_percent),
            full_avg10_percent=_double(pressure.full_avg10_percent),
            full_avg60_percent=_double(pressure.full_avg60_percent),
        ),
        gpu_utilisation_percent=_double(snapshot.gpu_utilisation_percent),
        gpu_clock_hz=_int(snapshot.gpu_clock_hz),
        gpu_max_clock_hz=_int(snapshot.gpu_max_clock_hz),
        zones=map(_zone, snapshot.zones),
        hottest=_hottest(snapshot.hottest),
        rails=[
            pb.PowerRail(name=rail.name, power_mw=_int(rail.power_mw)) for rail in snapshot.rails
        ],
        power_mw=_int(snapshot.power_mw),
        power_mode=_int(snapshot.power_mode),
        power_mode_name=_text(snapshot.power_mode_name),
        throttling=pb.ThrottlingMetric(
            reasons=[_REASONS[reason] for reason in snapshot.throttling.value or ()],
            origin=_origin(snapshot.throttling),
        ),
        driver_version=_text(snapshot.driver_version),
        cuda_version=_text(snapshot.cuda_version),
        gpus=map(_gpu, snapshot.gpus),
    )


def snapshot(value: pb.Telemetry, received_at_s: float) -> TelemetrySnapshot:
    """What a message said when it came; `received_at_s` is on the reader's monotonic clock."""
    memory, pressure = value.memory, value.pressure
    return TelemetrySnapshot(
        sampled_at_s=received_at_s - seconds(value.age),
        as_of_s=received_at_s,
        sampled_at_unix_s=seconds(value.sampled_at),
        memory=MemoryMetrics(
            total_bytes=_read(memory.total_bytes),
            available_bytes=_read(memory.available_bytes),
            free_bytes=_read(memory.free_bytes),
            swap_total_bytes=_read(memory.swap_total_bytes),
            swap_free_bytes=_read(memory.swap_free_bytes),
            cma_total_bytes=_read(memory.cma_total_bytes),
            cma_free_bytes=_read(memory.cma_free_bytes),
            largest_free_block_bytes=_read(memory.largest_free_block_bytes),
            nvmap_used_bytes=_read(memory.nvmap_used_bytes),
        ),
        pressure=PressureMetrics(
            some_avg10_percent=_read_double(pressure.some_avg10_percent),
            some_avg60_percent=_read_double(pressure.some_avg60_percent),
            full_avg10_percent=_read_double(pressure.full_avg10_percent),
            full_avg60_percent=_read_double(pressure.full_avg60_percent),
        ),
        gpu_utilisation_percent=_read_double(value.gpu_utilisation_percent),
        gpu_clock_hz=_read(value.gpu_clock_hz),
        gpu_max_clock_hz=_read(value.gpu_max_clock_hz),
        zones=tuple(map(_read_zone, value.zones)),
        hottest=_read_hottest(value.hottest),
        rails=tuple(RailMetrics(rail.name, _read(rail.power_mw)) for rail in value.rails),
        power_mw=_read(value.power_mw),
        power_mode=_read(value.power_mode),
        power_mode_name=_read_text(value.power_mode_name),
        throttling=_read_throttling(value.throttling),
        driver_version=_read_text(value.driver_version),
        cuda_version=_read_text(value.cuda_version),
        gpus=tuple(map(_read_gpu, value.gpus)),
    )


def fill_run_telemetry(target: run_service_pb2.RunTelemetry, value: RunTelemetry) -> None:
    """What the machine went through during a run; what is unknown stays unset."""
    target.SetInParent()
    if value.energy_mj is not None:
        target.energy_mj = value.energy_mj
    if value.min_available_bytes is not None:
        target.min_available_bytes = value.min_available_bytes
    if value.max_temperature_milli_c is not None:
        target.max_temperature_milli_c = value.max_temperature_milli_c


def run_telemetry(value: run_service_pb2.RunTelemetry) -> RunTelemetry:
    """What the machine went through during a run."""
    return RunTelemetry(
        value.energy_mj if value.HasField("energy_mj") else None,
        value.min_available_bytes if value.HasField("min_available_bytes") else None,
        value.max_temperature_milli_c if value.HasField("max_temperature_milli_c") else None,
    )


# --- to the wire ---


def _origin(metric: Metric[object]) -> pb.MetricOrigin:
    return pb.MetricOrigin(
        source=metric.source,
        status=_STATUSES[metric.status],
        detail=metric.detail,
        age=filled(Duration(), metric.age_s),
        period=filled(Duration(), metric.period_s),
    )


def _int(metric: Metric[int]) -> pb.IntMetric:
    return pb.IntMetric(value=metric.value, origin=_origin(metric))


def _double(metric: Metric[float]) -> pb.DoubleMetric:
    return pb.DoubleMetric(value=metric.value, origin=_origin(metric))


def _text(metric: Metric[str]) -> pb.TextMetric:
    return pb.TextMetric(value=metric.value, origin=_origin(metric))


def _zone(zone: ZoneMetrics) -> pb.ThermalZone:
    return pb.ThermalZone(
        name=zone.name,
        temperature_milli_c=_int(zone.temperature_milli_c),
        trip_points=[
            pb.TripPoint(kind=point.kind, temperature_milli_c=point.temperature_milli_c)
            for point in zone.trip_points
        ],
    )


def _hottest(metric: Metric[HottestZone]) -> pb.HottestZoneMetric:
    zone = metric.value
    return pb.HottestZoneMetric(
        value=None
        if zone is None
        else pb.HottestZone(
            name=zone.name,
            temperature_milli_c=zone.temperature_milli_c,
            margin_milli_c=zone.margin_milli_c,
            slope_milli_c_per_s=zone.slope_milli_c_per_s,
            unreadable=zone.unreadable,
        ),
        origin=_origin(metric),
    )


def _gpu(gpu: GpuMetrics) -> pb.GpuTelemetry:
    return pb.GpuTelemetry(
        index=gpu.index,
        name=_text(gpu.name),
        integrated=pb.BoolMetric(value=gpu.integrated.value, origin=_origin(gpu.integrated)),
        memory_total_bytes=_int(gpu.memory_total_bytes),
        memory_used_bytes=_int(gpu.memory_used_bytes),
        utilisation_percent=_int(gpu.utilisation_percent),
        temperature_milli_c=_int(gpu.temperature_milli_c),
        power_mw=_int(gpu.power_mw),
        clock_hz=_int(gpu.clock_hz),
    )


# --- from the wire ---


def _metric(value: T | None, origin: pb.MetricOrigin) -> Metric[T]:
    """A status that this reader does not know is no reason to believe the value."""
    unknown = ReadingStatus.ERROR if value is None else ReadingStatus.STALE
    status = _READ_STATUSES.get(origin.status, unknown)
    return Metric(
        value, origin.source, status, origin.detail, seconds(origin.age), seconds(origin.period)
    )


def _read(metric: pb.IntMetric) -> Metric[int]:
    return _metric(metric.value if metric.HasField("value") else None, metric.origin)


def _read_double(metric: pb.DoubleMetric) -> Metric[float]:
    return _metric(metric.value if metric.HasField("value") else None, metric.origin)


def _read_text(metric: pb.TextMetric) -> Metric[str]:
    return _metric(metric.value if metric.HasField("value") else None, metric.origin)


def _read_zone(zone: pb.ThermalZone) -> ZoneMetrics:
    points = tuple(TripPoint(point.kind, point.temperature_milli_c) for point in zone.trip_points)
    return ZoneMetrics(zone.name, _read(zone.temperature_milli_c), points)


def _read_hottest(metric: pb.HottestZoneMetric) -> Metric[HottestZone]:
    if not metric.HasField("value"):
        return _metric(None, metric.origin)
    zone = metric.value
    read = HottestZone(
        zone.name,
        zone.temperature_milli_c,
        zone.margin_milli_c if zone.HasField("margin_milli_c") else None,
        zone.slope_milli_c_per_s if zone.HasField("slope_milli_c_per_s") else None,
        tuple(zone.unreadable),
    )
    return _metric(read, metric.origin)


def _read_throttling(metric: pb.ThrottlingMetric) -> Metric[tuple[ThrottleReason, ...]]:
    """A reason that this reader does not know still slows the machine down: HARDWARE."""
    reasons = tuple(_READ_REASONS.get(reason, ThrottleReason.HARDWARE) for reason in metric.reasons)
    holds = metric.origin.status in (pb.METRIC_STATUS_OK, pb.METRIC_STATUS_STALE)
    return _metric(reasons if holds else None, metric.origin)


def _read_gpu(gpu: pb.GpuTelemetry) -> GpuMetrics:
    return GpuMetrics(
        index=gpu.index,
        name=_read_text(gpu.name),
        integrated=_metric(
            gpu.integrated.value if gpu.integrated.HasField("value") else None,
            gpu.integrated.origin,
        ),
        memory_total_bytes=_read(gpu.memory_total_bytes),
        memory_used_bytes=_read(gpu.memory_used_bytes),
        utilisation_percent=_read(gpu.utilisation_percent),
        temperature_milli_c=_read(gpu.temperature_milli_c),
        power_mw=_read(gpu.power_mw),
        clock_hz=_read(gpu.clock_hz),
    )
