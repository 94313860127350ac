"""Frames over a stream between the daemon and its child processes.

Each is a big-endian uint32 length and that many bytes. Knows nothing of what is in them. Needs the
standard library alone, since a worker may run in an environment of its own.
"""

import struct
from collections.abc import Iterator

MAX_FRAME_BYTES = 64 * 1024 * 1024
_HEADER = struct.Struct(">I")


def frame(body: bytes) -> bytes:
    """One whole frame.

    Raises:
        ValueError: the body exceeds MAX_FRAME_BYTES.
    """
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"frame of {len(body)} bytes, at most {MAX_FRAME_BYTES}")
    return _HEADER.pack(len(body)) + body


class Framer:
    """Cuts a byte stream into frame bodies; keeps what is incomplete."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies that `data` completes, in order.

        Raises:
            ValueError: a length above MAX_FRAME_BYTES; the stream can't be read further.
        """
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes, at most {MAX_FRAME_BYTES}")
            end = _HEADER.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_HEADER.size : end])
            del self._buffer[:end]
            yield body
