"""What an engine takes in memory: the manifest's estimate, corrected by what was measured. Pure.

A measurement that is higher counts at once, a lower one only when five loads in a row agree, and
nothing brings an engine below its weights, KV caches and recurrent state.
"""

from collections.abc import Sequence
from typing import Final

from edge_agent.core import MeasuredLoad
from edge_agent.engines.manifest import Manifest
from edge_agent.scheduling.values import Footprint

AGREEING: Final = 5
_AGREE_SHARE: Final = 0.1
"""Measurements agree when they are within this share of the largest."""
_BELIEVED_FALL: Final = 1.5
"""Of the estimate: the most that the fall of MemAvailable alone can make of it."""


def kv_bytes(manifest: Manifest, slots: int, context_tokens: int) -> int:
    """KV caches and recurrent state of so many sequences (see `manifest.LayerKind`)."""
    one = 0
    for group in manifest.layers:
        tokens = min(context_tokens, group.window_tokens or context_tokens)
        one += group.layers * (tokens * group.bytes_per_token + group.state_bytes)
    return slots * one


def estimate(manifest: Manifest, slots: int, context_tokens: int) -> Footprint:
    """The manifest's estimate, for other slots and another context than it was made with."""
    usual = kv_bytes(manifest, manifest.slots, manifest.context_tokens)
    more = kv_bytes(manifest, slots, context_tokens) - usual
    least = floor_bytes(manifest, slots, context_tokens)
    return Footprint(
        max(least, manifest.memory.load_peak_bytes + more),
        max(least, manifest.memory.steady_bytes + more),
    )


def floor_bytes(manifest: Manifest, slots: int, context_tokens: int) -> int:
    """Weights, KV caches and state: less than this is a mistake of measuring.

    The prefix cache too: it fills only after the load.
    """
    weights = sum(spec.size_bytes for spec in manifest.files)
    caches = kv_bytes(manifest, slots, context_tokens) + manifest.memory.prefix_cache_bytes
    return weights + caches


def correct(estimated: Footprint, least_bytes: int, history: Sequence[MeasuredLoad]) -> Footprint:
    """The estimate after these measurements, oldest first.

    What was measured by the fall of MemAvailable counts up to a limit: others may have taken memory
    at the same time, and an engine must not stay too large for ever for that.
    """

    def believed(number: int, estimate: int, source: str) -> int:
        return min(number, int(estimate * _BELIEVED_FALL)) if source == "available" else number

    peaks = [believed(m.load_peak_bytes, estimated.load_peak_bytes, m.source) for m in history]
    steadies = [believed(m.steady_bytes, estimated.steady_bytes, m.source) for m in history]
    steady = max(_correct(estimated.steady_bytes, steadies), least_bytes)
    return Footprint(max(_correct(estimated.load_peak_bytes, peaks), steady), steady)


def _correct(value: int, measured: Sequence[int]) -> int:
    recent: list[int] = []
    for number in measured:
        recent = [*recent, number][-AGREEING:]
        if number > value:
            value = number
        elif len(recent) == AGREEING and min(recent) >= max(recent) * (1 - _AGREE_SHARE):
            value = max(recent)
    return value
