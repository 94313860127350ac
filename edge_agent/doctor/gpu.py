"""Checks of the GPU's driver: NVML, and CUDA through pycuda. Nothing here is needed by the CPU."""

import sys
from collections.abc import Iterable
from typing import Any, Final

from edge_agent.doctor.children import NoAnswer, ask_cuda, ask_nvml
from edge_agent.doctor.finding import Finding, good, unknown, warn
from edge_agent.telemetry.nvml import LIBRARY_MISSING, Gpu, NvmlSnapshot
from edge_agent.units import size_text

_REBOOT: Final = "`sudo dmesg | grep -iE 'nvrm|xid|nvgpu'` says why; often only a reboot helps"
_NO_PYCUDA: Final = "pycuda is not installed"


def check_nvml(*, is_jetson: bool, deadline_s: float) -> Finding:
    """The driver, and each GPU with its memory or the fact that it shares the CPU's."""
    try:
        snapshot = ask_nvml(deadline_s)
    except NoAnswer as error:
        return warn("nvml", str(error), _REBOOT)
    return describe_nvml(snapshot, is_jetson=is_jetson)


def describe_nvml(snapshot: NvmlSnapshot, *, is_jetson: bool) -> Finding:
    """The finding for what NVML said."""
    gpus = snapshot.gpus
    if gpus.value is None:
        if gpus.detail == LIBRARY_MISSING and not is_jetson:
            return good("nvml", "no NVIDIA driver: engines run on the CPU")
        hint = _REBOOT
        if gpus.detail == LIBRARY_MISSING:
            hint = "install JetPack's packages: `sudo apt install nvidia-jetpack`"
        return warn("nvml", f"{gpus.source}: {gpus.detail}", hint)
    if not gpus.value:
        return warn("nvml", "the driver is loaded and sees no GPU", _REBOOT)
    driver = f"driver {snapshot.driver_version.value or 'unknown'}"
    if snapshot.cuda_version.value:
        driver += ", CUDA {}.{}".format(*snapshot.cuda_version.value)
    value = "; ".join([driver, *map(_describe, gpus.value)])
    nameless = next((gpu.name for gpu in gpus.value if gpu.name.value is None), None)
    if nameless:
        return warn("nvml", f"{value} ({nameless.source}: {nameless.detail})", _REBOOT)
    return good("nvml", value)


def check_cuda(pythons: Iterable[str], *, is_jetson: bool, deadline_s: float) -> Finding:
    """The CUDA devices, as the first Python that has pycuda sees them."""
    answer: dict[str, Any] = {}
    for python in pythons:
        try:
            answer = ask_cuda(python, deadline_s)
        except NoAnswer as error:
            return warn("cuda", f"{python}: {error}", _REBOOT)
        if answer.get("problem") != _NO_PYCUDA:
            break
    if answer.get("problem") == _NO_PYCUDA and not is_jetson:
        return good("cuda", f"not asked: {_NO_PYCUDA}")
    if answer.get("problem") == _NO_PYCUDA:
        hint = f"for CUDA's facts: `{sys.executable} -m pip install pycuda` (needs CUDA's headers)"
        return unknown("cuda", _NO_PYCUDA, hint)
    if answer.get("problem"):
        hint = "801 or 'no device' is often a missing group (see groups) or node (see device_nodes)"
        return warn("cuda", str(answer["problem"]), hint)
    devices = answer.get("devices") or []
    if not devices:
        return warn("cuda", "CUDA sees no device", _REBOOT)
    return good("cuda", "; ".join(_describe_device(device) for device in devices))


def _describe(gpu: Gpu) -> str:
    parts = [gpu.name.value or f"GPU {gpu.index}"]
    if gpu.integrated.value:
        parts.append("integrated: shares the CPU's memory")
    if gpu.memory_total_bytes.value is not None and not gpu.integrated.value:
        parts.append(size_text(gpu.memory_total_bytes.value))
    if gpu.compute_capability.value:
        parts.append("compute capability {}.{}".format(*gpu.compute_capability.value))
    return ", ".join(parts)


def _describe_device(device: dict[str, Any]) -> str:
    capability = ".".join(str(part) for part in device["compute_capability"])
    kind = "integrated" if device["integrated"] else "discrete"
    return f"{device['name']}, {kind}, {capability}, {size_text(device['memory_bytes'])}"
