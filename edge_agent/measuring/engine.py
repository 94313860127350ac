"""One engine, measured once: brought into memory, warmed up, and taken through the rounds.

Owns what is taken from which run. Times are the caller's; no token is computed here.
"""

import asyncio
import contextlib
import datetime as dt
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_agent import __version__
from edge_agent.client import AsyncClient
from edge_agent.client.wire import cut_short
from edge_agent.core import EngineInfo, Run, Usage
from edge_agent.errors import StepFailed
from edge_agent.events import RunFinished, TextDelta
from edge_agent.measuring import statistics
from edge_agent.measuring.machine import PowerMeter, read_machine_info, read_temperature_milli_c
from edge_agent.measuring.prompts import Prompt, PromptMaker, Question, long_prompt, short_prompt
from edge_agent.measuring.residency import Residency
from edge_agent.measuring.results import (
    BenchSettings,
    EngineResult,
    MemoryResult,
    PowerResult,
    PromptResult,
    TemperatureResult,
)
from edge_agent.measuring.statistics import Timeline, Window
from edge_agent.telemetry import procfs
from edge_agent.telemetry.energy import PowerSample
from edge_agent.telemetry.nvml import Nvml
from edge_agent.telemetry.process import read_process_memory
from edge_agent.telemetry.reading import Reading

AGENT: Final = "edge-agent bench"
_TOO_LONG: Final = "PROMPT_TOO_LONG"
_WARM_UP_TOKENS: Final = 4
_CACHED_OUTPUT_TOKENS: Final = 8
"""Of a run whose first token alone is measured."""
_IDLE_S: Final = 1.0
"""How long the idle power is measured; a rail shows its own mean over some 0.3 s."""
_MARK_BYTES: Final = 4
_PARTS_BEFORE_ROUNDS: Final = 2
_PARTS_PER_ROUND: Final = 3


def parts(settings: BenchSettings) -> int:
    """How often `on_part` is told while one engine is measured."""
    return _PARTS_BEFORE_ROUNDS + _PARTS_PER_ROUND * settings.rounds


@dataclass(frozen=True, slots=True)
class _Timed:
    """One run as its caller saw it."""

    timeline: Timeline
    usage: Usage


@dataclass(frozen=True, slots=True)
class _Pair:
    """A prompt that nothing had seen before, then one that shares its beginning."""

    cold: _Timed
    cached: _Timed


@dataclass(frozen=True, slots=True)
class _Before:
    """The machine before the engine came."""

    resident: frozenset[str]
    memory: procfs.Memory
    temperature_milli_c: int | None
    idle: tuple[float, float]


