"""Checks of what surrounds the daemon: Python, clock, disk, the sockets' directory."""

import contextlib
import ctypes
import os
import platform
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from edge_agent import __version__, paths
from edge_agent.doctor.finding import Finding, good, unknown, warn
from edge_agent.errors import ConfigError
from edge_agent.telemetry.files import read_text
from edge_agent.units import size_text

LOW_DISK_BYTES: Final = 512 << 20
SYSTEM_RUNTIME_DIR: Final = Path("/run") / paths.APP
_MAX_SOCKET_PATH_BYTES: Final = 107
_SOCKET_NAMES: Final = ("api.sock", "admin.sock")
_CONNECT_S: Final = 0.5
_SYNC_CLOCK: Final = (
    "`sudo timedatectl set-ntp true`, or chrony or PTP; `timedatectl timesync-status` tells more"
)
_STA_UNSYNC: Final = 0x0040
_TIMESYNC: Final = "run/systemd/timesync/synchronized"


class _Timex(ctypes.Structure):
    """The start of struct timex, adjtimex(2); the rest is room."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror_us", ctypes.c_long),
        ("esterror_us", ctypes.c_long),
        ("status", ctypes.c_int),
        ("room", ctypes.c_byte * 256),
    )


def check_python() -> Finding:
    """Which Python runs which edge-agent on which kernel."""
    machine = f"{platform.machine()}, Linux {platform.release()}"
    return good("python", f"{platform.python_version()}, edge-agent {__version__}, {machine}")


def check_clock(sysroot: Path) -> Finding:
    """Synchronised or not: as the kernel says (any NTP or PTP service tells it), else timesyncd."""
    by_timesyncd = read_text(sysroot, _TIMESYNC).value is not None
    if sysroot != Path("/"):  # another machine's tree: this kernel knows nothing about it
        if by_timesyncd:
            return good("clock", "synchronised (systemd-timesyncd)")
        return unknown("clock", f"no /{_TIMESYNC}", _SYNC_CLOCK)
    timex = _Timex()
    if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex)) < 0:
        return unknown("clock", f"adjtimex: {os.strerror(ctypes.get_errno())}", _SYNC_CLOCK)
    return describe_clock(timex.status, timex.maxerror_us, by_timesyncd=by_timesyncd)


def describe_clock(status: int, maxerror_us: int, *, by_timesyncd: bool) -> Finding:
    """The finding for what adjtimex(2) said."""
    if not status & _STA_UNSYNC:
        return good("clock", f"synchronised to within {maxerror_us / 1000:.0f} ms (kernel)")
    if by_timesyncd:
        return good("clock", "synchronised since boot (systemd-timesyncd)")
    return warn("clock", "not synchronised: deadlines over a reboot may be wrong", _SYNC_CLOCK)


def check_disk(name: str, directory: Path) -> Finding:
    """Room where `directory` is or will be, and whether this user may write there."""
    existing = _nearest_existing(directory)
    try:
        status = os.statvfs(existing)
    except OSError as error:
        hint = "name another directory, or mend this one's permissions"
        return unknown(name, f"{directory}: {error.strerror}", hint)
    free = status.f_bavail * status.f_frsize
    value = f"{size_text(free)} free in {directory}"
    if not os.access(existing, os.W_OK | os.X_OK):
        hint = f"run doctor as the daemon's user, or let this user write to {directory}"
        return warn(name, f"{value}: may not write", hint)
    if status.f_flag & os.ST_RDONLY:
        return warn(name, f"{value}: read-only", "mount it for writing")
    if free < LOW_DISK_BYTES:
        hint = (
            "`edge-agent engines list` shows what engines take, `journalctl --disk-usage` the log"
        )
        return warn(name, value, hint)
    return good(name, value)


def check_sockets(environ: Mapping[str, str]) -> Finding:
    """Where the daemon's sockets are or will be."""
    listening = find_daemon(environ)
    if listening is not None:
        return good("sockets", f"{listening}: a daemon listens")
    try:
        directory = paths.runtime_dir(environ)
    except ConfigError as error:
        hint = "systemd sets it for the service; in a shell: export XDG_RUNTIME_DIR=/run/user/$UID"
        return warn("sockets", error.message, hint)
    longest = max(len(os.fsencode(directory / name)) for name in _SOCKET_NAMES)
    if longest > _MAX_SOCKET_PATH_BYTES:
        value = f"{directory}: a path of {longest} bytes, at most {_MAX_SOCKET_PATH_BYTES}"
        return warn("sockets", value, "serve --runtime-dir with a shorter path")
    existing = _nearest_existing(directory)
    if not os.access(existing, os.W_OK | os.X_OK):
        hint = f"run doctor as the daemon's user, or let this user write to {directory}"
        return warn("sockets", f"{directory}: may not write", hint)
    return good("sockets", f"{directory}: no daemon listens")


def find_daemon(environ: Mapping[str, str]) -> Path | None:
    """Where somebody accepts on `api.sock`: the session's daemon, else the system's."""
    directories = [SYSTEM_RUNTIME_DIR]
    with contextlib.suppress(ConfigError):
        directories.insert(0, paths.runtime_dir(environ))
    return next((directory for directory in directories if _listens(directory)), None)


def _listens(directory: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_CONNECT_S)
            probe.connect(str(directory / _SOCKET_NAMES[0]))
    except OSError:  # a path that is too long too
        return False
    return True


def _nearest_existing(path: Path) -> Path:
    for candidate in (path, *path.parents):
        try:
            candidate.stat()
        except FileNotFoundError:
            continue
        except OSError:
            pass  # it is there in some way: statvfs and access tell more
        return candidate
    return path
