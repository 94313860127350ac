"""Log lines: one JSON object each on stderr, and a level that a reload can turn."""

import json
import subprocess
import sys
from typing import Any

import pytest

PRELUDE = """
import structlog
from edge_agent.observability import logging
log = structlog.get_logger()
"""


def run(script: str) -> str:
    """What a process of its own writes to stderr; nothing to stdout."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script], capture_output=True, check=True, timeout=30
    )
    assert done.stdout == b""
    return done.stderr.decode()


def lines(script: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(script).splitlines()]


def test_a_line_is_one_json_object_with_its_level_and_time():
    (line,) = lines("""
logging.configure("info", "json")
log.info("engine_loaded", engine="tiny", load_s=1.5, slots=2, text="two\\nlines")
""")
    at = line.pop("timestamp")
    assert line == {
        "event": "engine_loaded",
        "level": "info",
        "engine": "tiny",
        "load_s": 1.5,
        "slots": 2,
        "text": "two\nlines",
    }
    assert at.endswith("Z")


def test_auto_is_json_where_nobody_watches():
    (line,) = lines('logging.configure("info", "auto"); log.info("daemon_ready")')
    assert line["event"] == "daemon_ready"


def test_console_is_for_people():
    text = run('logging.configure("info", "console"); log.info("daemon_ready", pid=7)')
    assert "daemon_ready" in text
    assert "pid=7" in text
    assert not text.startswith("{")


def test_any_value_can_be_logged():
    (line,) = lines("""
from pathlib import Path
logging.configure("info", "json")
log.info("x", path=Path("/a"), error=ValueError("no"), raw=b"abc")
""")
    assert (line["path"], line["error"]) == ("/a", "no")


def test_an_exception_is_one_line_with_its_traceback():
    (line,) = lines("""
logging.configure("error", "json")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("run_crashed", run="r1")
""")
    assert (line["event"], line["level"]) == ("run_crashed", "error")
    assert "ZeroDivisionError" in line["exception"]


@pytest.mark.parametrize(
    ("level", "written"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_a_level_lets_through_itself_and_above(level: str, written: list[str]):
    found = lines(f"""
logging.configure("{level}", "json")
for name in ("debug", "info", "warning", "error"):
    getattr(log, name)("x")
""")
    assert [line["level"] for line in found] == written


def test_the_level_turns_while_the_process_runs_for_loggers_already_in_use():
    found = lines("""
logging.configure("warning", "json")
log.info("one")
log.warning("two")
logging.set_level("debug")
log.debug("three")
logging.set_level("error")
log.warning("four")
""")
    assert [line["event"] for line in found] == ["two", "three"]
