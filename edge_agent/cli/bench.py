"""`edge-agent bench`: what the installed engines do on this machine, side by side."""

import argparse
import asyncio
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edge_agent.cli.output import (
    CLIENT_NAME,
    Subparsers,
    add_json,
    add_socket,
    connect,
    print_error,
    print_json,
)
from edge_agent.cli.progress import ProgressBar
from edge_agent.errors import EdgeAgentError, InvalidRequest

if TYPE_CHECKING:
    from edge_agent.measuring.results import Document, EngineResult

_MAX_STREAMS: Final = 64


def register(subparsers: Subparsers) -> None:
    """Add `bench`."""
    parser = subparsers.add_parser(
        "bench",
        help="measure the installed engines",
        description="Measures engines through the running daemon, as a caller meets them: load "
        "time, time to the first token, tokens per second, memory, and energy and temperature "
        "where the machine tells. Engines are loaded one after the other and unloaded again. The "
        "power mode is only read, never changed: to compare modes, set each one yourself and "
        "collect the runs with --append.",
        epilog="example: edge-agent bench --rounds 5 --append bench.json --svg bench.svg",
    )
    parser.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="NAME",
        help="measure this one; may be repeated (default: all that are installed)",
    )
    for option, default, most, meaning in (
        ("--rounds", 3, 100, "how often everything is measured; results are medians"),
        ("--streams", 4, _MAX_STREAMS, "callers at once, beside one alone"),
        ("--max-output-tokens", 128, 1 << 20, "the longest answer, and what speed is taken from"),
    ):
        kind = _between(2 if option == "--max-output-tokens" else 1, most)
        parser.add_argument(
            option, type=kind, default=default, metavar="N", help=f"{meaning} (default: {default})"
        )
    parser.add_argument(
        "--append",
        type=Path,
        metavar="FILE",
        help="add the results to those in FILE, and show them all",
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the results as bars")
    parser.add_argument(
        "--sysroot",
        type=Path,
        default=Path("/"),
        metavar="DIR",
        help="read /proc, /sys, /etc and /var below DIR (default: /)",
    )
    add_socket(parser)
    add_json(parser)
    parser.set_defaults(handler=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    """Measure, show, and keep; 1 where an engine could not be measured."""
    from edge_agent.measuring.bench import Target, measure
    from edge_agent.measuring.results import BenchSettings, Document

    kept = _read(args.append) if args.append else Document()
    if args.svg and not args.svg.absolute().parent.is_dir():
        raise InvalidRequest.field("--svg", f"{args.svg.parent} is no directory")
    with connect(args) as client:
        address = client.address
    settings = BenchSettings(
        rounds=args.rounds, streams=args.streams, max_output_tokens=args.max_output_tokens
    )
    target = Target(address, CLIENT_NAME, tuple(args.engine), settings, args.sysroot.absolute())
    session = _Session(args, kept)
    try:
        asyncio.run(measure(target, session))
    finally:
        session.end()
    return 1 if session.failures else 0


class _Session:
    """Shows how far it is, and keeps what is measured as soon as it is."""

    def __init__(self, args: argparse.Namespace, kept: "Document") -> None:
        self._args = args
        self._kept = kept
        self._bar = ProgressBar("bench")
        self._notes: list[str] = []
        self._new: list[EngineResult] = []
        self.failures: list[EdgeAgentError] = []

    def progress(self, fraction: float, doing: str) -> None:
        self._bar.update(fraction, doing)

    def note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    def result(self, result: "EngineResult") -> None:
        self._new.append(result)
        if self._args.append:
            from edge_agent.measuring.results import encode_document

            _write(self._args.append, encode_document(self._document()))

    def failure(self, engine: str, error: EdgeAgentError) -> None:
        self.note(f"{engine} could not be measured")
        self.failures.append(error)

    def end(self) -> None:
        """Everything that was measured, also when the rest was not to be."""
        self._bar.close()
        document = self._document()
        if self._new and self._args.svg:
            from edge_agent.measuring.chart import draw

            _write(self._args.svg, draw(document.results).encode())
        if self._new and self._args.json:
            print_json(document)
        elif self._new:
            from edge_agent.measuring.table import describe

            columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            for line in describe(document.results, columns=columns):
                print(line)
        sys.stdout.flush()
        for text in self._notes if self._new or self.failures else ():
            print(f"note: {text}", file=sys.stderr)
        for error in self.failures:
            print_error(error, as_json=self._args.json)

    def _document(self) -> "Document":
        from edge_agent.measuring.results import Document

        return Document(results=(*self._kept.results, *self._new))


def _read(path: Path) -> "Document":
    """What is in the file by now; nothing where there is none yet."""
    from edge_agent.measuring.results import Document, decode_document

    try:
        return decode_document(path.read_bytes())
    except FileNotFoundError:
        if not path.absolute().parent.is_dir():
            raise InvalidRequest.field("--append", f"{path.parent} is no directory") from None
        return Document()
    except OSError as error:
        raise InvalidRequest.field("--append", f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidRequest.field("--append", f"{path} holds no results: {error}") from error


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing."""
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        written.write_bytes(content)
        written.replace(path)
    except OSError as error:
        written.unlink(missing_ok=True)
        raise InvalidRequest.field("file", f"{path}: {error.strerror}") from error


def _between(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value}, must be {least} to {most}")
        return value

    parse.__name__ = "whole number"  # argparse names it where the text is none
    return parse
