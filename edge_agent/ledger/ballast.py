"""A file that only takes up room, so that there is some to give up when the disk is full."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Final

from edge_agent import durable

FILE_NAME: Final = "ledger.ballast"
_FULL_BYTES: Final = 1 << 20
"""A disk with less than this is taken to be full."""


class Ballast:
    """The file, and what room there is beside it."""

    def __init__(self, directory: Path, size_bytes: int) -> None:
        """Nothing is done yet. A size of 0 keeps no file."""
        self._path = directory / FILE_NAME
        self._size_bytes = size_bytes

    def disk_is_full(self) -> bool:
        """Whether it is the disk that has no room."""
        return self._free_bytes() < _FULL_BYTES

    def has_room(self) -> bool:
        """Whether there is room for more than the ballast."""
        return self._free_bytes() >= 2 * max(self._size_bytes, _FULL_BYTES)

    def take(self) -> bool:
        """Have the file there, if there is room for it; False if there is not. Blocks."""
        if not self._size_bytes or self._is_there():
            return True
        if not self.has_room():
            return False
        try:
            with self._path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._size_bytes)
                os.fsync(file.fileno())
        except OSError:
            self.give_up()
            return False
        return True

    def give_up(self) -> bool:
        """Remove the file; whether it was there. Blocks."""
        was_there = self._path.exists()
        with contextlib.suppress(OSError):
            durable.remove(self._path)
        return was_there

    def _is_there(self) -> bool:
        return self._path.exists() and self._path.stat().st_size == self._size_bytes

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._path.parent).free
