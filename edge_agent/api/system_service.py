"""SystemService: the daemon over gRPC. Converts and calls; decides nothing."""

# ruff: noqa: ARG002, N802
# gRPC names the methods and hands a request and a context to each.

from edge_agent.api import convert_response
from edge_agent.api.errors import Context
from edge_agent.api.ports import DaemonPort
from edge_agent.v1 import system_service_pb2 as pb
from edge_agent.v1 import system_service_pb2_grpc


class SystemService(system_service_pb2_grpc.SystemServiceServicer):
    """The calls of SystemService."""

    def __init__(self, daemon: DaemonPort) -> None:
        self._daemon = daemon

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: Context
    ) -> pb.GetStatusResponse:
        """How the daemon is."""
        return convert_response.status(self._daemon.status())

    async def ReloadConfig(
        self, request: pb.ReloadConfigRequest, context: Context
    ) -> pb.ReloadConfigResponse:
        """Read the configuration again."""
        return pb.ReloadConfigResponse(needs_restart=self._daemon.reload())

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        """Accept no new runs."""
        self._daemon.drain()
        return pb.DrainResponse()
