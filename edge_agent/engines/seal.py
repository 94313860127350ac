"""Whether an engine's files are still the installed ones, mostly without reading them.

Owns `.seal.json` beside the manifest: what each file looked like (size, time of modification, time
of any change) when its bytes were last known to be right. A file that looks otherwise is read and
compared, so a store that was copied or restored costs one reading. Bytes that a disk loses without
a write are found by `engines verify` only. The standard library and msgspec, since it runs in the
worker: reading gigabytes is nothing for the daemon.
"""

import contextlib
import os
from pathlib import Path
from typing import Final

import msgspec

from edge_agent.engines import store
from edge_agent.engines.manifest import SEAL_NAME, Manifest
from edge_agent.errors import FieldViolation, LoadFailed

_MAX_BYTES: Final = 1 << 20


class _Look(msgspec.Struct, frozen=True, array_like=True):
    """What can be seen of a file without reading it."""

    size_bytes: int
    modified_ns: int
    changed_ns: int


def write(directory: Path, manifest: Manifest) -> None:
    """Note how the engine's files look now; their bytes have just been read and are right.

    Raises:
        OSError: as the file system says.
    """
    looks = {spec.path: _look(directory / spec.path) for spec in manifest.files}
    partial = directory / f"{SEAL_NAME}.{os.getpid()}"
    try:
        partial.write_bytes(msgspec.json.encode(looks))
        partial.replace(directory / SEAL_NAME)
    finally:
        partial.unlink(missing_ok=True)


def renew(directory: Path, manifest: Manifest, *, right: bool) -> None:
    """After all files were read: note how they look, or that they are to be read again."""
    with contextlib.suppress(OSError):  # a store that can't be written is read every time
        if right:
            write(directory, manifest)
        else:
            (directory / SEAL_NAME).unlink(missing_ok=True)


def require_unchanged(directory: Path, manifest: Manifest) -> None:
    """Read the files that look otherwise than when they were last read, and compare them. Blocks.

    Raises:
        LoadFailed: reason ENGINE_FILES_WRONG, with each wrong file, and how it was noticed.
    """
    known, wrong, read = _read(directory), [], False
    for spec in manifest.files:
        path, expected = directory / spec.path, f"expected SHA-256 {spec.sha256}"
        try:
            if known.get(spec.path) == _look(path):
                continue
            read = True
            found = store.hash_file(path, lambda _size: None)
        except OSError as error:
            wrong.append(FieldViolation(spec.path, f"{expected}, found: {error.strerror}"))
            continue
        if found != spec.sha256:
            wrong.append(FieldViolation(spec.path, f"{expected}, found {found}"))
    if wrong:
        files = "; ".join(f"{each.field}: {each.description}" for each in wrong)
        raise LoadFailed(
            f"engine {manifest.name}: {files}; install it again (a file is read and compared "
            "before a load when its size or times are not those of the last reading; "
            f"`edge-agent engines verify {manifest.name}` compares every file)",
            reason="ENGINE_FILES_WRONG",
            metadata={"engine": manifest.name, "files": files},
        )
    if read:
        renew(directory, manifest, right=True)


def _look(path: Path) -> _Look:
    found = path.stat()
    return _Look(found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _read(directory: Path) -> dict[str, _Look]:
    """What was noted; nothing where that can't be read."""
    try:
        with (directory / SEAL_NAME).open("rb") as file:
            return msgspec.json.decode(file.read(_MAX_BYTES), type=dict[str, _Look])
    except (OSError, msgspec.DecodeError, RecursionError):
        return {}
