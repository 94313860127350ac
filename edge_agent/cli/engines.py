"""`edge-agent engines`: install, list, show, remove and verify engines in the store on disk.

These work without the daemon, which reads the same store; `show` adds what a running one knows of
the engine's memory. pin, unpin and release are the daemon's. Results go to stdout, progress to
stderr. Errors are raised: `cli.main` prints them.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edge_agent import paths
from edge_agent.cli.output import (
    Subparsers,
    add_json,
    add_socket,
    aligned,
    connect,
    connect_admin,
    print_json,
)
from edge_agent.cli.progress import ProgressBar
from edge_agent.cli.status import engine_state
from edge_agent.core import EngineInfo
from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.install import find_recipe, install
from edge_agent.engines.manifest import Manifest, digest
from edge_agent.errors import EdgeAgentError
from edge_agent.units import MIB, size_text


def register(subparsers: Subparsers) -> None:
    """Add `engines` and what is below it; each leaf sets `handler`, which returns the exit code."""
    parser = subparsers.add_parser(
        "engines",
        help="install, list, show, verify, pin, release and remove engines",
        description="Engines are compiled models in a store on disk, which the daemon reads too. "
        "pin, unpin and release ask the daemon; everything else works without it.",
        epilog="example: edge-agent engines list",
    )
    commands = parser.add_subparsers(dest="engines_command", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], help_text: str) -> Any:
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="the configuration that names the store (default: as for serve)",
        )
        command.add_argument(
            "--store",
            type=Path,
            metavar="DIR",
            help="the engine store (default: engines_dir of the configuration, "
            "else 'engines' below the state directory)",
        )
        add_json(command)
        command.set_defaults(handler=run)
        return command

    known = ", ".join(sorted(path.stem for path in paths.recipes_dir().glob("*.yaml"))) or "none"
    add("install", run_install, f"obtain an engine from its recipe (known: {known})").add_argument(
        "recipe", metavar="NAME|PATH", help="a known recipe, or the path of a recipe file"
    )
    add("list", run_list, "the installed engines")
    for name, run, help_text in (
        ("show", run_show, "an engine's manifest, and what the daemon knows of its memory"),
        ("remove", run_remove, "delete an engine from the store"),
        ("verify", run_verify, "read every file of an engine and compare its SHA-256"),
    ):
        command = add(name, run, help_text)
        command.add_argument("name", metavar="NAME")
        if run is run_show:
            add_socket(command)
    for name, run, help_text in (
        ("pin", run_pin, "once loaded it stays in memory, until unpin or the daemon's end"),
        ("unpin", run_pin, "it may leave memory for others again"),
        ("release", run_release, "forget what is held against it: its quarantine, a leak"),
    ):
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument("name", metavar="NAME")
        add_socket(command, default="admin")
        add_json(command)
        command.set_defaults(handler=run, pinned=name == "pin")


def run_install(args: argparse.Namespace) -> int:
    """Install an engine from a recipe."""
    catalogue = _catalogue(args)
    recipe = find_recipe(args.recipe, paths.recipes_dir())
    with ProgressBar(recipe.manifest.name, sys.stderr) as bar:
        manifest = install(recipe, catalogue, bar.update)
    where = catalogue.directory(manifest.name)
    _print(args, _summary(manifest) | {"directory": str(where)}, f"{manifest.name}: in {where}")
    return 0


def run_list(args: argparse.Namespace) -> int:
    """List the installed engines; what is broken goes to stderr."""
    catalogue = _catalogue(args)
    engines, problems = catalogue.contents()
    if args.json:
        broken = [{"name": problem.name, "problem": problem.description} for problem in problems]
        document = {"engines": [_summary(manifest) for manifest in engines], "problems": broken}
        print_json(document)
        return 0
    if engines:
        print(_table(engines))
    else:
        print(f"no engines in {catalogue.root}; install one: edge-agent engines install NAME")
    for problem in problems:
        print(f"broken: {problem.name}: {problem.description}", file=sys.stderr)
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Show one engine's manifest, and what the daemon knows of it."""
    catalogue = _catalogue(args)
    manifest = catalogue.get(args.name)
    extra = {"digest": digest(manifest), "directory": str(catalogue.directory(args.name))}
    document = extra | msgspec.to_builtins(manifest)
    info = _in_daemon(args, extra["digest"])
    lines = [*_lines(document), *_memory_lines(manifest, info)]
    _print(args, document | {"daemon": info}, "\n".join(lines))
    return 0


def run_pin(args: argparse.Namespace) -> int:
    """Pin or unpin an engine in the running daemon."""
    with connect_admin(args) as client:
        info = client.pin(args.name, pinned=args.pinned)
    done = "pinned: once loaded it stays in memory" if info.pinned else "unpinned"
    _print(args, msgspec.to_builtins(info), f"{info.name}: {done}")
    return 0


