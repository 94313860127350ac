"""A simulated warehouse robot that gives its agent goals in plain words.

    make demo                                             # a daemon of its own, then this
    .venv/bin/python examples/warehouse_robot.py --socket PATH    # against a running daemon

What the robot can do, and its goals, are in `robots/warehouse.py`; how they are given to the daemon
is in `robots/show.py`, which shows other robots with `--robot`.
"""

import sys

from examples.robots.show import main

if __name__ == "__main__":
    sys.exit(main())