class EngineMeasurement:
    """One engine in one daemon; for one `run`."""

    def __init__(
        self,
        api: AsyncClient,
        residency: Residency,
        engine: EngineInfo,
        settings: BenchSettings,
        sysroot: Path,
        on_part: Callable[[str], object],
    ) -> None:
        """Measure `engine` below `sysroot`; `on_part` is told what begins."""
        self._api = api
        self._residency = residency
        self._engine = engine
        self._settings = settings
        self._sysroot = sysroot
        self._on_part = on_part
        self._nvml = Nvml()

    async def run(self) -> EngineResult:
        """Bring it into memory, warm it up, and go through the rounds."""
        settings = self._settings
        short: list[_Pair] = []
        long: list[_Pair | None] = []
        streams: list[Window | None] = []
        with contextlib.closing(self._nvml), PowerMeter(self._sysroot) as meter:
            before = await self._before(meter)
            self._on_part("loading")
            await self._residency.bring(self._engine.name)
            self._on_part("warming up")
            await self._timed(short_prompt(_mark(), Question.FIRST), _WARM_UP_TOKENS)
            for number in range(1, settings.rounds + 1):
                of = f"round {number} of {settings.rounds}"
                self._on_part(f"short prompt, {of}")
                short.append(await self._pair(short_prompt))
                self._on_part(f"long prompt, {of}")
                long.append(await self._pair_if_it_fits(long_prompt))
                self._on_part(f"{settings.streams} streams, {of}")
                streams.append(await self._streams() if settings.streams > 1 else None)
            engine = await self._as_it_is()
            memory, temperature = await self._after(before, engine)
        return EngineResult(
            engine=engine.name,
            digest=engine.digest,
            backend=engine.backend,
            measured_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            edge_agent_version=__version__,
            machine=read_machine_info(self._sysroot),
            settings=settings,
            worker_slots=engine.worker.slots if engine.worker else None,
            load_s=engine.worker.load_s if engine.worker else None,
            short_prompt=_prompt_result(short),
            long_prompt=_prompt_result([pair for pair in long if pair]) if any(long) else None,
            streams_tokens_per_second=statistics.median_of(
                window.tokens_per_second if window else None for window in streams
            ),
            memory=memory,
            power=_power_result(meter.source, meter.samples, before.idle, short, streams),
            temperature=temperature,
        )

    async def _before(self, meter: PowerMeter) -> _Before:
        start_s = time.monotonic()
        if meter.source is not None:
            await asyncio.sleep(_IDLE_S)
        return _Before(
            resident=await self._residency.resident(),
            memory=procfs.read_memory(self._sysroot),
            temperature_milli_c=read_temperature_milli_c(self._sysroot, self._nvml),
            idle=(start_s, time.monotonic()),
        )

    async def _as_it_is(self) -> EngineInfo:
        engines = await self._api.engines()
        name = self._engine.name
        return next((engine for engine in engines if engine.name == name), self._engine)

    async def _after(
        self, before: _Before, engine: EngineInfo
    ) -> tuple[MemoryResult, TemperatureResult]:
        memory = procfs.read_memory(self._sysroot)
        resident = await self._residency.resident()
        came_alone = engine.name not in before.resident
        came_alone = came_alone and resident == before.resident | {engine.name}
        fall = _difference(before.memory.available_bytes, memory.available_bytes)
        rise = _difference(memory.nvmap_used_bytes, before.memory.nvmap_used_bytes)
        worker = read_process_memory(self._sysroot, engine.worker.pid) if engine.worker else None
        return MemoryResult(
            pss_bytes=worker.pss_bytes.value if worker else None,
            rss_bytes=worker.rss_bytes.value if worker else None,
            mem_available_fall_bytes=fall if came_alone else None,
            nvmap_rise_bytes=rise if came_alone else None,
            manifest_steady_bytes=engine.steady_bytes,
            manifest_load_peak_bytes=engine.load_peak_bytes,
        ), TemperatureResult(
            before_milli_c=before.temperature_milli_c,
            after_milli_c=read_temperature_milli_c(self._sysroot, self._nvml),
        )

    async def _pair(self, prompt: PromptMaker) -> _Pair:
        mark = _mark()
        cold = await self._timed(prompt(mark, Question.FIRST), self._settings.max_output_tokens)
        few = min(_CACHED_OUTPUT_TOKENS, self._settings.max_output_tokens)
        return _Pair(cold, await self._timed(prompt(mark, Question.SECOND), few))

    async def _pair_if_it_fits(self, prompt: PromptMaker) -> _Pair | None:
        try:
            return await self._pair(prompt)
        except StepFailed as error:
            if error.reason != _TOO_LONG:
                raise
            return None

    async def _streams(self) -> Window | None:
        """Several callers at once, each with a conversation of its own."""
        runs = [
            asyncio.create_task(
                self._timed(short_prompt(_mark(), Question.FIRST), self._settings.max_output_tokens)
            )
            for _ in range(self._settings.streams)
        ]
        try:
            done = await asyncio.gather(*runs)
        finally:
            for run in runs:
                run.cancel()
            await asyncio.gather(*runs, return_exceptions=True)
        return statistics.decode_window([timed.timeline for timed in done])

    async def _timed(self, prompt: Prompt, max_output_tokens: int) -> _Timed:
        """Carry a run to its end.

        Raises:
            StepFailed: it ended with an error.
        """
        arrivals: list[tuple[float, int]] = []
        run: Run | None = None
        started_s = time.monotonic()
        events = self._api.execute(
            prompt.goal,
            system=prompt.system,
            engine=self._engine.name,
            max_output_tokens=max_output_tokens,
            max_steps=1,
            agent=AGENT,
        )
        async for event in events:
            if isinstance(event.body, TextDelta):
                arrivals.append((time.monotonic(), event.body.tokens))
            elif isinstance(event.body, RunFinished):
                run = event.body.run
        if run is None or run.error is not None:
            raise cut_short() if run is None or run.error is None else StepFailed(run.error)
        return _Timed(Timeline(started_s, tuple(arrivals)), run.usage)


def _mark() -> str:
    return secrets.token_hex(_MARK_BYTES)


def _difference(one: Reading[int], other: Reading[int]) -> int | None:
    return None if one.value is None or other.value is None else one.value - other.value


def _prompt_result(pairs: Sequence[_Pair]) -> PromptResult:
    windows = [statistics.decode_window([pair.cold.timeline]) for pair in pairs]
    return PromptResult(
        prompt_tokens=_whole(statistics.median_of(p.cold.usage.prompt_tokens for p in pairs)),
        cached_tokens=_whole(statistics.median_of(p.cached.usage.cached_tokens for p in pairs)),
        ttft_cold_ms=statistics.median_of(statistics.ttft_ms(p.cold.timeline) for p in pairs),
        ttft_cached_ms=statistics.median_of(statistics.ttft_ms(p.cached.timeline) for p in pairs),
        tokens_per_second=statistics.median_of(
            window.tokens_per_second if window else None for window in windows
        ),
    )


def _power_result(
    source: str | None,
    samples: Sequence[PowerSample],
    idle: tuple[float, float],
    short: Sequence[_Pair],
    streams: Sequence[Window | None],
) -> PowerResult:
    alone = [statistics.decode_window([pair.cold.timeline]) for pair in short]
    return PowerResult(
        source=source,
        idle_mw=statistics.mean_power_mw(samples, *idle),
        one_stream_mw=statistics.median_of(_mean_mw(samples, w) for w in alone),
        streams_mw=statistics.median_of(_mean_mw(samples, w) for w in streams),
        one_stream_energy_per_token_mj=statistics.median_of(
            statistics.energy_per_token_mj(samples, w) for w in alone
        ),
        streams_energy_per_token_mj=statistics.median_of(
            statistics.energy_per_token_mj(samples, w) for w in streams
        ),
    )


def _mean_mw(samples: Sequence[PowerSample], window: Window | None) -> float | None:
    return statistics.mean_power_mw(samples, window.start_s, window.end_s) if window else None


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
