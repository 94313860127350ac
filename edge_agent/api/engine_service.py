"""EngineService: engines over gRPC. Converts and calls; decides nothing about engines."""

# ruff: noqa: ARG002, N802
# gRPC names the methods and hands a request and a context to each.

from collections.abc import Callable

from edge_agent.api import convert_engine, convert_request
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
        engines = [convert_engine.engine(info) for info in self._engines.engines()]
        return pb.ListEnginesResponse(engines=engines)

    async def GetEngine(
        self, request: pb.GetEngineRequest, context: Context
    ) -> pb.GetEngineResponse:
        """One engine."""
        info = self._engines.engine(convert_request.name(request.name))
        return pb.GetEngineResponse(engine=convert_engine.engine(info))

    async def LoadEngine(
        self, request: pb.LoadEngineRequest, context: Context
    ) -> pb.LoadEngineResponse:
        """Bring an engine into memory."""
        info = await self._engines.load(convert_request.name(request.name))
        return pb.LoadEngineResponse(engine=convert_engine.engine(info))

    async def UnloadEngine(
        self, request: pb.UnloadEngineRequest, context: Context
    ) -> pb.UnloadEngineResponse:
        """Take an engine out of memory."""
        info = await self._engines.unload(convert_request.name(request.name))
        return pb.UnloadEngineResponse(engine=convert_engine.engine(info))

    async def PinEngine(
        self, request: pb.PinEngineRequest, context: Context
    ) -> pb.PinEngineResponse:
        """Keep an engine in memory, or let it go again."""
        info = self._engines.pin(convert_request.name(request.name), pinned=request.pinned)
        return pb.PinEngineResponse(engine=convert_engine.engine(info))

    async def ReleaseEngine(
        self, request: pb.ReleaseEngineRequest, context: Context
    ) -> pb.ReleaseEngineResponse:
        """Forget what is held against an engine."""
        info = await self._engines.release(convert_request.name(request.name))
        return pb.ReleaseEngineResponse(engine=convert_engine.engine(info))

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        """Why each waiting step waits."""
        waits = self._engines.explain(convert_request.explained_run(request))
        return pb.ExplainResponse(waits=map(convert_engine.wait, waits))

    async def WatchEngines(self, request: pb.WatchEnginesRequest, context: Context) -> None:  # type: ignore[override]  # writes itself
        """All engines, then each change."""
        with StreamWriter(context, self._limits().slow_reader_s) as stream:
            async with closing(self._engines.watch()) as changes:
                async for info in changes:
                    message = pb.WatchEnginesResponse(engine=convert_engine.engine(info))
                    await stream.write(message)
