"""`edge-agent doctor`: what this machine is and what is missing."""

import argparse
import os
import shutil
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edge_agent import __version__
from edge_agent.cli.output import Subparsers, absolute, add_json, print_json

if TYPE_CHECKING:
    from edge_agent.doctor import Finding


_MARKS: Final = {"ok": "ok", "warn": "warn", "fail": "FAIL", "unknown": "?"}
_WORDS: Final = {"fail": "failure", "warn": "warning", "unknown": "unknown"}
_COLOURS: Final = {"ok": "32", "warn": "33", "fail": "31;1", "unknown": "36"}
_MARK_CELLS: Final = max(map(len, _MARKS.values()))
_NARROWEST: Final = 40


def register(subparsers: Subparsers) -> None:
    """Add `doctor`."""
    parser = subparsers.add_parser(
        "doctor",
        help="what this machine is and what is missing",
        description="Looks at the machine, its GPU, the configuration and the engines, and says "
        "for each line that is not ok what to do about it. Changes nothing. Exit code 1 if "
        "something that the configuration needs is missing.",
        epilog="example: edge-agent doctor --config /etc/edge-agent/config.yaml",
    )
    for option, metavar, meaning in (
        ("--config", "FILE", "the configuration (default: as for serve)"),
        ("--engines-dir", "DIR", "the engine store (default: engines_dir of the configuration)"),
        ("--sysroot", "DIR", "read /proc, /sys, /etc, /dev, /run and /var below DIR (default: /)"),
    ):
        parser.add_argument(option, type=absolute, metavar=metavar, help=meaning)
    add_json(parser)
    parser.set_defaults(handler=run_doctor)


def run_doctor(args: argparse.Namespace) -> int:
    """Look and tell."""
    from edge_agent.doctor import FindingStatus, Question, examine, worst

    sysroot = args.sysroot or Path("/")
    findings = examine(Question(os.environ, sysroot, args.config, args.engines_dir))
    status = worst(findings)
    if args.json:
        document = {"version": __version__, "sysroot": str(sysroot), "status": status}
        print_json({**document, "findings": findings})
    else:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        for line in describe(findings, columns=columns):
            print(line)
    return 1 if status is FindingStatus.FAIL else 0


def describe(findings: "tuple[Finding, ...]", *, columns: int | None) -> list[str]:
    """One aligned line for each finding and one for its hint; `columns` None: no terminal.

    On a terminal marks are coloured and long values are wrapped.
    """
    indent = max(len(finding.name) for finding in findings) + _MARK_CELLS + 4
    lines = []
    for finding in findings:
        mark = _MARKS[finding.status].ljust(_MARK_CELLS)
        if columns is not None:
            mark = f"\x1b[{_COLOURS[finding.status]}m{mark}\x1b[0m"
        texts = _wrapped(finding.value, columns, indent)
        lines.append(f"{mark}  {finding.name.ljust(indent - _MARK_CELLS - 4)}  {texts[0]}".rstrip())
        hint = _wrapped(f"-> {finding.hint}", columns, indent) if finding.hint else []
        lines += [" " * indent + text for text in [*texts[1:], *hint]]
    lines.append(_summary(findings))
    return lines


def _wrapped(text: str, columns: int | None, indent: int) -> list[str]:
    if columns is None or columns - indent < _NARROWEST:
        return text.splitlines() or [""]
    width = columns - indent
    return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False) or [""]


def _summary(findings: "tuple[Finding, ...]") -> str:
    counts = Counter(str(finding.status) for finding in findings)
    found = ", ".join(
        f"{counts[status]} {word}{'s' if counts[status] > 1 and word != 'unknown' else ''}"
        for status, word in _WORDS.items()
        if counts[status]
    )
    if not found:
        return "everything is ok"
    missing = "something" if counts["fail"] else "nothing"
    return f"{found}: {missing} that the configuration needs is missing"
