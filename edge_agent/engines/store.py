"""The engine store as a directory: its lock, its hidden names, and changes that are all or nothing.

Knows directories and bytes, not what an engine is. Names that start with a dot are never engines:
`.lock`, and `.KIND-NAME-TOKEN` for what is being installed, removed or replaced. Whoever changes
the store holds the lock; readers need none, since a change appears by one rename.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from edge_agent import durable
from edge_agent.errors import InstallError

LOCK_NAME: Final = ".lock"
INSTALLING: Final = ".installing-"
REMOVING: Final = ".removing-"
REPLACED: Final = ".replaced-"

_CHUNK_BYTES: Final = 1 << 20
_LOCK_POLL_S: Final = 0.1
_TOKEN_BYTES: Final = 4
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_NO_EXCHANGE: Final = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(root: Path, timeout_s: float) -> Iterator[None]:
    """Hold the store's lock, made with the store where there is none, and clear what a crash left.

    Raises:
        InstallError: STORE_BUSY after `timeout_s`, with the holder's process id, or the store
            can't be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        fd = os.open(root / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise failed(root, error) from error
    try:
        _wait(fd, root, timeout_s)
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise failed(root, error) from error
        clean(root)
        yield
    finally:
        os.close(fd)  # releases the lock, as the end of the process would


def _wait(fd: int, root: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
                raise InstallError(
                    f"{root}: another install or remove holds the store (process {holder}), "
                    f"waited {timeout_s:g} s",
                    reason="STORE_BUSY",
                    metadata={"store": root, "process": holder, "waited_s": timeout_s},
                ) from error
            time.sleep(_LOCK_POLL_S)
        else:
            return


def hidden(root: Path, kind: str, name: str) -> Path:
    """A new hidden path for the engine `name`."""
    return root / f"{kind}{name}-{secrets.token_hex(_TOKEN_BYTES)}"


def clean(root: Path) -> None:
    """Undo what a killed install or remove has left. Call with the lock held.

    An engine that had been moved aside and never replaced comes back.
    """
    for path in root.glob(f"{REPLACED}*"):
        name = path.name.removeprefix(REPLACED)[: -2 * _TOKEN_BYTES - 1]
        if not os.path.lexists(root / name):
            path.rename(root / name)
            durable.sync(root)
    for kind in (INSTALLING, REMOVING, REPLACED):
        for path in root.glob(f"{kind}*"):
            discard(path)


def discard(path: Path) -> None:
    """Delete a tree; what can't be deleted stays hidden until the next `clean`."""
    shutil.rmtree(path, ignore_errors=True)


def put_in_place(root: Path, staged: Path, name: str) -> None:
    """Make the directory `staged` the engine `name`, at once. Call with the lock held.

    A present engine is exchanged in one step. Where the file system can't do that it is moved
    aside first; a crash between the two steps is undone by the next `clean`.

    Raises:
        OSError: as the file system says; a present engine is still there.
    """
    target = root / name
    if not os.path.lexists(target):
        staged.rename(target)
        durable.sync(root)
        return
    try:
        exchange(staged, target)
        durable.sync(root)
        discard(staged)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        aside = hidden(root, REPLACED, name)
        target.rename(aside)
        staged.rename(target)
        durable.sync(root)
        discard(aside)


def take_out(root: Path, name: str) -> None:
    """Remove the engine `name`: hidden at once, then deleted. Call with the lock held.

    Raises:
        OSError: as the file system says.
    """
    aside = hidden(root, REMOVING, name)
    (root / name).rename(aside)
    durable.sync(root)
    discard(aside)


def exchange(one: Path, other: Path) -> None:
    """Swap two paths atomically: renameat2(2) with RENAME_EXCHANGE, which Python has no call for.

    Raises:
        OSError: EINVAL, ENOSYS or EOPNOTSUPP where kernel or file system can't.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    paths = os.fsencode(one), os.fsencode(other)
    if libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one), None, str(other))


def copy_file(
    source: BinaryIO, target: Path, limit_bytes: int, advance: Callable[[int], None]
) -> tuple[int, str]:
    """Write `source` to the new file `target` and fsync it.

    Args:
        source: read from where it stands.
        target: its directory is there already.
        limit_bytes: reading stops one byte after.
        advance: told the number of bytes of each piece.

    Returns:
        Size in bytes and SHA-256 of what was written.

    Raises:
        OSError: as the file system says.
    """
    digest, size = hashlib.sha256(), 0
    with target.open("xb") as file:
        while piece := source.read(min(_CHUNK_BYTES, limit_bytes + 1 - size)):
            file.write(piece)
            digest.update(piece)
            size += len(piece)
            advance(len(piece))
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def write_file(path: Path, content: bytes) -> None:
    """Write the new file `path` and fsync it.

    Raises:
        OSError: as the file system says.
    """
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def hash_file(path: Path, advance: Callable[[int], None]) -> str:
    """SHA-256 of a file; `advance` is told the number of bytes of each piece.

    Raises:
        OSError: as the file system says.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def failed(path: Path, error: OSError) -> InstallError:
    """An operating system error as ours; a full disk has a reason of its own."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    where = error.filename or path
    return InstallError(
        f"{where}: {error.strerror or error}",
        reason="NO_SPACE" if full else None,
        metadata={"path": where},
    )
