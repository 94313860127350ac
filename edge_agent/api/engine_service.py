"""EngineService: engines over gRPC. Converts and calls; decides nothing about engines."""

# ruff: noqa: ARG002, N802
# gRPC names the methods and hands a request and a context to each.

from collections.abc import Callable

from edge_agent.api import convert_request, convert_response
from edge_agent.api.errors import Context
from edge_agent.api.ports import EnginesPort, RequestLimits
from edge_agent.api.streaming import StreamWriter, closing
from edge_agent.v1 import engine_service_pb2 as pb
from edge_agent.v1 import engine_service_pb2_grpc


class EngineService(engine_service_pb2_grpc.EngineServiceServicer):
    """The calls of EngineService."""

    def __init__(self, engines: EnginesPort, limits: Callable[[], RequestLimits]) -> None:
        self._engines = engines
        self._limits = limits

    async def ListEngines(
        self, request: pb.ListEnginesRequest, context: Context
    ) -> pb.ListEnginesResponse:
        """All engines."""
        engines = [convert_response.engine(info) for info in self._engines.engines()]
        return pb.ListEnginesResponse(engines=engines)

    async def GetEngine(
        self, request: pb.GetEngineRequest, context: Context
    ) -> pb.GetEngineResponse:
        """One engine."""
        info = self._engines.engine(convert_request.name(request.name))
        return pb.GetEngineResponse(engine=convert_response.engine(info))

    async def LoadEngine(
        self, request: pb.LoadEngineRequest, context: Context
    ) -> pb.LoadEngineResponse:
        """Bring an engine into memory."""
        info = await self._engines.load(convert_request.name(request.name))
        return pb.LoadEngineResponse(engine=convert_response.engine(info))

    async def UnloadEngine(
        self, request: pb.UnloadEngineRequest, context: Context
    ) -> pb.UnloadEngineResponse:
        """Take an engine out of memory."""
        info = await self._engines.unload(convert_request.name(request.name))
        return pb.UnloadEngineResponse(engine=convert_response.engine(info))

    async def WatchEngines(self, request: pb.WatchEnginesRequest, context: Context) -> None:  # type: ignore[override]  # writes itself
        """All engines, then each change."""
        with StreamWriter(context, self._limits().slow_reader_s) as stream:
            async with closing(self._engines.watch()) as changes:
                async for info in changes:
                    message = pb.WatchEnginesResponse(engine=convert_response.engine(info))
                    await stream.write(message)
