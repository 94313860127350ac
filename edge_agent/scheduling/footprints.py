"""The file in the state directory that remembers what engines took on this device.

One entry for each engine digest, slots and context; the last measurements only. A file that can't
be read is set aside and begun anew: it holds nothing that can't be measured again.
"""

import asyncio
from pathlib import Path
from typing import Final

import msgspec
import structlog

from edge_agent import durable
from edge_agent.core import MeasuredLoad
from edge_agent.engines import manifest as manifests
from edge_agent.engines.manifest import Manifest
from edge_agent.scheduling import footprint
from edge_agent.scheduling.values import Footprint

FOOTPRINTS: Final = "footprints.json"
_KEPT: Final = 20
_KEPT_ENGINES: Final = 256

log = structlog.get_logger()


class Footprints:
    """What is known of each engine's memory. `device` names the machine: another has its own."""

    def __init__(self, path: Path | None, device: str) -> None:
        """Read what is remembered; None: nothing is, and nothing is kept."""
        self._path = path
        self._device = device
        self._known: dict[str, list[MeasuredLoad]] = _read(path) if path else {}
        self._writing = asyncio.Lock()

    def of(self, manifest: Manifest, slots: int, context_tokens: int) -> Footprint:
        """The engine's footprint: estimated, then corrected."""
        return footprint.correct(
            footprint.estimate(manifest, slots, context_tokens),
            footprint.floor_bytes(manifest, slots, context_tokens),
            self.history(manifest, slots, context_tokens),
        )

    def history(
        self, manifest: Manifest, slots: int, context_tokens: int
    ) -> tuple[MeasuredLoad, ...]:
        """What was measured, oldest first."""
        return tuple(self._known.get(self._key(manifest, slots, context_tokens), ()))

    async def forget(self, manifest: Manifest, slots: int, context_tokens: int) -> None:
        """Begin anew from the estimate."""
        if self._known.pop(self._key(manifest, slots, context_tokens), None) is not None:
            await self.keep()

    def add(
        self, manifest: Manifest, slots: int, context_tokens: int, measured: MeasuredLoad
    ) -> None:
        """Take in one load's figures; `keep` writes them.

        A load is known by its time: later figures of it take the place of its earlier ones.
        """
        key = self._key(manifest, slots, context_tokens)
        history = [
            each
            for each in self._known.pop(key, [])
            if each.measured_at_s != measured.measured_at_s
        ]
        self._known[key] = [*history, measured][-_KEPT:]  # the newest engine last
        while len(self._known) > _KEPT_ENGINES:
            del self._known[next(iter(self._known))]

    async def keep(self) -> None:
        """Write what is known; a disk that does not take it is logged, and no more."""
        if self._path is None:
            return
        async with self._writing:
            raw = msgspec.json.format(msgspec.json.encode(self._known), indent=1)
            try:
                await asyncio.to_thread(durable.replace, self._path, raw)
            except OSError as error:
                log.warning("footprints_not_kept", path=str(self._path), error=str(error))

    def _key(self, manifest: Manifest, slots: int, context_tokens: int) -> str:
        return f"{manifests.digest(manifest)} {slots}x{context_tokens} {self._device}"


def _read(path: Path) -> dict[str, list[MeasuredLoad]]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, list[MeasuredLoad]])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        log.warning("footprints_set_aside", path=str(path), error=str(error))
        _set_aside(path)
        return {}


def _set_aside(path: Path) -> None:
    try:
        durable.set_aside(path)
    except OSError as error:
        log.warning("footprints_not_set_aside", path=str(path), error=str(error))
