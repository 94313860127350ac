"""What this machine is and what is missing, each line with what to do about it.

Reads, and changes nothing. What lies below /proc, /sys, /etc, /dev, /run and /var is read below a
`sysroot`; the configuration, the engine store, drivers and libraries are this machine's.
"""

import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from edge_agent import paths
from edge_agent.doctor import access, gpu, host, software
from edge_agent.doctor.finding import Finding, FindingStatus, unknown, worst
from edge_agent.doctor.machine import check_machine
from edge_agent.errors import ConfigError
from edge_agent.telemetry.procfs import read_memory
from edge_agent.telemetry.tegra import read_machine

__all__ = ["Finding", "FindingStatus", "Question", "examine", "worst"]


@dataclass(frozen=True, slots=True)
class Question:
    """Where to look. What is None is found as the daemon would."""

    environ: Mapping[str, str]
    sysroot: Path = field(default_factory=lambda: Path("/"))
    config: Path | None = None
    engines_dir: Path | None = None
    deadline_s: float = 20.0


def examine(question: Question) -> tuple[Finding, ...]:
    """Every finding, always in the same order; takes about one deadline at the most."""
    sysroot, environ, deadline_s = question.sysroot, question.environ, question.deadline_s
    settings = software.read_settings(question.config, question.engines_dir, environ)
    store = software.read_store(settings.store)
    pythons = dict.fromkeys([sys.executable, *map(str, settings.config.worker.python.values())])
    is_jetson = read_machine(sysroot).is_jetson
    with ThreadPoolExecutor() as pool:  # of threads that wait for child processes
        nvml = pool.submit(gpu.check_nvml, is_jetson=is_jetson, deadline_s=deadline_s)
        cuda = pool.submit(gpu.check_cuda, pythons, is_jetson=is_jetson, deadline_s=deadline_s)
        backends = pool.submit(software.check_backends, settings, store, deadline_s)
        findings = [
            *check_machine(sysroot),
            nvml.result(),
            cuda.result(),
            *access.check_access(sysroot),
            host.check_python(),
            host.check_clock(sysroot),
            *_disks(settings.store, environ),
            host.check_sockets(environ),
            settings.finding,
            *backends.result(),
            *software.check_engines(
                settings,
                store,
                read_memory(sysroot).available_bytes.value,
                daemon_runs=host.find_daemon(environ) is not None,
            ),
        ]
    return tuple(finding.printable() for finding in findings)


def _disks(store: Path | None, environ: Mapping[str, str]) -> list[Finding]:
    try:
        state = host.check_disk("disk/state", paths.state_dir(environ))
    except ConfigError as error:
        state = unknown("disk/state", error.message, "set HOME or XDG_STATE_HOME")
    return [state] if store is None else [state, host.check_disk("disk/engines", store)]
