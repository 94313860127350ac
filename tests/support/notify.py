"""The service manager's end of sd_notify(3): a real datagram socket."""

import os
import queue
import socket
import threading
import time
from pathlib import Path
from typing import NamedTuple, Self


class Notice(NamedTuple):
    """One datagram, and when it came on the monotonic clock."""

    assignments: dict[str, str]
    at_s: float


class NotifySocket:
    """Receives what a service says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(os.fspath(path))
        self._notices: queue.Queue[Notice] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"", os.fspath(self.path))
        self._reader.join()
        self._socket.close()

    def _read(self) -> None:
        while data := self._socket.recv(8192):
            lines = data.decode().splitlines()
            assignments = dict(line.partition("=")[::2] for line in lines)
            self._notices.put(Notice(assignments, time.monotonic()))

    def next(self, key: str, timeout_s: float = 20.0) -> Notice | None:
        """The next notice with this key; None when there is none in time. Others are dropped."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                notice = self._notices.get(timeout=left_s)
            except queue.Empty:
                break
            if key in notice.assignments:
                return notice
        return None

    def drop_waiting(self) -> None:
        """Forget what has come so far."""
        while not self._notices.empty():
            self._notices.get()
