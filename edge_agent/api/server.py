"""The two gRPC servers and their unix sockets.

Owns `edge-agent.lock`, `api.sock` and `admin.sock` in the runtime directory, health and
reflection. gRPC binds over a live socket without a word, so what is there is checked first.
"""

import asyncio
import fcntl
import os
import socket
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from edge_agent.api.engine_service import EngineService
from edge_agent.api.interceptors import CallInterceptor
from edge_agent.api.ports import DaemonPort, EnginesPort, RequestLimits, RunsPort
from edge_agent.api.run_service import RunService
from edge_agent.api.system_service import SystemService
from edge_agent.errors import FailedPrecondition
from edge_agent.paths import MAX_SOCKET_PATH_BYTES
from edge_agent.v1 import (
    engine_service_pb2,
    engine_service_pb2_grpc,
    run_service_pb2,
    run_service_pb2_grpc,
    system_service_pb2,
    system_service_pb2_grpc,
)

API_SOCKET = "api.sock"
ADMIN_SOCKET = "admin.sock"
LOCK = "edge-agent.lock"
SERVICES: tuple[str, ...] = (
    run_service_pb2.DESCRIPTOR.services_by_name["RunService"].full_name,
    engine_service_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name,
    system_service_pb2.DESCRIPTOR.services_by_name["SystemService"].full_name,
)
MAX_MESSAGE_BYTES = 64 << 20
"""Above this gRPC itself refuses, without details. Far above max_request_size (32 MiB at most), so
that our own refusal comes first; a bound all the same, since gRPC holds a message whole."""
_MIN_PING_INTERVAL_MS = 10_000
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Callers may ping idle connections; gRPC's default takes that for abuse and hangs up.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _MIN_PING_INTERVAL_MS),
    ("grpc.http2.max_ping_strikes", 0),
]


class ApiServers:
    """Serves the API on both sockets from `start` to `stop`."""

    def __init__(
        self,
        runtime_dir: Path,
        *,
        runs: RunsPort,
        engines: EnginesPort,
        daemon: DaemonPort,
        limits: Callable[[], RequestLimits],
    ) -> None:
        self.api_socket = runtime_dir / API_SOCKET
        self.admin_socket = runtime_dir / ADMIN_SOCKET
        self._lock_path = runtime_dir / LOCK
        self._limits = limits
        self._run_service = RunService(runs, limits)
        self._engine_service = EngineService(engines, limits)
        self._system_service = SystemService(daemon, limits)
        self._health = health.aio.HealthServicer()
        self._servers: list[grpc.aio.Server] = []
        self._lock_fd: int | None = None

    async def start(self) -> None:
        """Take the lock, bind both sockets and serve. Health says NOT_SERVING until told.

        Raises:
            FailedPrecondition: another daemon or something else is in the way, or a path is too
                long for a socket.
        """
        for path in (self.api_socket, self.admin_socket):
            _check_length(path)
        try:
            self._lock_path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_fd = _take_lock(self._lock_path)
        except OSError as error:
            raise FailedPrecondition(
                f"{error.filename or self._lock_path}: {error.strerror}; "
                "choose a runtime directory that this user may write to",
                reason="RUNTIME_DIR_UNUSABLE",
                metadata={"path": error.filename or self._lock_path},
            ) from error
        try:
            await self.set_serving(serving=False)
            for path, mode, admin in (
                (self.api_socket, 0o660, False),
                (self.admin_socket, 0o600, True),
            ):
                server = self._build(admin=admin)
                self._servers.append(server)
                _bind(server, path, mode)
                await server.start()
        except BaseException:
            await self.stop(0)
            raise

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let running ones finish within `grace_s`, then end them."""
        await self._health.enter_graceful_shutdown()
        servers, self._servers = self._servers, []
        await asyncio.gather(*(server.stop(grace_s) for server in servers))
        if self._lock_fd is not None:
            os.close(self._lock_fd)  # the file stays: to remove it would let two hold "the" lock
            self._lock_fd = None

    async def set_serving(
        self,
        serving: bool,  # noqa: FBT001 - the word is in the method's name
        services: Sequence[str] = SERVICES,
    ) -> None:
        """What health says about these services, and about the daemon as a whole with all."""
        answer = health_pb2.HealthCheckResponse
        status = answer.SERVING if serving else answer.NOT_SERVING
        for service in services:
            await self._health.set(service, status)
        if set(services) == set(SERVICES):
            await self._health.set("", status)

    def _build(self, *, admin: bool) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=[CallInterceptor(admin=admin, limits=self._limits)],
            options=_OPTIONS,
        )
        # The generated functions are typed for gRPC's sync server; the aio one is as good.
        target: Any = server
        run_service_pb2_grpc.add_RunServiceServicer_to_server(self._run_service, target)
        engine_service_pb2_grpc.add_EngineServiceServicer_to_server(self._engine_service, target)
        system_service_pb2_grpc.add_SystemServiceServicer_to_server(self._system_service, target)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, target)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server


def _check_length(path: Path) -> None:
    size = len(os.fsencode(path))
    if size > MAX_SOCKET_PATH_BYTES:
        raise FailedPrecondition(
            f"{path} has {size} bytes, a socket's path at most {MAX_SOCKET_PATH_BYTES}; "
            "choose a shorter runtime directory",
            reason="SOCKET_PATH_TOO_LONG",
            metadata={"path": path, "size_bytes": size, "limit_bytes": MAX_SOCKET_PATH_BYTES},
        )


def _take_lock(path: Path) -> int:
    """The descriptor that holds the lock until it is closed, also by the process's death."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
    except BlockingIOError:
        pid = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise FailedPrecondition(
            f"another edge-agent daemon (pid {pid}) holds {path}; "
            "stop it or choose another runtime directory",
            reason="ALREADY_RUNNING",
            metadata={"pid": pid, "path": path},
        ) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _bind(server: grpc.aio.Server, path: Path, mode: int) -> None:
    """Bind a socket that never, not even for a moment, is open to more than `mode` allows."""
    _make_way(path)
    before = os.umask(0o777 & ~mode)
    try:
        server.add_insecure_port(f"unix:{path}")
    finally:
        os.umask(before)


def _make_way(path: Path) -> None:
    """Remove a dead daemon's socket; refuse to remove anything else."""
    try:
        found = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found):
        raise _in_the_way(path, "is in the way and is no socket; move it elsewhere")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise _in_the_way(path, "is a socket on which another program listens; stop that")


def _in_the_way(path: Path, problem: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{path} {problem}", reason="SOCKET_PATH_TAKEN", metadata={"path": path}
    )
