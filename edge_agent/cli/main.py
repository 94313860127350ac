"""The entry point: finds the command, runs it, turns errors into messages and exit codes.

0 success, 1 the command failed, 2 wrong usage, 130 interrupted. A command's module is imported
only when it is asked for, or to list them all.
"""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from edge_agent import __version__
from edge_agent.errors import EdgeAgentError

COMMANDS = (
    "serve",
    "run",
    "status",
    "runs",
    "sessions",
    "explain",
    "trace",
    "doctor",
    "engines",
    "bench",
    "check-config",
    "halt",
    "completion",
)
_INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # gRPC's own remarks are no part of what a command prints; read when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    arguments = list(sys.argv[1:] if argv is None else argv)
    asked = arguments[0] if arguments else None
    args = build_parser((asked,) if asked in COMMANDS else COMMANDS).parse_args(arguments)
    try:
        code = int(args.handler(args))
        sys.stdout.flush()
    except EdgeAgentError as error:
        from edge_agent.cli.output import print_error

        print_error(error, as_json=getattr(args, "json", False))
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def build_parser(commands: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The command line, with these commands."""
    parser = argparse.ArgumentParser(
        prog="edge-agent",
        description="A daemon that runs agents on small language models on the device.",
        epilog="example: edge-agent run 'What is the capital of France?'",
    )
    parser.add_argument("--version", action="version", version=f"edge-agent {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in commands:
        module = importlib.import_module(f"edge_agent.cli.{command.replace('-', '_')}")
        module.register(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
