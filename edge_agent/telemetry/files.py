"""Small files of procfs, sysfs and /etc, read below a root in one bounded, non-blocking way.

Paths are relative to the root, as in "proc/meminfo"; a reading's source is the path on the machine
that the root stands for.
"""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from edge_agent.telemetry.reading import Reading, failed, ok, unsupported

_MAX_BYTES: Final = 64 << 10
_LINE_CHARACTERS: Final = 4096
_ABSENT: Final = frozenset(
    {
        errno.EAGAIN,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ENODEV,
        errno.ENXIO,
        errno.EOPNOTSUPP,
        errno.ENODATA,
    }
)
"""What a kernel says of something that this machine lacks or has switched off: EAGAIN is a thermal
zone whose part of the chip has no power."""
_INTEGER: Final = re.compile(r"-?[0-9]{1,18}")
_NUMBERS: Final = re.compile(r"([0-9]+)")


def read_text(sysroot: Path, path: str) -> Reading[str]:
    """The content without surrounding white space and NULs; bytes that are no UTF-8 are replaced.

    Never waits: a pipe in the file's place is as good as empty.
    """
    source = f"/{path}"
    try:
        # The number is closed below; a file object would add two system calls to every sample.
        number = _open(sysroot / path, os.O_RDONLY)
        try:
            raw = _read_all(number)
        finally:
            os.close(number)
    except OSError as error:
        reason = error.strerror or str(error)
        return (unsupported if error.errno in _ABSENT else failed)(source, reason)
    if len(raw) > _MAX_BYTES:
        return failed(source, f"larger than {_MAX_BYTES} bytes")
    return ok(raw.decode("utf-8", "replace").strip("\0 \t\r\n"), source)


def read_int(sysroot: Path, path: str) -> Reading[int]:
    """The one whole number that the file holds."""
    return read_text(sysroot, path).parsed(parse_int)


def parse_int(text: str) -> int | None:
    """A whole number in plain digits that fits 64 bits; else None."""
    return int(text) if _INTEGER.fullmatch(text) else None


def names_in(sysroot: Path, directory: str) -> tuple[str, ...]:
    """What a directory holds, with numbers in numeric order; nothing where there is none."""
    try:
        found = [entry.name for entry in (sysroot / directory).iterdir()]
    except OSError:
        return ()
    return tuple(sorted(found, key=_numerically))


def read_lines(sysroot: Path, path: str) -> Iterator[str]:
    """The lines of a large text file without their ends, longer ones in pieces.

    Raises:
        OSError: it can't be read.
    """
    with open(  # pathlib takes no opener
        sysroot / path, encoding="utf-8", errors="replace", newline="\n", opener=_open
    ) as file:
        while line := file.readline(_LINE_CHARACTERS):
            yield line.rstrip("\n")


def _open(path: str | Path, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _numerically(name: str) -> tuple[tuple[int, str], ...]:
    parts = _NUMBERS.split(name)
    return tuple(
        (int(part[:18]), "") if part.isascii() and part.isdigit() else (-1, part) for part in parts
    )


def _read_all(number: int) -> bytes:
    raw = b""
    while len(raw) <= _MAX_BYTES:
        more = os.read(number, _MAX_BYTES + 1 - len(raw))
        if not more:
            break
        raw += more
    return raw
