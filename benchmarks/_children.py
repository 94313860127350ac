"""The processes that benchmarks start: `python _children.py ROLE JSON`, then JSON lines.

`engine` hosts the backend without anything of ours around it, `prefill` measures its prefill,
`replay` and `echo` are bare gRPC servers, `daemon` is a daemon that logs to a file, `silent` is
many clients that read nothing, `library` is the engine's library alone, without our package,
`caller` and `memory` are those of `_pressure_children.py`.
"""

import asyncio
import atexit
import base64
import enum
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, cast

Answer = Callable[[dict[str, Any]], object]

OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
"""Else gRPC lets all channels to one address share one connection."""
_START_TIMEOUT_S = 20.0
_PLAIN_TOKENS = range(1000, 40_000)
"""Token ids without control tokens, as tokenizers put those at an end."""


def main() -> None:
    role, arguments = sys.argv[1], json.loads(sys.argv[2])
    # The protocol's own descriptor: what native code prints must not get between the lines.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(answer: object) -> None:
        answers.write(json.dumps(answer) + "\n")

    if role in SERVERS:
        asyncio.run(SERVERS[role](say, **arguments))
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


def prefill(directory: str, options: dict[str, Any]) -> tuple[object, Answer]:
    """The backend in this process, for prompts that nobody has seen before."""
    from edge_agent.backends.base import Cancelled, LoadOptions
    from edge_agent.backends.llama_cpp import LlamaCpp
    from edge_agent.core import Sampling
    from edge_agent.engines.manifest import MANIFEST_NAME, decode_manifest

    manifest = decode_manifest((Path(directory) / MANIFEST_NAME).read_bytes())
    backend = LlamaCpp()
    backend.load(manifest, Path(directory), LoadOptions(**options), lambda _fraction: None)
    numbers = random.Random(0)  # noqa: S311 - token ids

    def answer(request: dict[str, Any]) -> object:
        """How long the prefill took, or how long after its cancel it ended."""
        cancel = threading.Event()
        since_s = time.monotonic()

        def stop() -> None:
            nonlocal since_s
            since_s = time.monotonic()
            cancel.set()

        timer = threading.Timer(request.get("cancel_after_s", 1e6), stop)
        timer.start()
        try:
            backend.complete(
                numbers.choices(_PLAIN_TOKENS, k=request["tokens"]),
                max_tokens=1,
                schema_json=None,
                lead="",
                sampling=Sampling(),
                stop=(),
                cancel=cancel,
                on_text=lambda _text, _tokens: None,
            )
        except Cancelled:
            pass
        finally:
            timer.cancel()
        return {"ms": (time.monotonic() - since_s) * 1000, "cancelled": cancel.is_set()}

    return {}, answer


def daemon(store: str, config: str) -> tuple[object, Answer]:
    """A daemon that logs to a file: whoever reads its log takes no time from what is timed."""
    directory = Path(tempfile.mkdtemp(prefix="ea-"))
    (directory / "config.yaml").write_text(config)
    command = [
        sys.executable, "-m", "edge_agent", "serve", "--config", str(directory / "config.yaml"),
        "--runtime-dir", str(directory), "--state-dir", str(directory / "state"),
        "--engines-dir", store,
    ]  # fmt: skip
    log = directory / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=file)

    def end() -> None:
        process.kill()
        process.wait()
        shutil.rmtree(directory, ignore_errors=True)

    atexit.register(end)
    until_s = time.monotonic() + _START_TIMEOUT_S
    while b'"daemon_ready"' not in log.read_bytes():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until_s, "the daemon did not become ready"
        time.sleep(0.05)
    sockets = {name: str(directory / f"{name}.sock") for name in ("api", "admin")}
    return {**sockets, "pid": process.pid}, lambda _request: {}


