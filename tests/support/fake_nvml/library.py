"""Builds the stand-in for libnvidia-ml.so.1 and writes its state; see library.c."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

SOURCE = Path(__file__).with_name("library.c")
SONAME = "libnvidia-ml.so.1"

ORIN = {
    "driver": "540.5.0",
    "cuda": 13020,
    "count": 1,
    "0.name": "Orin (nvgpu)",
    "0.capability": 87,
}
THOR = {
    "driver": "595.78",
    "cuda": 13020,
    "count": 1,
    "0.name": "NVIDIA Thor",
    "0.capability": 110,
    "0.utilisation": 37,
}
GB10 = {
    "driver": "580.173.02",
    "cuda": 13000,
    "count": 1,
    "0.name": "NVIDIA GB10",
    "0.capability": 121,
    "0.utilisation": 12,
    "0.temperature_c": 51,
    "0.power_mw": 14_700,
}
DISCRETE = {
    "driver": "580.95.05",
    "cuda": 13000,
    "count": 1,
    "0.name": "NVIDIA GeForce RTX 4090",
    "0.capability": 89,
    "0.memory_total": 24_564 << 20,
    "0.memory_used": 512 << 20,
    "0.utilisation": 0,
    "0.temperature_c": 44,
    "0.power_mw": 31_200,
    "0.clock_mhz": 2520,
    "0.event_reasons": 1,
}


class FakeNvml:
    """One library and the state that steers it. `environ` is for the process that loads it."""

    def __init__(self, directory: Path, library_directory: Path) -> None:
        self._state = directory / "nvml.state"
        self.environ = {
            "LD_LIBRARY_PATH": str(library_directory),
            "FAKE_NVML_STATE": str(self._state),
        }

    def set(self, *states: Mapping[str, object], **keys: object) -> None:
        """What the GPUs are from now on; later mappings win, a value of None takes a key away."""
        merged: dict[str, object] = {}
        for state in (*states, keys):
            merged |= state
        lines = [f"{key}={value}\n" for key, value in merged.items() if value is not None]
        partial = self._state.with_suffix(".partial")
        partial.write_bytes("".join(lines).encode("utf-8", "surrogateescape"))
        partial.replace(self._state)


def build(directory: Path, *flags: str) -> Path:
    """Compile the library into `directory`, which is then an entry of LD_LIBRARY_PATH."""
    directory.mkdir(parents=True, exist_ok=True)
    command = [os.environ.get("CC", "gcc"), "-Wall", "-Wextra", "-Werror", "-O1", "-fPIC", *flags]
    command += ["-shared", f"-Wl,-soname,{SONAME}", "-o", str(directory / SONAME), str(SOURCE)]
    subprocess.run(command, check=True)
    return directory
