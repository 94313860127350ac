"""Which engines are installed: reads the store's manifests, checks files, removes engines.

What the disk says now is what counts: a manifest is kept in memory, but only for as long as the
file's inode, size and times are those with which it was read. An engine is a directory of the store
with a valid `manifest.json` of the same name; nothing else is ever listed. Installing is
`engines.install`'s.
"""

import contextlib
import os
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_agent.engines import seal, store
from edge_agent.engines.manifest import (
    MANIFEST_NAME,
    NAME,
    FileSpec,
    Manifest,
    decode_manifest,
)
from edge_agent.errors import FieldViolation, ManifestError, NotFound

LOCK_TIMEOUT_S: Final = 30.0
MAX_MANIFEST_BYTES: Final = 1 << 20
_FRESH_NS: Final = 3_000_000_000
"""What changed later than this may change again without a change of its times: file systems count
in ticks of up to 2 s (FAT)."""

_Identity = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BrokenEngine:
    """A directory in the store that is no engine, and why."""

    name: str
    description: str


class Catalogue:
    """The engines below one store directory, which need not exist yet."""

    def __init__(self, root: Path, *, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self.root = root
        self._clock_ns = clock_ns
        self._listed: tuple[_Identity, tuple[str, ...]] | None = None
        self._read: dict[str, tuple[_Identity, Manifest]] = {}

    def list(self) -> tuple[Manifest, ...]:
        """The manifests of all installed engines, by name.

        Raises:
            ManifestError: the store can't be read.
        """
        return self.contents()[0]

    def problems(self) -> tuple[BrokenEngine, ...]:
        """What is in the store and is no engine, by name; hidden names are not reported.

        Raises:
            ManifestError: the store can't be read.
        """
        return self.contents()[1]

    def contents(self) -> tuple[tuple[Manifest, ...], tuple[BrokenEngine, ...]]:
        """What `list` and `problems` say, at one look.

        Raises:
            ManifestError: the store can't be read.
        """
        engines: list[Manifest] = []
        broken: list[BrokenEngine] = []
        names = self._names()
        for name in self._read.keys() - set(names):
            self._read.pop(name, None)
        for name in names:
            try:
                engines.append(self._manifest(name))
            except ManifestError as error:
                if os.path.lexists(self.root / name):  # else it was removed meanwhile
                    broken.append(BrokenEngine(_printable(name), _printable(error.message)))
        return tuple(engines), tuple(broken)

    def get(self, name: str) -> Manifest:
        """The manifest of an installed engine.

        Raises:
            NotFound: names the installed engines.
            ManifestError: it is there, but broken.
        """
        self._require(name)
        return self._manifest(name)

    def directory(self, name: str) -> Path:
        """Where an engine's files are.

        Raises:
            NotFound: names the installed engines.
        """
        self._require(name)
        return self.root / name

    def quick_check(self, name: str) -> tuple[FieldViolation, ...]:
        """Missing files and wrong sizes, without reading the files.

        Raises:
            NotFound: names the installed engines.
            ManifestError: its manifest is broken.
        """
        manifest = self.get(name)
        found = (_check_size(self.root / name, spec) for spec in manifest.files)
        return tuple(violation for violation in found if violation)

    def verify(self, name: str, progress: Callable[[float], None]) -> tuple[FieldViolation, ...]:
        """Files whose size or SHA-256 is not the manifest's; reads every byte.

        What is found also decides whether the next load reads them again (see `seal`).

        Args:
            name: of the engine.
            progress: told the fraction done, 0 to 1.

        Returns:
            One violation for each wrong file, with what is expected and what was found.

        Raises:
            NotFound: names the installed engines.
            ManifestError: its manifest is broken.
        """
        manifest = self.get(name)
        total = sum(spec.size_bytes for spec in manifest.files)
        done = 0

        def advance(size: int) -> None:
            nonlocal done
            done += size
            progress(min(1.0, done / total))

        found = []
        for spec in manifest.files:
            wrong = _check_size(self.root / name, spec)
            if wrong is None:
                wrong = _check_digest(self.root / name, spec, advance)
            else:
                advance(spec.size_bytes)
            if wrong is not None:
                found.append(wrong)
        seal.renew(self.root / name, manifest, right=not found)
        return tuple(found)

    def remove(self, name: str, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        """Remove an engine, broken ones too: it is gone from the list at once, then deleted.

        Raises:
            NotFound: names the installed engines.
            InstallError: the store is busy or can't be written.
        """
        self._require(name)
        with store.locked(self.root, lock_timeout_s):
            self._require(name)
            try:
                store.take_out(self.root, name)
            except OSError as error:
                raise store.failed(self.root, error) from error

    def _require(self, name: str) -> None:
        """Raise unless the store has a directory of that name."""
        if NAME.fullmatch(name) and _is_directory(self.root / name):
            return
        known = ", ".join(manifest.name for manifest in self.list()) or "none"
        raise NotFound(
            f"no engine {name!r} in {self.root}; installed: {known}",
            reason="ENGINE_NOT_FOUND",
            metadata={"engine": name, "store": self.root, "installed": known},
        )

    def _names(self) -> Sequence[str]:
        try:
            identity = self._identity(self.root.stat())
            if self._listed is not None and self._listed[0] == identity:
                return self._listed[1]
            names = sorted(os.listdir(self.root))  # noqa: PTH208 - a third of iterdir's time
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise ManifestError(f"{self.root}: {error.strerror}") from error
        found = tuple(name for name in names if not name.startswith("."))
        self._listed = (identity, found) if identity else None
        return found

    def _manifest(self, name: str) -> Manifest:
        """As `_read`, without reading again what is as it was: every run and every status asks."""
        directory = self.root / name
        identity: _Identity = ()
        with contextlib.suppress(OSError):  # `_read` tells why
            identity = self._identity(os.lstat(directory), os.lstat(directory / MANIFEST_NAME))
        known = self._read.get(name)
        if known is not None and known[0] == identity:
            return known[1]
        manifest = _read(directory)
        if identity:
            self._read[name] = (identity, manifest)
        return manifest

    def _identity(self, *statuses: os.stat_result) -> _Identity:
        """Equal only where nothing has changed; empty, which says nothing, for what is fresh."""
        settled_ns = self._clock_ns() - _FRESH_NS
        found: list[int] = []
        for status in statuses:
            if max(status.st_mtime_ns, status.st_ctime_ns) > settled_ns:
                return ()
            found += (status.st_dev, status.st_ino, status.st_mode, status.st_size)
            found += (status.st_mtime_ns, status.st_ctime_ns)
        return tuple(found)


def _read(directory: Path) -> Manifest:
    """The manifest of one engine's directory.

    Raises:
        ManifestError: names the directory and what is wrong.
    """
    path = directory / MANIFEST_NAME
    if not _is_directory(directory):
        raise ManifestError(f"{directory}: must be a directory")
    if path.is_symlink():
        raise ManifestError(f"{path}: must be a regular file, no link")
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ManifestError(f"{path}: must be a regular file")
            raw = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from error
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = decode_manifest(raw)
    except ManifestError as error:
        raise ManifestError(f"{directory}: {error.message}", metadata=error.metadata) from error
    if manifest.name != directory.name:
        raise ManifestError(f"{path}: name {manifest.name!r}, must be the directory's name")
    return manifest


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe that nobody writes to would hold up the daemon."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _printable(text: str) -> str:
    """A file's name may be no text at all; what is told about it is."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _is_directory(path: Path) -> bool:
    """A directory itself, no link to one: everything of the store lies below the store."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def _check_size(directory: Path, spec: FileSpec) -> FieldViolation | None:
    path = directory / spec.path
    expected = f"expected {spec.size_bytes} bytes"
    try:
        if path.resolve() != directory.resolve() / spec.path:
            return FieldViolation(spec.path, f"{expected}, found a symbolic link")
        status = path.stat()
    except OSError as error:
        return FieldViolation(spec.path, f"{expected}, found: {error.strerror}")
    if not stat.S_ISREG(status.st_mode):
        return FieldViolation(spec.path, f"{expected}, found no regular file")
    if status.st_size != spec.size_bytes:
        return FieldViolation(spec.path, f"{expected}, found {status.st_size}")
    return None


def _check_digest(
    directory: Path, spec: FileSpec, advance: Callable[[int], None]
) -> FieldViolation | None:
    expected = f"expected SHA-256 {spec.sha256}"
    try:
        found = store.hash_file(directory / spec.path, advance)
    except OSError as error:
        return FieldViolation(spec.path, f"{expected}, found: {error.strerror}")
    return None if found == spec.sha256 else FieldViolation(spec.path, f"{expected}, found {found}")
