"""Text out of a JSON string while it is still being written. Pure."""

import re

_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_UNICODE = re.compile(r"\\u([0-9a-fA-F]{0,4})")
_DIGITS = 4
_PLAIN = re.compile(r'[^"\\]+')
_HIGH_SURROGATE = range(0xD800, 0xDC00)
_LOW_SURROGATE = range(0xDC00, 0xE000)
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class JsonStringReader:
    """Decodes the JSON string that starts after an opening quote; stops at the closing one."""

    def __init__(self) -> None:
        """Start right after the opening quote."""
        self._pending = ""
        self.closed = False

    def feed(self, text: str) -> str:
        """The characters that `text` completes; an escape that is cut is kept for later."""
        pending = self._pending + text
        out: list[str] = []
        at = 0
        while at < len(pending) and not self.closed:
            if plain := _PLAIN.match(pending, at):
                out.append(plain.group())
                at = plain.end()
            elif pending[at] == '"':
                self.closed = True
            else:
                escape = _read_escape(pending, at)
                if escape is None:
                    break
                character, at = escape
                out.append(character)
        self._pending = "" if self.closed else pending[at:]
        return "".join(out)


def _read_escape(text: str, at: int) -> tuple[str, int] | None:
    """The character of the escape at `at` and where it ends; None while it is incomplete."""
    if at + 1 >= len(text):
        return None
    if text[at + 1] != "u":
        return _ESCAPES.get(text[at + 1], _REPLACEMENT), at + 2
    unit, end = _read_unit(text, at)
    if unit is None:
        return None if end == len(text) else (_REPLACEMENT, end)
    if unit not in _HIGH_SURROGATE:
        return (_REPLACEMENT if unit in _LOW_SURROGATE else chr(unit)), end
    low, low_end = _read_unit(text, end)
    if low is None or low not in _LOW_SURROGATE:
        return None if low is None and low_end == len(text) else (_REPLACEMENT, end)
    return chr(0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00)), low_end


def _read_unit(text: str, at: int) -> tuple[int | None, int]:
    """The number of the Unicode escape at `at`, None without four digits; and where it ends."""
    found = _UNICODE.match(text, at)
    if found is None:
        return None, len(text) if r"\u".startswith(text[at:]) else at
    digits = found.group(1)
    return (int(digits, 16) if len(digits) == _DIGITS else None), found.end()
