"""A disk that loses power: every write is recorded, and the files after a cut at any of them made.

What was synced is certain. Of each later write nobody knows whether it has reached the disk, wholly
or in part of its sectors, and a later one may have where an earlier one has not. The model is kind
in three ways: files that are removed stay removed, the disk does not lie about syncs, and there is
no shared memory (the connection locks the file for itself).
"""

import contextlib
import enum
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import apsw

NAME = "recorded"
SECTOR_BYTES = 512


class Fate(enum.Enum):
    """What becomes of writes that were not synced."""

    LOST = "lost"
    WRITTEN = "written"
    ANY = "any"  # each by chance: written, lost, or some of its sectors


@dataclass(frozen=True)
class Write:
    file: str
    at: int
    content: bytes


@dataclass(frozen=True)
class Truncate:
    file: str
    size: int


@dataclass(frozen=True)
class Sync:
    file: str


@dataclass(frozen=True)
class Remove:
    file: str


@dataclass(frozen=True)
class Acked:
    """Not of the disk: from here on, somebody relies on this."""

    what: object


Entry = Write | Truncate | Sync | Remove | Acked


@dataclass
class Disk:
    """What has happened, in order; and the state of the disk at a place that moves forward."""

    log: list[Entry] = field(default_factory=list)
    _at: int = 0
    _synced: dict[str, bytearray] = field(default_factory=dict)
    _unsure: list[Write | Truncate] = field(default_factory=list)
    acked: list[object] = field(default_factory=list)

    def advance(self, upto: int) -> None:
        """Go on to before the entry of this number."""
        for entry in self.log[self._at : upto]:
            match entry:
                case Acked(what):
                    self.acked.append(what)
                case Sync(file):
                    self._synced.setdefault(file, bytearray())
                    for change in self._unsure:
                        if change.file == file:
                            _apply(self._synced, change)
                    self._unsure = [each for each in self._unsure if each.file != file]
                case Remove(file):
                    self._synced.pop(file, None)
                    self._unsure = [each for each in self._unsure if each.file != file]
                case Write() | Truncate():
                    self._unsure.append(entry)
        self._at = upto

    def cut(self, fate: Fate, chance: random.Random) -> dict[str, bytes]:
        """The files that are found after the power went here."""
        files = {name: bytearray(content) for name, content in self._synced.items()}
        for change in self._unsure:
            files.setdefault(change.file, bytearray())
            if fate is Fate.WRITTEN or (fate is Fate.ANY and chance.random() < 0.4):
                _apply(files, change)
            elif fate is Fate.ANY and isinstance(change, Write) and chance.random() < 0.5:
                for start in range(0, len(change.content), SECTOR_BYTES):
                    if chance.random() < 0.5:
                        sector = change.content[start : start + SECTOR_BYTES]
                        _apply(files, Write(change.file, change.at + start, sector))
        return {name: bytes(content) for name, content in files.items()}


def _apply(files: dict[str, bytearray], change: Write | Truncate) -> None:
    content = files.setdefault(change.file, bytearray())
    match change:
        case Write(_, at, new):
            if len(content) < at + len(new):
                content.extend(bytes(at + len(new) - len(content)))
            content[at : at + len(new)] = new
        case Truncate(_, size):
            del content[size:]


class _RecordedFile(apsw.VFSFile):
    def __init__(self, disk: Disk, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        self._disk = disk
        self._name = Path(path).name if path else ""
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        if self._name:
            self._disk.log.append(Write(self._name, offset, bytes(data)))
        super().xWrite(data, offset)

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        self._disk.log.append(Truncate(self._name, newsize))
        super().xTruncate(newsize)

    def xSync(self, flags: int) -> None:  # noqa: N802
        super().xSync(flags)
        self._disk.log.append(Sync(self._name))


class _RecordingVfs(apsw.VFS):
    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        super().__init__(NAME, "")

    def xOpen(  # noqa: N802
        self, name: str | apsw.URIFilename | None, flags: list[int]
    ) -> apsw.VFSFile:
        return _RecordedFile(self._disk, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802, FBT001
        self._disk.log.append(Remove(Path(filename).name))
        super().xDelete(filename, syncdir)


@contextlib.contextmanager
def recorded() -> Iterator[Disk]:
    """A VFS named NAME, and the disk that it writes down."""
    disk = Disk()
    vfs = _RecordingVfs(disk)
    try:
        yield disk
    finally:
        vfs.unregister()
