"""Tells the service manager how the daemon is: sd_notify(3) over its datagram socket."""

import os
import socket
import time
from collections.abc import Mapping

import structlog

_SEND_TIMEOUT_S = 0.1

log = structlog.get_logger()


class ServiceManager:
    """Sends to `$NOTIFY_SOCKET`; without one, everything is a no-op."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        """Take the socket's address and the watchdog's interval from the environment."""
        address = environ.get("NOTIFY_SOCKET", "")
        self._unreachable = False
        self._address = "\0" + address[1:] if address.startswith("@") else address
        watchdog_usec = environ.get("WATCHDOG_USEC", "")
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        interval_usec = int(watchdog_usec) if watchdog_usec.isdecimal() and ours else 0
        self.watchdog_s = interval_usec / 1e6 or None

    def ready(self, status: str) -> None:
        """Runs are accepted, or the reload is over."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """A reload begins. Type=notify-reload needs the time of it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str) -> None:
        """The daemon is on its way out."""
        self._send("STOPPING=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={status}")

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> None:
        """Starting or stopping takes this much longer from now on."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def _send(self, *assignments: str) -> None:
        """A manager that can't be reached, or does not read, never stops the daemon."""
        if not self._address:
            return
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        try:
            with socket.socket(socket.AF_UNIX, kind) as channel:
                channel.settimeout(_SEND_TIMEOUT_S)
                channel.connect(self._address)
                channel.send("\n".join(assignments).encode())
        except OSError as error:
            if not self._unreachable:
                log.warning("service_manager_unreachable", error=str(error))
            self._unreachable = True
        else:
            self._unreachable = False
