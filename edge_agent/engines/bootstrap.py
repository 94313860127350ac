"""Starts a worker in an environment of its own: `python -I bootstrap.py FD PARENT_PID OOM_ADJ`.

That environment need not have edge-agent installed: exactly this package is made importable, and
nothing that happens to lie beside it.
"""

import importlib.util
import sys
from pathlib import Path


def _make_package_importable() -> None:
    package = Path(__file__).resolve().parent.parent
    spec = importlib.util.spec_from_file_location(
        package.name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"no package at {package}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[package.name] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    _make_package_importable()
    from edge_agent.engines.worker import main

    main(*(int(argument) for argument in sys.argv[1:4]))
