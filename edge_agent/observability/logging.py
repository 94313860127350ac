"""How log lines look and which are written. Where they are written is stderr, always.

Prompts, tool arguments, results and keys are never logged.
"""

import logging
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any

import msgspec
import structlog

_LEVELS = {name.lower(): level for name, level in logging.getLevelNamesMapping().items()}
_encode = msgspec.json.Encoder(enc_hook=str).encode
_threshold = logging.INFO


def set_level(level: str) -> None:
    """Write lines of this level (debug, info, warning, error) and above from now on."""
    global _threshold  # noqa: PLW0603 - the one switch that a reload turns
    _threshold = logging.getLevelNamesMapping()[level.upper()]


def configure(level: str, style: str) -> None:
    """Set up logging for this process; `style` is json, console, or auto (console on a tty)."""
    set_level(level)
    console = style == "console" or (style == "auto" and sys.stderr.isatty())
    shared: list[Any] = [
        _drop_below_threshold,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=not console),
    ]
    if console:
        structlog.configure(
            processors=[*shared, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())],
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
            cache_logger_on_first_use=True,
        )
        return
    structlog.configure(
        wrapper_class=_JsonLogger,
        processors=[],
        logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer),
        cache_logger_on_first_use=True,
    )


def _drop_below_threshold(
    _logger: object, method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    name = "error" if method == "exception" else method
    if _LEVELS.get(name, logging.INFO) < _threshold:
        raise structlog.DropEvent
    return event


class _JsonLogger(structlog.make_filtering_bound_logger(logging.NOTSET)):  # type: ignore[misc]
    """What structlog's chain of processors does, in one place: every call writes a line."""

    def _proxy_to_logger(self, method: str, event: str | None = None, /, **fields: Any) -> None:
        if _LEVELS[method] < _threshold:
            return
        if "exc_info" in fields:
            fields = dict(structlog.processors.format_exc_info(self, method, fields))
        line = {**self._context, **fields, "event": event, "level": method}
        line["timestamp"] = datetime.now(UTC)
        self._logger.msg(_encode(line))
