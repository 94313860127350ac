"""The processes that benchmarks start: `python _children.py ROLE JSON`, then JSON lines.

`engine` hosts the backend without anything of ours around it, `replay` is a bare gRPC server,
`library` is the engine's library alone, without our package.
"""

import asyncio
import base64
import enum
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

Answer = Callable[[dict[str, Any]], object]


def main() -> None:
    role, arguments = sys.argv[1], json.loads(sys.argv[2])
    # The protocol's own descriptor: what native code prints must not get between the lines.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(answer: object) -> None:
        answers.write(json.dumps(answer) + "\n")

    if role == "replay":
        asyncio.run(replay(say, **arguments))
        return
    hello, answer = ROLES[role](**arguments)
    say(hello)
    for request in requests():
        say(answer(request))


def requests() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def engine(directory: str, options: dict[str, Any]) -> tuple[object, Answer]:
    """The backend's own loop in this process, and the library's own HTTP listener."""
    from edge_agent.backends.base import LoadOptions
    from edge_agent.backends.llama_cpp import LlamaCpp
    from edge_agent.core import Message, Role, Sampling, TextPart
    from edge_agent.decoding.prompt import PromptRenderer
    from edge_agent.engines.manifest import MANIFEST_NAME, decode_manifest

    manifest = decode_manifest((Path(directory) / MANIFEST_NAME).read_bytes())
    backend = LlamaCpp()
    backend.load(manifest, Path(directory), LoadOptions(**options), lambda _fraction: None)
    renderer = PromptRenderer(manifest, lambda text, m: backend.tokenize(text, markers=m))
    prompts: dict[str, list[int]] = {}

    def complete(goal: str, max_tokens: int, start: threading.Barrier) -> dict[str, Any]:
        pieces: list[tuple[float, int]] = []
        start.wait()
        began_s = time.monotonic()
        backend.complete(
            prompts[goal],
            max_tokens=max_tokens,
            schema_json=None,
            lead="",
            sampling=Sampling(),
            stop=manifest.stop,
            cancel=threading.Event(),
            on_text=lambda _text, tokens: pieces.append((time.monotonic(), tokens)),
        )
        return {"began_s": began_s, "pieces": pieces}

    def answer(request: dict[str, Any]) -> object:
        goal, streams = request["goal"], request["streams"]
        done: list[dict[str, Any]] = []
        start = threading.Barrier(streams)
        threads = [
            threading.Thread(
                target=lambda: done.append(complete(goal, request["max_tokens"], start))
            )
            for _ in range(streams)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(done) == streams
        return done

    def take(request: dict[str, Any]) -> object:
        goal = request["goal"]
        if goal not in prompts:
            message = Message(Role.USER, (TextPart(goal),))
            prompts[goal] = renderer.render((message,), ())
        return {"prompt": prompts[goal]} if "streams" not in request else answer(request)

    listener = backend._listener  # noqa: SLF001 - nothing of ours needs it from outside
    return {"path": listener.path, "key": listener.key}, take


def library(parameters: dict[str, Any]) -> tuple[object, Answer]:
    """The engine's library alone; `parameters` maps dotted names to values."""
    os.environ.update(GOMP_SPINCOUNT="0", OMP_WAIT_POLICY="passive")
    import xllamacpp

    params = xllamacpp.CommonParams()
    for name, value in parameters.items():
        *path, last = name.split(".")
        target = params
        for part in path:
            target = getattr(target, part)
        before = getattr(target, last)
        setattr(target, last, type(before)(value) if isinstance(before, enum.Enum) else value)
    server = xllamacpp.Server(params)

    def answer(request: dict[str, Any]) -> object:
        server.handle_completions(json.dumps(request), lambda _chunk: False)
        return {}

    return {}, answer


async def replay(say: Callable[[object], None], socket: str) -> None:
    """A gRPC server with one interceptor that sends given messages at given times."""
    import grpc

    from edge_agent.v1 import run_service_pb2 as pb
    from edge_agent.v1 import run_service_pb2_grpc

    messages: list[tuple[float, pb.ExecuteRunResponse]] = []

    class Interceptor(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
            return await continuation(handler_call_details)

    class Service(run_service_pb2_grpc.RunServiceServicer):
        async def ExecuteRun(  # noqa: N802 - gRPC's name
            self,
            request: pb.ExecuteRunRequest,  # noqa: ARG002 - gRPC's signature
            context: Any,  # noqa: ARG002
        ) -> AsyncIterator[pb.ExecuteRunResponse]:
            began_s = time.monotonic()
            for after_s, message in messages:
                wait_s = began_s + after_s - time.monotonic()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                yield message

    server = grpc.aio.server(interceptors=[Interceptor()])
    # The stubs want every method and gRPC's sync server; this one needs neither.
    service, target = cast(Any, Service)(), cast(Any, server)
    run_service_pb2_grpc.add_RunServiceServicer_to_server(service, target)
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    say({})
    lines = requests()
    while (request := await asyncio.to_thread(next, lines, None)) is not None:
        messages[:] = [
            (after_s, pb.ExecuteRunResponse.FromString(base64.b64decode(raw)))
            for after_s, raw in request["messages"]
        ]
        say({})
    await server.stop(0)


ROLES: dict[str, Callable[..., tuple[object, Answer]]] = {"engine": engine, "library": library}

if __name__ == "__main__":
    main()
