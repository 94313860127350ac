"""Results of measurements, made."""

from dataclasses import replace
from typing import Any

from edge_agent.measuring.results import (
    BenchSettings,
    EngineResult,
    MachineInfo,
    MemoryResult,
    PowerResult,
    PromptResult,
    TemperatureResult,
)

SHORT = PromptResult(
    prompt_tokens=42, cached_tokens=31, ttft_cold_ms=90.0, ttft_cached_ms=8.25,
    tokens_per_second=48.04,
)  # fmt: skip
LONG = replace(SHORT, prompt_tokens=600, ttft_cold_ms=1490.6)
BARE = EngineResult(
    engine="tiny",
    digest="0" * 64,
    backend="llama_cpp",
    measured_at="2026-11-25T10:00:00+00:00",
    edge_agent_version="0.1.0",
    machine=MachineInfo(cpu="A Processor", cores=2, kernel="Linux 6.8 x86_64"),
    settings=BenchSettings(rounds=3, streams=4, max_output_tokens=128),
    worker_slots=4,
    load_s=1.5,
    short_prompt=SHORT,
    long_prompt=LONG,
    streams_tokens_per_second=80.0,
    memory=MemoryResult(manifest_steady_bytes=600 << 20, manifest_load_peak_bytes=700 << 20),
    power=PowerResult(),
    temperature=TemperatureResult(),
)
"""On a machine that has neither rails nor sensors nor power modes."""


def on_orin(power_mode: str, **changes: Any) -> EngineResult:
    """On a Jetson, in this power mode."""
    fields: dict[str, Any] = {
        "machine": MachineInfo(
            model="Jetson Orin Nano", module="Orin Nano 8GB", cores=6, power_mode=power_mode
        ),
        "power": PowerResult(
            source="VDD_IN",
            idle_mw=4000.0,
            one_stream_mw=6000.0,
            streams_mw=7000.0,
            one_stream_energy_per_token_mj=125.0,
            streams_energy_per_token_mj=87.5,
        ),
        "temperature": TemperatureResult(before_milli_c=41_500, after_milli_c=49_593),
    }
    return replace(BARE, **(fields | changes))
