"""`edge-agent check-config`: every error of a configuration file, without starting anything."""

import argparse
import os
from pathlib import Path

from edge_agent.cli.output import Subparsers, add_json, print_json


def register(subparsers: Subparsers) -> None:
    """Add `check-config`."""
    parser = subparsers.add_parser(
        "check-config",
        help="say all that is wrong in a configuration file",
        description="Reads a configuration as the daemon would and prints every error in it. "
        "Exit code 1 if there is any.",
        epilog="example: edge-agent check-config /etc/edge-agent/config.yaml",
    )
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="default: the file that serve would use"
    )
    add_json(parser)
    parser.set_defaults(handler=run_check_config)


def run_check_config(args: argparse.Namespace) -> int:
    """Check the file."""
    from edge_agent.config import load_config
    from edge_agent.errors import ConfigError
    from edge_agent.paths import default_config_path

    path = args.file or default_config_path(os.environ)
    source = "the built-in defaults" if path is None else str(path)
    try:
        load_config(path, os.environ)
    except ConfigError as error:
        if not args.json:
            raise
        print_json({"source": source, "valid": False, "errors": error.violations})
        return 1
    if args.json:
        print_json({"source": source, "valid": True, "errors": []})
    else:
        print(f"{source}: no errors")
    return 0
