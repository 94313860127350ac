"""Files that are replaced whole or not at all, also when the power fails."""

import os
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Put `content` in the file's place; it is on disk when this returns. Blocks.

    Raises:
        OSError: as the file system says; the old content is still there.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    settle(partial, path)


def settle(partial: Path, path: Path) -> None:
    """Put a file that is written in the place of another; it is on disk when this returns. Blocks.

    Raises:
        OSError: as the file system says; the old content is still there.
    """
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Remove the file, if it is there; it does not come back. Blocks.

    Raises:
        OSError: as the file system says.
    """
    path.unlink(missing_ok=True)
    sync(path.parent)


def set_aside(path: Path) -> None:
    """Take a file that can't be read out of the way, whole, for people to look at.

    Raises:
        OSError: as the file system says.
    """
    path.replace(path.with_name(f"{path.name}.unreadable"))


def sync(directory: Path) -> None:
    """The directory's entries are on disk when this returns.

    Raises:
        OSError: as the file system says.
    """
    number = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
