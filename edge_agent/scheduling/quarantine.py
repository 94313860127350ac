"""Engines whose load ended the machine's uptime: not loaded again until somebody releases them.

On a GPU that shares the CPU's memory an engine too large can wedge the whole board. So a marker
with the engine's digest and the boot's id is on disk before each load begins and is gone when it
has ended. A marker of another boot tells that this boot ended inside a load; the second one for
the same digest quarantines the engine.
"""

from pathlib import Path
from typing import Final, TypeVar

import msgspec
import structlog

from edge_agent import durable
from edge_agent.engines import manifest as manifests
from edge_agent.engines.manifest import Manifest
from edge_agent.errors import EngineError

QUARANTINE: Final = "quarantine.json"
MARKER: Final = "loading.json"
BOOT_ID: Final = Path("proc/sys/kernel/random/boot_id")
_BOOTS: Final = 2

T = TypeVar("T")

log = structlog.get_logger()


class _Marker(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The load that is under way."""

    engine: str
    digest: str
    boot_id: str


class _Suspect(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An engine and the boots that ended inside its load, each once."""

    engine: str
    boot_ids: tuple[str, ...]


class Quarantine:
    """Remembers which engines ended boots. Files below `state_dir`; None: nothing is remembered."""

    def __init__(self, state_dir: Path | None, boot_id: str) -> None:
        """Look at what the last boot has left, and count it."""
        self._state_dir = state_dir
        self._boot_id = boot_id
        self._suspects: dict[str, _Suspect] = {}
        if state_dir is not None:
            self._suspects = _read(state_dir / QUARANTINE, dict[str, _Suspect]) or {}
            self._count_marker(state_dir)

    def refusal(self, manifest: Manifest) -> EngineError | None:
        """Why this engine must not be loaded; None when it may."""
        suspect = self._suspects.get(manifests.digest(manifest))
        if suspect is None or (boots := len(suspect.boot_ids)) < _BOOTS:
            return None
        return EngineError(
            f"engine {manifest.name} is in quarantine: {boots} boots ended inside its "
            f"load; `edge-agent engines release {manifest.name}` lets it load again",
            reason="ENGINE_QUARANTINED",
            metadata={"engine": manifest.name, "boots": boots},
        )

    def release(self, manifest: Manifest) -> bool:
        """Let an engine load again; False when nothing was held against it. Blocks.

        Raises:
            OSError: it could not be written.
        """
        digest = manifests.digest(manifest)
        suspect = self._suspects.pop(digest, None)
        if suspect is None:
            return False
        try:
            self._keep()
        except OSError:  # a restart would remember it, so it stays
            self._suspects[digest] = suspect
            raise
        return True

    def begin(self, manifest: Manifest) -> None:
        """Mark that a load begins. Blocks until it is on disk.

        Raises:
            OSError: it could not be written.
        """
        if self._state_dir is not None:
            marker = _Marker(manifest.name, manifests.digest(manifest), self._boot_id)
            durable.replace(self._state_dir / MARKER, msgspec.json.encode(marker))

    def end(self) -> None:
        """The load has ended, well or not, and the machine lives. Blocks.

        Raises:
            OSError: the marker could not be removed.
        """
        if self._state_dir is not None:
            durable.remove(self._state_dir / MARKER)

    def _count_marker(self, state_dir: Path) -> None:
        """Whatever goes wrong here, the daemon comes up; a boot is never counted twice."""
        marker = _read(state_dir / MARKER, _Marker)
        if marker is None:
            return
        try:
            if marker.boot_id != self._boot_id:
                self._suspect(marker)
            durable.remove(state_dir / MARKER)
        except OSError as error:
            log.error("quarantine_not_kept", error=str(error))

    def _suspect(self, marker: _Marker) -> None:
        before = self._suspects.get(marker.digest)
        boot_ids = {marker.boot_id, *(before.boot_ids if before else ())}
        self._suspects[marker.digest] = _Suspect(marker.engine, tuple(sorted(boot_ids)))
        log.error("boot_ended_in_load", engine=marker.engine, boots=len(boot_ids))
        self._keep()

    def _keep(self) -> None:
        if self._state_dir is not None:
            durable.replace(self._state_dir / QUARANTINE, msgspec.json.encode(self._suspects))


def read_boot_id(sysroot: Path) -> str:
    """This boot's id; the same text for every boot where the kernel tells none."""
    try:
        return (sysroot / BOOT_ID).read_text().strip()
    except OSError:
        return ""


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        log.error("quarantine_file_set_aside", path=str(path), error=str(error))
        try:
            durable.set_aside(path)
        except OSError as problem:
            log.error("quarantine_file_not_set_aside", path=str(path), error=str(problem))
        return None
