"""`edge-agent serve`: the daemon itself, in the foreground."""

import argparse

from edge_agent.cli.output import Subparsers, absolute


def register(subparsers: Subparsers) -> None:
    """Add `serve`."""
    parser = subparsers.add_parser(
        "serve",
        help="run the daemon",
        description="Runs the daemon in the foreground until SIGTERM or SIGINT, which let running "
        "work finish. SIGHUP reads the configuration again.",
        epilog="example: edge-agent serve --config ./config.yaml --runtime-dir /tmp/edge-agent",
    )
    for option, meaning in (
        ("--config", "the configuration (default: config.yaml in the usual places, if there)"),
        (
            "--runtime-dir",
            "sockets and the lock (default: $RUNTIME_DIRECTORY, else $XDG_RUNTIME_DIR/edge-agent)",
        ),
        (
            "--state-dir",
            "what outlives a restart (default: $STATE_DIRECTORY, else $XDG_STATE_HOME/edge-agent)",
        ),
        ("--engines-dir", "the engine store (default: engines_dir of the configuration)"),
    ):
        metavar = "FILE" if option == "--config" else "DIR"
        parser.add_argument(option, type=absolute, metavar=metavar, help=meaning)
    parser.add_argument("--json", action="store_true", help="print errors at the start as JSON")
    parser.set_defaults(handler=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    """Be the daemon."""
    from edge_agent import daemon

    return daemon.main(args.config, args.runtime_dir, args.state_dir, args.engines_dir)
