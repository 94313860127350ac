"""llama.cpp through `xllamacpp`: GGUF models on the CPU (or a GPU that the build supports).

The library brings a whole server. Its in-process calls are used for decoding; its HTTP listener,
which can't be turned off, is confined to a unix socket in a 0700 directory behind a random key and
used for tokenising, for which there is no in-process call.
"""

import http.client
import json
import os
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.backends.base import (
    Cancelled,
    Completion,
    Likelihood,
    LoadOptions,
    NextToken,
)
from edge_agent.core import RunError, Sampling
from edge_agent.engines.manifest import Manifest
from edge_agent.errors import LoadFailed, StepFailed
from edge_agent.units import MIB

_CONNECT_TIMEOUT_S = 5.0
_CERTAIN = 1000.0
"""A bias that outweighs every logit."""


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None
    logprobs: Any = None


class _Timings(msgspec.Struct):
    cache_n: int
    prompt_n: int
    predicted_n: int
    predicted_ms: float


class _Chunk(msgspec.Struct):
    """What we read of an OpenAI-style stream chunk."""

    choices: tuple[_Choice, ...] = ()
    timings: _Timings | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class LlamaCpp:
    """Implements `Backend`."""

    def __init__(self) -> None:
        """Nothing is loaded yet."""
        self._server: Any = None
        self._socket_dir = ""
        self._listener = _Listener("", "")
        self._whole_character = 0

    def load(
        self,
        manifest: Manifest,
        directory: Path,
        options: LoadOptions,
        progress: Callable[[float], None],
    ) -> None:
        """Load the model file; llama.cpp reports no progress in between."""
        # OpenMP must not spin on busy cores: two threads fell from 112 to 4 tokens/s with it.
        os.environ.setdefault("GOMP_SPINCOUNT", "0")
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        import xllamacpp

        self._socket_dir = tempfile.mkdtemp(prefix="edge-agent-")
        self._listener = _Listener(f"{self._socket_dir}/engine.sock", secrets.token_hex(16))
        params = server_parameters(manifest, directory, options)
        params.hostnames = [self._listener.path]
        params.api_keys = [self._listener.key]
        progress(0.0)
        try:
            self._server = xllamacpp.Server(params)
        except (RuntimeError, ValueError, OSError) as error:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
            raise LoadFailed(
                f"llama.cpp could not load {manifest.model}: {error}",
                metadata={"engine": manifest.name, "file": manifest.model, "detail": error},
            ) from error
        self._whole_character = self.tokenize("a", markers=False)[0]
        progress(1.0)

    def version(self) -> str:
        """The version of xllamacpp."""
        return metadata.version("xllamacpp")

    def tokenize(self, text: str, *, markers: bool) -> list[int]:
        """Through the listener: 0.3 to 1 ms."""
        body = {"content": text, "add_special": False, "parse_special": markers}
        tokens: list[int] = self._listener.post("/tokenize", body)["tokens"]
        return tokens

    def check_schema(self, schema_json: str) -> str | None:
        """Compile the schema: llama.cpp itself ignores a grammar that does not compile."""
        import llguidance

        error: str = llguidance.LLMatcher.validate_grammar(_grammar(schema_json, ""))
        if not error:
            return None
        return error.splitlines()[0].split("failed to compile JSON schema: ")[-1]

    def complete(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        schema_json: str | None,
        lead: str,
        sampling: Sampling,
        stop: Sequence[str],
        cancel: threading.Event,
        on_text: Callable[[str, int], None],
    ) -> Completion:
        """Decode in this thread; the native code drops the GIL."""
        body: dict[str, Any] = {
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop": list(stop),
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if schema_json is not None:
            body["grammar"] = _grammar(schema_json, lead)
        # A character of several tokens comes in one chunk, so the tokens are counted there.
        body["timings_per_token"] = True
        last = _Chunk()
        told = 0

        def take(chunk: _Chunk) -> None:
            nonlocal last, told
            last = chunk
            text = chunk.choices[0].text if chunk.choices else ""
            if text and chunk.timings is not None:
                tokens, told = chunk.timings.predicted_n - told, chunk.timings.predicted_n
                on_text(text, tokens)

        self._stream(body, cancel, take)
        if last.timings is None or not last.choices:
            raise StepFailed(RunError("ENGINE_FAILED", "llama.cpp ended without a result", True))
        return Completion(
            truncated=last.choices[0].finish_reason == "length",
            prompt_tokens=last.timings.cache_n + last.timings.prompt_n,
            cached_tokens=last.timings.cache_n,
            completion_tokens=last.timings.predicted_n,
            decode_s=last.timings.predicted_ms / 1000,
        )

    def next_token_logprobs(
        self, prompt: Sequence[int], *, top: int, cancel: threading.Event
    ) -> NextToken:
        """One token with its alternatives, from the logits before any grammar."""
        body = {"prompt": list(prompt), "max_tokens": 1, "temperature": 0, "logprobs": top}
        # Nothing is reported after a token that is only part of a character: draw another one.
        body["logit_bias"] = [[self._whole_character, _CERTAIN]]
        found: dict[int, float] = {}
        cached_tokens = 0

        def take(chunk: _Chunk) -> None:
            nonlocal cached_tokens
            if chunk.timings is not None:
                cached_tokens = chunk.timings.cache_n
            for choice in chunk.choices:
                for token in (choice.logprobs or {}).get("content", ())[:1]:
                    found.update({t["id"]: t["logprob"] for t in token["top_logprobs"]})

        self._stream(body, cancel, take)
        if not found:
            raise StepFailed(RunError("ENGINE_FAILED", "llama.cpp gave no log-probabilities", True))
        return NextToken(found, cached_tokens)

    def log_likelihood(
        self, prompt: Sequence[int], text: str, *, cancel: threading.Event
    ) -> Likelihood:
        """A grammar forces the text; the logits are those before it."""
        body = {
            "prompt": list(prompt),
            "max_tokens": len(text.encode()) + 1,  # no token is less than a byte
            "temperature": 0,
            "logprobs": 1,
            "grammar": f"%llguidance {{}}\nstart: {json.dumps(text)}",
        }
        found: list[float] = []
        cached_tokens = 0
        written = ""

        def take(chunk: _Chunk) -> None:
            nonlocal cached_tokens, written
            if chunk.timings is not None:
                cached_tokens = chunk.timings.cache_n
            for choice in chunk.choices:
                if choice.text:
                    written += choice.text
                    content = (choice.logprobs or {}).get("content", ())
                    found.extend(token["logprob"] for token in content)

        self._stream(body, cancel, take)
        if written != text or not found:
            raise StepFailed(RunError("ENGINE_FAILED", "llama.cpp gave no log-probabilities", True))
        return Likelihood(sum(found), cached_tokens)

    def drop_cache(self) -> None:
        """The library can't: what the slots and the prefix cache hold stays until the end."""

    def close(self) -> None:
        """Join the native loop. What it leaks goes with the process."""
        self._listener.close()
        self._server = None
        shutil.rmtree(self._socket_dir, ignore_errors=True)

    def _stream(
        self, body: dict[str, Any], cancel: threading.Event, take: Callable[[_Chunk], None]
    ) -> None:
        # With progress reports, a cancel is seen between two batches of the prefill as well.
        request = {**body, "stream": True, "return_progress": True, "cache_prompt": True}
        failure: Exception | None = None

        def on_chunk(raw: bytes) -> bool:
            nonlocal failure
            try:
                chunk = _decode_chunk(raw)
                if chunk.error is not None:
                    failure = _refused(chunk.error)
                elif not cancel.is_set():
                    take(chunk)
            except Exception as error:  # noqa: BLE001 - must not unwind through native code
                failure = error
            return failure is not None or cancel.is_set()

        try:
            self._server.handle_completions(msgspec.json.encode(request), on_chunk)
        except (RuntimeError, ValueError) as error:
            raise _refused(error) from error
        if failure is not None:
            raise failure
        if cancel.is_set():
            raise Cancelled


def server_parameters(manifest: Manifest, directory: Path, options: LoadOptions) -> Any:
    """How the library is told to load an engine, its listener apart."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(directory / manifest.model)
    params.n_ctx = options.context_tokens * options.slots  # divided among the slots
    params.n_parallel = options.slots
    threads = options.threads or max(1, len(os.sched_getaffinity(0)) - 1)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    # A prefill can be cancelled between batches only.
    params.n_batch = params.n_ubatch = options.prefill_batch_tokens
    # Of sequences that had to leave their slot. The default is 8 GiB that nobody counts.
    params.cache_ram_mib = manifest.memory.prefix_cache_bytes // MIB
    # Without mmap the weights count as used memory, and unloading visibly gives them back.
    params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    params.verbosity = 1  # errors: they tell why a load failed
    params.ui = False
    params.endpoint_slots = False
    return params


def _refused(detail: object) -> StepFailed:
    text = detail.get("message", detail) if isinstance(detail, dict) else detail
    return StepFailed(RunError("ENGINE_FAILED", f"llama.cpp: {text}", retryable=True))


def _grammar(schema_json: str, lead: str) -> str:
    schema = json.loads(schema_json)
    if isinstance(schema, dict):
        # Never llama.cpp's own `json_schema`: it drops keywords that it can't enforce in silence.
        schema = {"x-guidance": {"whitespace_flexible": False}, **schema}
    start = f"{json.dumps(lead)} " if lead else ""
    return f"%llguidance {{}}\nstart: {start}%json {json.dumps(schema)}"


class _Listener:
    """The library's own HTTP listener, over its unix socket. Thread-safe."""

    def __init__(self, path: str, key: str) -> None:
        self.path = path
        self.key = key
        self._idle: list[_UnixConnection] = []

    def post(self, route: str, body: dict[str, Any]) -> Any:
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        for attempt in (1, 2):
            # The listener closes idle connections; a fresh one tells that from a real fault.
            connection = _UnixConnection(self.path) if attempt > 1 else self._connection()
            try:
                connection.request("POST", route, msgspec.json.encode(body), headers)
                response = connection.getresponse()
                raw = response.read()
            except (http.client.HTTPException, OSError):
                connection.close()
                if attempt > 1:
                    raise
                continue
            self._idle.append(connection)
            if response.status != http.HTTPStatus.OK:
                raise _refused(raw.decode(errors="replace"))
            return msgspec.json.decode(raw)
        raise AssertionError("unreachable")

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _connection(self) -> "_UnixConnection":
        try:
            return self._idle.pop()
        except IndexError:
            return _UnixConnection(self.path)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_CONNECT_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_CONNECT_TIMEOUT_S)
        self.sock.connect(self._path)
