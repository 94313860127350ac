"""The arithmetic of a measurement: times of tokens in, rates and energies out.

Pure. What can't be said from what was seen is None.
"""

import bisect
import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from edge_agent.telemetry.energy import PowerSample

_MS: Final = 1000.0


@dataclass(frozen=True, slots=True)
class Timeline:
    """When a caller made a call, and when which number of tokens arrived; one clock, in order."""

    started_s: float
    arrivals: tuple[tuple[float, int], ...]

    @property
    def first_s(self) -> float | None:
        """When the first token was there."""
        return self.arrivals[0][0] if self.arrivals else None


@dataclass(frozen=True, slots=True)
class Window:
    """The time in which `tokens` were decoded."""

    start_s: float
    end_s: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """The rate of decoding."""
        return self.tokens / (self.end_s - self.start_s)


def median_of(values: Iterable[float | None]) -> float | None:
    """The median of those that are known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def ttft_ms(timeline: Timeline) -> float | None:
    """From the call to the first token."""
    return None if timeline.first_s is None else (timeline.first_s - timeline.started_s) * _MS


def decode_window(timelines: Sequence[Timeline]) -> Window | None:
    """From the first token of any to the last token of any.

    What came with the very first arrival was decoded before it: it is not counted.
    """
    arrivals = sorted(itertools.chain.from_iterable(line.arrivals for line in timelines))
    if not arrivals or arrivals[-1][0] <= arrivals[0][0]:
        return None
    tokens = sum(tokens for _, tokens in arrivals[1:])
    return Window(arrivals[0][0], arrivals[-1][0], tokens) if tokens > 0 else None


def mean_power_mw(samples: Sequence[PowerSample], start_s: float, end_s: float) -> float | None:
    """The mean between two times, straight lines between samples; None unless samples span it."""
    times = [sample.at_s for sample in samples]
    if not times or times[0] > start_s or times[-1] < end_s or end_s <= start_s:
        return None
    inner = samples[bisect.bisect_right(times, start_s) : bisect.bisect_left(times, end_s)]
    points = [
        (start_s, _power_at(samples, times, start_s)),
        *((sample.at_s, float(sample.power_mw)) for sample in inner),
        (end_s, _power_at(samples, times, end_s)),
    ]
    area = sum(
        (right_s - left_s) * (left + right) / 2
        for (left_s, left), (right_s, right) in itertools.pairwise(points)
    )
    return area / (end_s - start_s)


def energy_per_token_mj(samples: Sequence[PowerSample], window: Window | None) -> float | None:
    """What a token of this window took, all that the power's source measures included."""
    if window is None:
        return None
    power_mw = mean_power_mw(samples, window.start_s, window.end_s)
    return None if power_mw is None else power_mw / window.tokens_per_second


def _power_at(samples: Sequence[PowerSample], times: Sequence[float], at_s: float) -> float:
    """On the line between the samples around this time, which there are."""
    after = bisect.bisect_left(times, at_s)
    right = samples[after]
    if right.at_s == at_s:
        return float(right.power_mw)
    left = samples[after - 1]
    share = (at_s - left.at_s) / (right.at_s - left.at_s)
    return left.power_mw + share * (right.power_mw - left.power_mw)
