"""What an engine was measured to do on this machine, and what follows for the next step. Pure.

Averages decay exponentially, so that they follow a change of power mode within some ten steps.
Nothing is estimated before something was measured: None then.
"""

import math
from dataclasses import dataclass

_ALPHA = 0.2
"""Share of the newest step in an average."""
_DEMAND_MEMORY_S = 300.0
"""After so long a past arrival counts 1/e."""


@dataclass(frozen=True, slots=True)
class Served:
    """What one step took. `prefill_s` is until its first token, in the worker."""

    computed_tokens: int
    output_tokens: int
    prefill_s: float
    decode_s: float


@dataclass(slots=True)
class Pace:
    """Rates of one engine, in tokens per second and seconds per step."""

    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    computed_tokens: float | None = None
    output_tokens: float | None = None
    step_s: float | None = None

    def observe(self, served: Served, slowdown: float = 1.0) -> None:
        """Take one finished step into the averages; what it did not do says nothing.

        `slowdown` is by how much the machine was taken to be slower than it is when cool: what is
        kept is what the step would have taken then.
        """
        if served.computed_tokens > 0 and served.prefill_s > 0:
            rate = served.computed_tokens / served.prefill_s * slowdown
            self.prefill_tokens_per_s = _mean(self.prefill_tokens_per_s, rate)
        if served.output_tokens > 0 and served.decode_s > 0:
            rate = served.output_tokens / served.decode_s * slowdown
            self.decode_tokens_per_s = _mean(self.decode_tokens_per_s, rate)
        self.computed_tokens = _mean(self.computed_tokens, served.computed_tokens)
        self.output_tokens = _mean(self.output_tokens, served.output_tokens)
        self.step_s = _mean(self.step_s, (served.prefill_s + served.decode_s) / slowdown)

    def prefill_s(self, prompt_tokens: int) -> float | None:
        """How long reading a prompt takes: at most what is usually not cached of one."""
        if self.prefill_tokens_per_s is None or self.computed_tokens is None:
            return None
        return min(prompt_tokens, self.computed_tokens) / self.prefill_tokens_per_s

    def decode_s(self, output_tokens: int) -> float | None:
        """How long writing takes: at most what a step usually writes."""
        if self.decode_tokens_per_s is None or self.output_tokens is None:
            return None
        return min(output_tokens, self.output_tokens) / self.decode_tokens_per_s

    def estimate_s(self, prompt_tokens: int, output_tokens: int) -> float | None:
        """How long a whole step takes."""
        prefill, decode = self.prefill_s(prompt_tokens), self.decode_s(output_tokens)
        return None if prefill is None or decode is None else prefill + decode


@dataclass(slots=True)
class Demand:
    """How often steps ask for an engine: an exponentially decaying count."""

    count: float = 0.0
    counted_s: float = 0.0

    def arrived(self, now_s: float) -> None:
        """One more step asks for it."""
        self.count = self._decayed(now_s) + 1.0
        self.counted_s = now_s

    def reuse(self, now_s: float, within_s: float) -> float:
        """The chance (0 to 1) that another step asks for it within so long: a Poisson process."""
        rate_per_s = self._decayed(now_s) / _DEMAND_MEMORY_S
        return 1.0 - math.exp(-rate_per_s * within_s)

    def _decayed(self, now_s: float) -> float:
        return self.count * math.exp(-max(0.0, now_s - self.counted_s) / _DEMAND_MEMORY_S)


def _mean(before: float | None, value: float) -> float:
    return value if before is None else before + _ALPHA * (value - before)
