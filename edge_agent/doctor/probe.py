"""Questions answered in a process of their own: `python -I probe.py KIND ...`.

Loading a native library or asking a driver may crash or never return, so doctor does neither
itself. Also run by the Python of a backend's own environment: standard library only, and nothing
of edge-agent. The answer is the last line, as JSON; what a library prints stands before it.

    libraries NAME...   {name: {"version": str | null, "problem": str | null}}
    cuda                {"problem": str} or {"driver_version": int, "devices": [...]}
"""

import importlib
import json
import sys
from importlib import metadata
from importlib.util import find_spec
from typing import Any


def libraries(names: list[str]) -> dict[str, Any]:
    """Import each one for real, and say its version."""
    return {name: _library(name) for name in names}


def cuda() -> dict[str, Any]:
    """The CUDA devices, through pycuda, without a context on any: one costs some 65 MB."""
    if find_spec("pycuda") is None:
        return {"problem": "pycuda is not installed"}
    try:
        from pycuda import driver

        driver.init()
        devices = [_device(driver, index) for index in range(driver.Device.count())]
        return {"driver_version": int(driver.get_driver_version()), "devices": devices}
    except Exception as error:  # noqa: BLE001 - whatever goes wrong there is the answer
        return {"problem": _words(error)}


def _library(name: str) -> dict[str, str | None]:
    try:
        if find_spec(name) is None:
            return {"version": None, "problem": "not installed"}
        importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong there is the answer
        return {"version": _version(name), "problem": _words(error)}
    return {"version": _version(name), "problem": None}


def _version(module: str) -> str | None:
    for distribution in metadata.packages_distributions().get(module, [module]):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _device(driver: Any, index: int) -> dict[str, Any]:
    device = driver.Device(index)
    return {
        "name": str(device.name()),
        "integrated": bool(device.get_attribute(driver.device_attribute.INTEGRATED)),
        "compute_capability": [int(part) for part in device.compute_capability()],
        "memory_bytes": int(device.total_memory()),
    }


def _words(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    answer = cuda() if sys.argv[1] == "cuda" else libraries(sys.argv[2:])
    sys.stdout.write(f"\n{json.dumps(answer)}")
