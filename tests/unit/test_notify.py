"""What the service manager is told, over a real datagram socket."""

import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from edge_agent.notify import ServiceManager


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path: Path) -> Iterator[tuple[socket.socket, ServiceManager]]:
    """The manager's end, and ours."""
    name = f"edge-agent-{secrets.token_hex(8)}"
    address = f"@{name}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(f"\0{name}" if request.param == "abstract" else address)
        end.settimeout(5.0)
        yield end, ServiceManager({"NOTIFY_SOCKET": address})


def received(end: socket.socket) -> list[str]:
    return end.recv(4096).decode().split("\n")


def test_says_each_thing_in_one_datagram(manager):
    end, service = manager
    service.ready("ready: accepting runs")
    assert received(end) == ["READY=1", "STATUS=ready: accepting runs"]
    service.status("degraded")
    assert received(end) == ["STATUS=degraded"]
    service.stopping("draining")
    assert received(end) == ["STOPPING=1", "STATUS=draining"]
    service.alive()
    assert received(end) == ["WATCHDOG=1"]
    service.extend_timeout(2.5)
    assert received(end) == ["EXTEND_TIMEOUT_USEC=2500000"]


def test_a_reload_carries_its_time(manager):
    end, service = manager
    before_usec = time.monotonic_ns() // 1000
    service.reloading()
    reloading, at = received(end)
    assert reloading == "RELOADING=1"
    name, usec = at.split("=")
    assert name == "MONOTONIC_USEC"
    assert before_usec <= int(usec) <= time.monotonic_ns() // 1000


class TestWatchdog:
    @pytest.mark.parametrize(
        ("environ", "watchdog_s"),
        [
            ({}, None),
            ({"WATCHDOG_USEC": "3000000"}, 3.0),
            ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
            ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),  # another's
            ({"WATCHDOG_USEC": "0"}, None),
            ({"WATCHDOG_USEC": "soon"}, None),
            ({"WATCHDOG_USEC": "²"}, None),
        ],
    )
    def test_the_interval_is_ours_only(self, environ, watchdog_s):
        assert ServiceManager(environ).watchdog_s == watchdog_s


class TestNobodyThere:
    def test_a_manager_that_is_gone_is_logged_once(self, tmp_path: Path):
        service = ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")})
        with structlog.testing.capture_logs() as logs:
            service.ready("ready")
            service.alive()
        assert [line["event"] for line in logs] == ["service_manager_unreachable"]

    def test_a_manager_that_does_not_read_does_not_hold_up_the_daemon(self, tmp_path: Path):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.bind(str(tmp_path / "notify"))
            service = ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "notify")})
            with structlog.testing.capture_logs() as logs:
                while not logs:  # until its queue is full
                    service.alive()
        assert logs[0]["event"] == "service_manager_unreachable"
