"""`edge-agent engines`: install, list, show, remove and verify engines in the store on disk.

Works without the daemon, which reads the same store. Results go to stdout, progress to stderr.
Errors are raised: `cli.main` prints them.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edge_agent import paths
from edge_agent.cli.output import Subparsers, add_json, aligned, print_json
from edge_agent.cli.progress import ProgressBar
from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.install import find_recipe, install
from edge_agent.engines.manifest import Manifest, digest
from edge_agent.units import MIB


def register(subparsers: Subparsers) -> None:
    """Add `engines` and what is below it; each leaf sets `handler`, which returns the exit code."""
    parser = subparsers.add_parser(
        "engines",
        help="install, list, show, remove and verify engines",
        description="Engines are compiled models in a store on disk. The daemon reads the same "
        "store; these commands work without it.",
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
        ("show", run_show, "everything that an engine's manifest says"),
        ("remove", run_remove, "delete an engine from the store"),
        ("verify", run_verify, "read every file of an engine and compare its SHA-256"),
    ):
        add(name, run, help_text).add_argument("name", metavar="NAME")


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
    """Show one engine's manifest."""
    catalogue = _catalogue(args)
    manifest = catalogue.get(args.name)
    extra = {"digest": digest(manifest), "directory": str(catalogue.directory(args.name))}
    document = extra | msgspec.to_builtins(manifest)
    _print(args, document, "\n".join(_lines(document)))
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
