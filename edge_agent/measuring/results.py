"""What a measurement of an engine says, and the document that holds several of them.

Pure. The fields' names are the keys of `edge-agent bench --json`: they are stable, hold their unit,
and unknown is None. A new key may come; one that is there keeps its meaning while SCHEMA stays.
"""

from dataclasses import dataclass
from typing import Final, Literal

import msgspec

SCHEMA: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineInfo:
    """Where it was measured, and the power mode that was in force."""

    model: str | None = None
    module: str | None = None
    cpu: str | None = None
    cores: int | None = None
    memory_total_bytes: int | None = None
    l4t_release: str | None = None
    kernel: str | None = None
    power_mode: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """How it was measured."""

    rounds: int
    streams: int
    max_output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptResult:
    """Runs with one prompt; times are the caller's, from its call on.

    Cold: nothing like it was seen before. Cached: `cached_tokens` of its beginning were.
    `tokens_per_second` is that of decoding, after the first token of the cold run.
    """

    prompt_tokens: int | None
    cached_tokens: int | None
    ttft_cold_ms: float | None
    ttft_cached_ms: float | None
    tokens_per_second: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryResult:
    """Memory after all rounds; the two changes count from before the load.

    `pss_bytes` and `rss_bytes` are the worker's and do not hold what only a GPU driver sees.
    `mem_available_fall_bytes` and `nvmap_rise_bytes` are None where the engine was loaded before,
    or another engine left memory for it.
    """

    pss_bytes: int | None = None
    rss_bytes: int | None = None
    mem_available_fall_bytes: int | None = None
    nvmap_rise_bytes: int | None = None
    manifest_steady_bytes: int
    manifest_load_peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerResult:
    """The whole machine's power while decoding, or what `source` measures of it.

    `idle_mw` is from before the load: what a token costs beyond it is for the reader to subtract.
    """

    source: str | None = None
    idle_mw: float | None = None
    one_stream_mw: float | None = None
    streams_mw: float | None = None
    one_stream_energy_per_token_mj: float | None = None
    streams_energy_per_token_mj: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TemperatureResult:
    """The hottest sensor, before the load and after all rounds."""

    before_milli_c: int | None = None
    after_milli_c: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineResult:
    """One engine, measured once: medians over the rounds.

    `long_prompt` is None where it does not fit the engine's context, `streams_tokens_per_second`
    where only one stream was asked for.
    """

    engine: str
    digest: str
    backend: str
    measured_at: str
    edge_agent_version: str
    machine: MachineInfo
    settings: BenchSettings
    worker_slots: int | None
    load_s: float | None
    short_prompt: PromptResult
    long_prompt: PromptResult | None
    streams_tokens_per_second: float | None
    memory: MemoryResult
    power: PowerResult
    temperature: TemperatureResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What `--json` prints and `--append` keeps."""

    schema: Literal[1] = SCHEMA
    results: tuple[EngineResult, ...] = ()


def encode_document(document: Document) -> bytes:
    """As it is kept in a file."""
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def decode_document(raw: bytes) -> Document:
    """As it was kept; nothing at all is an empty document.

    Raises:
        ValueError: it is something else; says where.
    """
    return msgspec.json.decode(raw, type=Document) if raw.strip() else Document()
