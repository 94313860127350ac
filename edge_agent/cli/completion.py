"""`edge-agent completion`: a script that lets the shell complete our commands and options."""

import argparse

from edge_agent.cli.output import Subparsers

SHELLS = ("bash", "zsh", "tcsh")


def register(subparsers: Subparsers) -> None:
    """Add `completion`."""
    parser = subparsers.add_parser(
        "completion",
        help="print a completion script for your shell",
        description="Prints a script that makes the shell complete commands and options.",
        epilog="example: edge-agent completion bash "
        "> ~/.local/share/bash-completion/completions/edge-agent",
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that is to read the script")
    parser.set_defaults(handler=run_completion)


def run_completion(args: argparse.Namespace) -> int:
    """Print the script for all commands."""
    import shtab

    from edge_agent.cli.main import build_parser

    print(shtab.complete(build_parser(), args.shell))
    return 0
