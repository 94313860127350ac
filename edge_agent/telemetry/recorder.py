"""What the machine went through during a run: its energy, least memory and highest temperature.

Used in one thread, the one that is handed the snapshots. Decides nothing.
"""

from collections.abc import Callable, Iterable

from edge_agent.core import RunTelemetry
from edge_agent.telemetry.energy import EnergyMeter, PowerSample
from edge_agent.telemetry.snapshot import STALE_PERIODS, TelemetrySnapshot

_SAME_READING_S = 1e-3
"""Two samples nearer than this are one, seen in two snapshots."""


class Recording:
    """One run's time, from `Recorder.begin` to `end`."""

    def __init__(self, recorder: "Recorder", begun: TelemetrySnapshot) -> None:
        self._recorder = recorder
        self._power_at_s = begun.as_of_s
        max_gap_s = STALE_PERIODS * begun.power_mw.period_s
        self._meter = EnergyMeter(begun.as_of_s, _power_sample(begun), max_gap_s)
        self._available_bytes: int | None = None
        self._temperature_milli_c: int | None = None
        self.observe(begun)

    def observe(self, snapshot: TelemetrySnapshot) -> None:
        """Take what holds at the snapshot's time."""
        available = _known(self._available_bytes, snapshot.mem_available_bytes)
        self._available_bytes = min(available, default=None)
        temperatures = (zone.temperature_milli_c.fresh for zone in snapshot.zones)
        self._temperature_milli_c = max(
            _known(self._temperature_milli_c, *temperatures), default=None
        )
        sample = _power_sample(snapshot)
        if sample is not None and sample.at_s > self._power_at_s + _SAME_READING_S:
            self._power_at_s = sample.at_s
            self._meter.add(sample)

    def end(self) -> RunTelemetry:
        """What it was, up to now; nothing more is taken."""
        ended = self._recorder.finish(self)
        self.observe(ended)
        return RunTelemetry(
            energy_mj=self._meter.total_mj(ended.as_of_s),
            min_available_bytes=self._available_bytes,
            max_temperature_milli_c=self._temperature_milli_c,
        )


class Recorder:
    """Hands each snapshot to the recordings that are open. `latest` is the sampler's, by now."""

    def __init__(self, latest: Callable[[], TelemetrySnapshot]) -> None:
        self._latest = latest
        self._open: set[Recording] = set()
        self._seen: TelemetrySnapshot | None = None

    def available_bytes(self) -> int | None:
        """MemAvailable in the newest snapshot that was handed over."""
        return self._seen.mem_available_bytes if self._seen else None

    def power_mode(self) -> str | None:
        """The power mode's name in the newest snapshot, or its number where it has none."""
        if self._seen is None:
            return None
        number = self._seen.power_mode_number
        return self._seen.power_mode_name.fresh or (None if number is None else str(number))

    def begin(self) -> Recording:
        """Record from now on. It must be ended."""
        recording = Recording(self, self._latest())
        self._open.add(recording)
        return recording

    def observe(self, snapshot: TelemetrySnapshot) -> None:
        """A new snapshot."""
        self._seen = snapshot
        for recording in self._open:
            recording.observe(snapshot)

    def finish(self, recording: Recording) -> TelemetrySnapshot:
        """Let go of a recording; the snapshot that it ends with."""
        self._open.discard(recording)
        return self._latest()


def _known(*values: int | None) -> Iterable[int]:
    return [value for value in values if value is not None]


def _power_sample(snapshot: TelemetrySnapshot) -> PowerSample | None:
    """The whole machine's power, at the time at which it was read."""
    power_mw = snapshot.power_mw.fresh
    if power_mw is None:
        return None
    return PowerSample(snapshot.as_of_s - snapshot.power_mw.age_s, power_mw)
