"""How log lines look and which are written. Where they are written is stderr, always.

Prompts, tool arguments, results and keys are never logged.
"""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import msgspec
import structlog

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
        processors=[
            *shared,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(serializer=_encode),
        ],
        logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer),
        cache_logger_on_first_use=True,
    )


def _drop_below_threshold(
    _logger: object, method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    name = "error" if method == "exception" else method
    if logging.getLevelNamesMapping().get(name.upper(), logging.INFO) < _threshold:
        raise structlog.DropEvent
    return event


def _encode(event: object, **_options: object) -> bytes:
    return msgspec.json.encode(event, enc_hook=str)
