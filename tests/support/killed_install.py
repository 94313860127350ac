"""Installs an engine in a process that kills itself with SIGKILL at the n-th effect on the store.

python killed_install.py RECIPE STORE N [--no-exchange]

An effect is whatever the interpreter's audit events show below the store (opening, making,
renaming, deleting), the system call that exchanges two directories, and each report of progress.
Ends with 0 when the install is done before the n-th effect.
"""

import errno
import os
import signal
import sys
from pathlib import Path

from edge_agent.engines import store
from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.install import find_recipe, install

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def main() -> None:
    recipe, root, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if "--no-exchange" in sys.argv:
        store.exchange = cannot_exchange
    left = count

    def effect() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def audit(event: str, args: tuple[object, ...]) -> None:
        below = (
            event in EVENTS and isinstance(args[0], str | Path) and str(args[0]).startswith(root)
        )
        if below or event == "ctypes.dlsym":
            effect()

    found = find_recipe(recipe, Path())
    catalogue = Catalogue(Path(root))
    sys.addaudithook(audit)
    install(found, catalogue, lambda _fraction, _note: effect())


def cannot_exchange(one: Path, other: Path) -> None:
    raise OSError(errno.EINVAL, "made up: this file system cannot exchange", one, None, other)


if __name__ == "__main__":
    main()
