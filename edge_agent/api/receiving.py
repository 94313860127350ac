"""From bytes to request messages, before anything else looks at them.

Owns the size limit, and what a caller learns about bytes that are no message: gRPC by itself would
answer UNKNOWN, without details. Knows no message in particular.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

from edge_agent.errors import FieldViolation, InvalidRequest

Deserialize = Callable[[bytes], Any]

_MAX_SEARCHED_FIELDS: Final = 10_000
_VARINT, _FIXED64, _DELIMITED, _GROUP, _GROUP_END, _FIXED32 = range(6)
_FIXED_BYTES: Final = {_FIXED64: 8, _FIXED32: 4, _GROUP: 0, _GROUP_END: 0}
_MAX_VARINT_BITS: Final = 63


def receive(raw: bytes, deserialize: Deserialize, limit_bytes: int) -> Any:
    """The message in `raw`; what is too large is not even looked into.

    Raises:
        InvalidRequest: REQUEST_TOO_LARGE with both numbers, MALFORMED_MESSAGE, or the field whose
            text is not UTF-8.
    """
    if len(raw) > limit_bytes:
        raise InvalidRequest(
            f"the request has {len(raw)} bytes, at most {limit_bytes} allowed "
            "(runs.max_request_size)",
            reason="REQUEST_TOO_LARGE",
            metadata={"size_bytes": len(raw), "limit_bytes": limit_bytes},
        )
    try:
        return deserialize(raw)
    except DecodeError as error:
        kind = getattr(deserialize, "__self__", None)
        descriptor = getattr(kind, "DESCRIPTOR", None)
        raise _malformed(raw, descriptor) from error


class Received:
    """A stream of requests as messages."""

    def __init__(
        self,
        raw: AsyncIterator[bytes],
        deserialize: Deserialize,
        limit_bytes: Callable[[], int],
    ) -> None:
        self._raw = raw
        self._deserialize = deserialize
        self._limit_bytes = limit_bytes

    def __aiter__(self) -> "Received":
        return self

    async def __anext__(self) -> Any:
        """The next message. Raises as `receive` does."""
        return receive(await anext(self._raw), self._deserialize, self._limit_bytes())


def _malformed(raw: bytes, descriptor: Descriptor | None) -> InvalidRequest:
    wrong = None
    if descriptor is not None:
        try:
            wrong = _Search().wrong_text(raw, descriptor)
        except (ValueError, IndexError):  # the bytes are no message, or too many to look through
            wrong = None
    if wrong is not None:
        return InvalidRequest.field(wrong.field, wrong.description)
    name = descriptor.full_name if descriptor is not None else "the message"
    return InvalidRequest(
        f"the {len(raw)} bytes of the request are no {name}",
        reason="MALFORMED_MESSAGE",
        metadata={"message": name, "size_bytes": len(raw)},
    )


class _Search:
    """Finds the field whose text is not UTF-8, as C++ and other languages happily send it."""

    def __init__(self) -> None:
        self._left = _MAX_SEARCHED_FIELDS

    def wrong_text(
        self, raw: bytes, descriptor: Descriptor, prefix: str = ""
    ) -> FieldViolation | None:
        """The first such field; raises ValueError or IndexError where the bytes are no message."""
        seen: dict[int, int] = {}
        for number, content in self._delimited(raw):
            field = descriptor.fields_by_number.get(number)
            if field is None:
                continue
            index = seen[number] = seen.get(number, -1) + 1
            path = f"{prefix}{field.name}" + (f"[{index}]" if field.is_repeated else "")
            if field.type == FieldDescriptor.TYPE_STRING:
                problem = _not_utf8(content)
                if problem is not None:
                    return FieldViolation(path, problem)
            elif field.message_type is not None:
                found = self.wrong_text(content, field.message_type, f"{path}.")
                if found is not None:
                    return found
        return None

    def _delimited(self, raw: bytes) -> Iterator[tuple[int, bytes]]:
        """Number and content of each length-delimited field."""
        at = 0
        while at < len(raw):
            self._left -= 1
            if self._left < 0:
                raise ValueError("too many fields")
            key, at = _varint(raw, at)
            kind = key & 7
            if kind == _VARINT:
                _, at = _varint(raw, at)
            elif kind == _DELIMITED:
                size, at = _varint(raw, at)
                yield key >> 3, raw[at : at + size]
                at += size
            else:
                at += _FIXED_BYTES.get(kind, len(raw))


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, _MAX_VARINT_BITS + 1, 7):
        value |= (raw[at] & 0x7F) << shift
        at += 1
        if raw[at - 1] < 0x80:  # noqa: PLR2004 - the last byte of a varint
            return value, at
    raise ValueError("a varint of more than 10 bytes")


def _not_utf8(content: bytes) -> str | None:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        wrong = content[error.start : error.end].hex(" ")
        return f"is not UTF-8: {wrong} at byte {error.start} of {len(content)}"
    return None