def silent(socket: str, run_ids: list[str]) -> tuple[object, Answer]:
    """One client with a connection of its own for each of `run_ids`, which watches and never reads.

    To be stopped (SIGSTOP) once it has said hello: nothing reads its sockets then.
    """
    import grpc

    from edge_agent.v1 import run_service_pb2 as pb
    from edge_agent.v1.run_service_pb2_grpc import RunServiceStub

    calls = []
    for run_id in run_ids:
        channel = grpc.insecure_channel(f"unix:{socket}", OWN_CONNECTION)
        calls.append(RunServiceStub(channel).WatchRun(pb.WatchRunRequest(run_id=run_id)))
    for call in calls:
        call.initial_metadata()
    return {}, lambda _request: {"watching": sum(call.is_active() for call in calls)}


def caller(socket: str, engines: list[str]) -> tuple[object, Answer]:
    """A client that makes unary calls for as many `seconds` as it is asked, and times them."""
    from benchmarks._pressure_children import call_for

    return {}, lambda request: asyncio.run(call_for(socket, engines, **request))


def memory() -> tuple[object, Answer]:
    """A process that holds as many bytes as it is told (`size_bytes`)."""
    from benchmarks._pressure_children import Memory

    held = Memory()
    return {}, lambda request: held.hold(**request)


async def serve(server: Any, say: Callable[[object], None], take: Answer) -> None:
    """Run a gRPC server until the benchmark hangs up; `take` gets what it is asked."""
    await server.start()
    say({})
    lines = requests()
    while (request := await asyncio.to_thread(next, lines, None)) is not None:
        say(take(request))
    await server.stop(0)


def bare_server(socket: str) -> Any:
    """A gRPC server with one interceptor that does nothing."""
    import grpc

    class Interceptor(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
            return await continuation(handler_call_details)

    server = grpc.aio.server(interceptors=[Interceptor()])
    server.add_insecure_port(f"unix:{socket}")
    return server


async def echo(say: Callable[[object], None], socket: str, answers: dict[str, str]) -> None:
    """A bare server that answers unary calls (by their full names) with given messages."""
    import grpc
    from google.protobuf.descriptor_pool import Default

    from edge_agent.v1 import engine_service_pb2, run_service_pb2, system_service_pb2

    assert all((engine_service_pb2, run_service_pb2, system_service_pb2))  # fill the pool
    server = bare_server(socket)
    for full_name, raw in answers.items():
        service, _, name = full_name.rpartition("/")
        method = Default().FindServiceByName(service).methods_by_name[name]
        handler = _answering(method, base64.b64decode(raw))
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {name: handler}),)
        )
    await serve(server, say, lambda _request: {})


def _answering(method: Any, raw: bytes) -> Any:
    import grpc
    from google.protobuf.message_factory import GetMessageClass

    taken, given = (GetMessageClass(each) for each in (method.input_type, method.output_type))
    message = given.FromString(raw)

    async def answer(_request: Any, _context: Any) -> Any:
        return message

    return grpc.unary_unary_rpc_method_handler(answer, taken.FromString, given.SerializeToString)


async def replay(say: Callable[[object], None], socket: str) -> None:
    """A bare server that sends given messages at given times."""
    from edge_agent.v1 import run_service_pb2 as pb
    from edge_agent.v1 import run_service_pb2_grpc

    messages: list[tuple[float, pb.ExecuteRunResponse]] = []

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

    server = bare_server(socket)
    # The stubs want every method and gRPC's sync server; this one needs neither.
    service = cast(Any, Service)()
    run_service_pb2_grpc.add_RunServiceServicer_to_server(service, server)

    def take(request: dict[str, Any]) -> object:
        messages[:] = [
            (after_s, pb.ExecuteRunResponse.FromString(base64.b64decode(raw)))
            for after_s, raw in request["messages"]
        ]
        return {}

    await serve(server, say, take)


ROLES: dict[str, Callable[..., tuple[object, Answer]]] = {
    "engine": engine, "library": library, "prefill": prefill, "daemon": daemon, "silent": silent,
    "caller": caller, "memory": memory,
}  # fmt: skip
SERVERS: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {"replay": replay, "echo": echo}

if __name__ == "__main__":
    main()
