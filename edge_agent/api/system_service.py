"""SystemService: the daemon over gRPC. Converts and calls; decides nothing."""

# ruff: noqa: ARG002, N802
# gRPC names the methods and hands a request and a context to each.

import asyncio
from collections.abc import Callable

from edge_agent.api import convert_response, convert_telemetry
from edge_agent.api.errors import Context
from edge_agent.api.ports import DaemonPort, RequestLimits
from edge_agent.api.streaming import StreamWriter
from edge_agent.v1 import system_service_pb2 as pb
from edge_agent.v1 import system_service_pb2_grpc


class SystemService(system_service_pb2_grpc.SystemServiceServicer):
    """The calls of SystemService."""

    def __init__(self, daemon: DaemonPort, limits: Callable[[], RequestLimits]) -> None:
        self._daemon = daemon
        self._limits = limits

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: Context
    ) -> pb.GetStatusResponse:
        """How the daemon is."""
        return convert_response.status(self._daemon.status())

    async def WatchTelemetry(self, request: pb.WatchTelemetryRequest, context: Context) -> None:  # type: ignore[override]  # writes itself
        """The machine as it is at each message's time: what was not read in time is skipped."""
        interval_s = convert_telemetry.interval_s(request)
        with StreamWriter(context, self._limits().slow_reader_s) as stream:
            while True:
                telemetry = convert_telemetry.telemetry(self._daemon.telemetry())
                await stream.write(pb.WatchTelemetryResponse(telemetry=telemetry))
                await asyncio.sleep(interval_s)

    async def ReloadConfig(
        self, request: pb.ReloadConfigRequest, context: Context
    ) -> pb.ReloadConfigResponse:
        """Read the configuration again."""
        return pb.ReloadConfigResponse(needs_restart=self._daemon.reload())

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        """Accept no new runs."""
        self._daemon.drain()
        return pb.DrainResponse()