def run_release(args: argparse.Namespace) -> int:
    """Let the running daemon load an engine again."""
    with connect_admin(args) as client:
        info = client.release(args.name)
    done = f"{info.name}: nothing is held against it; it is {engine_state(info)}"
    _print(args, msgspec.to_builtins(info), done)
    return 0


def run_remove(args: argparse.Namespace) -> int:
    """Remove one engine."""
    catalogue = _catalogue(args)
    catalogue.remove(args.name)
    _print(args, {"removed": args.name}, f"{args.name}: removed from {catalogue.root}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Verify one engine; 1 when a file is not as installed."""
    catalogue = _catalogue(args)
    with ProgressBar(args.name, sys.stderr) as bar:
        found = catalogue.verify(args.name, lambda fraction: bar.update(fraction, "verifying"))
    violations = [{"file": item.field, "problem": item.description} for item in found]
    document = {"name": args.name, "valid": not found, "violations": violations}
    lines = [f"{args.name}: {item.field}: {item.description}" for item in found]
    _print(args, document, "\n".join(lines) or f"{args.name}: every file is as installed")
    return 1 if found else 0


def _catalogue(args: argparse.Namespace) -> Catalogue:
    """The store that was asked for, else the daemon's."""
    if args.store is not None:
        return Catalogue(args.store.absolute())
    from edge_agent.config import load_config  # pydantic takes a while: only where it is needed

    path = args.config or paths.default_config_path(os.environ)
    settings = load_config(path, os.environ)
    return Catalogue(paths.engines_dir(settings.engines_dir, os.environ))


def _in_daemon(args: argparse.Namespace, manifest_digest: str) -> EngineInfo | None:
    """The same engine as a running daemon sees it; None where none runs, or has another one.

    Raises:
        EdgeAgentError: a socket was named, and there is no such engine behind it.
    """
    try:
        with connect(args) as client:
            info = client.engine(args.name)
    except EdgeAgentError:
        if args.socket is not None:
            raise
        return None
    return info if info.digest == manifest_digest else None


def _memory_lines(manifest: Manifest, info: EngineInfo | None) -> list[str]:
    """What is reserved for an engine, and from which measurements."""
    if info is None:
        memory = manifest.memory
        said = _both(memory.steady_bytes, memory.load_peak_bytes)
        return [
            "in memory:",
            f"  estimated: {said}",
            "  measured: the daemon that has this engine does not answer, and only it knows",
        ]
    lines = [
        "in memory:",
        f"  state: {engine_state(info)}",
        f"  reserved: {_both(info.steady_bytes, info.load_peak_bytes)}",
        f"  estimated: {_both(info.estimated_steady_bytes, info.estimated_load_peak_bytes)}",
    ]
    if not info.measurements:
        return [*lines, "  measured: never yet with these slots and this context"]
    rows = [("LOADED AT", "STEADY", "PEAK", "SEEN BY")]
    for measured in info.measurements:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(measured.measured_at_s))
        sizes = size_text(measured.steady_bytes), size_text(measured.load_peak_bytes)
        rows.append((at, *sizes, measured.source))
    lines.append("  measured on this device, a lower one counts when five in a row agree:")
    return lines + [f"    {row}" for row in aligned(rows)]


def _both(steady_bytes: int, load_peak_bytes: int) -> str:
    return f"{size_text(steady_bytes)} loaded, {size_text(load_peak_bytes)} while it loads"


def _print(args: argparse.Namespace, document: dict[str, Any], text: str) -> None:
    if args.json:
        print_json(document)
    else:
        print(text)


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "digest": digest(manifest),
        "backend": manifest.backend.name,
        "size_bytes": sum(spec.size_bytes for spec in manifest.files),
        "context_tokens": manifest.context_tokens,
        "max_output_tokens": manifest.max_output_tokens,
        "slots": manifest.slots,
        "load_peak_bytes": manifest.memory.load_peak_bytes,
        "steady_bytes": manifest.memory.steady_bytes,
        "capabilities": list(manifest.capabilities),
        "licence": manifest.licence,
    }


def _table(engines: tuple[Manifest, ...]) -> str:
    rows = [("NAME", "BACKEND", "ON DISK", "IN MEMORY", "CONTEXT", "LICENCE")]
    for manifest in engines:
        size_bytes = sum(spec.size_bytes for spec in manifest.files)
        rows.append(
            (
                manifest.name,
                manifest.backend.name,
                f"{size_bytes / MIB:.0f} MiB",
                f"{manifest.memory.steady_bytes / MIB:.0f} MiB",
                f"{manifest.context_tokens} tokens",
                manifest.licence,
            )
        )
    return "\n".join(aligned(rows))


def _lines(value: Any, indent: str = "") -> list[str]:
    """Nested values as indented lines, for people."""
    items = value.items() if isinstance(value, dict) else enumerate(value, 1)
    lines = []
    for key, item in items:
        if isinstance(item, dict | list | tuple) and item:
            lines += [f"{indent}{key}:", *_lines(item, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {json.dumps(item, ensure_ascii=False)}")
    return lines
