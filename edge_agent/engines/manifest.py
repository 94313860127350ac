"""What a manifest says about an engine, and what makes one valid.

Pure: reads no file. A recipe (`engines/*.yaml`) holds the same fields plus how to obtain the
files; installing writes them as `manifest.json` beside the files. msgspec and the standard library
only, since workers get the manifest in their first frame.
"""

import functools
import hashlib
import re
from pathlib import PurePosixPath
from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import Meta

from edge_agent.core import ToolStrategy
from edge_agent.errors import ManifestError

SCHEMA: Final = 1
NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

MANIFEST_NAME: Final = "manifest.json"
SEAL_NAME: Final = ".seal.json"
MAX_PATH_BYTES: Final = 200

BackendName = Literal["llama_cpp"]
BACKENDS: Final[tuple[str, ...]] = get_args(BackendName)

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
PositiveInt = Annotated[int, Meta(gt=0)]
NonNegativeInt = Annotated[int, Meta(ge=0)]


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base: no field that nobody reads."""


class BackendSpec(Strict, frozen=True, kw_only=True):
    """Which of our backends runs the engine, and the oldest version of its library."""

    name: BackendName
    min_version: str


class FileSpec(Strict, frozen=True, kw_only=True):
    """One file of the engine; `path` is relative to the engine's directory."""

    path: str
    sha256: Sha256
    size_bytes: PositiveInt


class LayerKind(Strict, frozen=True, kw_only=True):
    """KV cache or recurrent state of a group of alike layers, per sequence.

    `bytes_per_token` and `state_bytes` are for ONE layer, keys and values together: the group
    takes `layers * (tokens * bytes_per_token + state_bytes)` bytes for each sequence, where
    `tokens` is at most `window_tokens` in a sliding window. For example 30 full layers with 3 KV
    heads of 64 values in 16 bits: 2 (keys, values) * 3 * 64 * 2 = 768 bytes per token and layer.
    """

    kind: Literal["full", "sliding_window", "recurrent"]
    layers: PositiveInt
    bytes_per_token: NonNegativeInt = 0
    window_tokens: PositiveInt | None = None
    state_bytes: NonNegativeInt = 0


class MemorySpec(Strict, frozen=True, kw_only=True):
    """Estimates with the manifest's slots and context, in bytes, before anything was measured.

    `cache_bytes` of the steady ones are prefix caches that can be given back while it is loaded.
    `prefix_cache_bytes` of them, at most, hold the prefixes of sequences that had to leave their
    slot, so that they need not be read again when they come back.
    """

    load_peak_bytes: PositiveInt
    steady_bytes: PositiveInt
    cache_bytes: NonNegativeInt = 0
    prefix_cache_bytes: NonNegativeInt = 0


class Turn(Strict, frozen=True, kw_only=True):
    """The markers around one message. Only these are parsed for control tokens."""

    open: str
    close: str


class PromptFormat(Strict, frozen=True, kw_only=True):
    """How messages become a prompt."""

    system: Turn
    user: Turn
    assistant: Turn
    tool: Turn
    prefix: str = ""
    default_system: str


class NativeFormat(Strict, frozen=True, kw_only=True):
    """How a model was trained to call tools.

    `instructions` follow the system's text; `{tools}` in them becomes the tools, a JSON object a
    line. `call` stands around each call, a JSON object with `name` and `arguments`, and `result`
    around a tool's result.
    """

    instructions: str
    call: Turn
    result: Turn


class ReverseFormat(Strict, frozen=True, kw_only=True):
    """How the model is asked what somebody says who wants a tool, or no tool.

    `question` has `{tool}` where the tool stands, in one line; the goals of its worked examples
    follow as answers. `answer_question` and `answer_goals`: the same where no tool fits.
    """

    system: str
    question: str
    answer_question: str
    answer_goals: tuple[str, ...]


class ToolFormat(Strict, frozen=True, kw_only=True):
    """How tools are shown to the model and chosen; `decoding.steps` says what each strategy does.

    A tool's worked examples end in `example_answer`; `answer_examples` are goals that need no tool,
    answered. `neutral_goals`, `neutral_share` (of the score after them, how much is taken off) and
    `top_logprobs` are for the ranked strategies, `reverse` for ranked_full, `native` for native.
    """

    strategy: ToolStrategy
    instructions: str
    native: NativeFormat | None = None
    reverse: ReverseFormat | None = None
    example_result: str = "ok"
    example_answer: str = "Done."
    answer_examples: tuple[tuple[str, str], ...] = ()
    neutral_goals: tuple[str, ...] = ()
    neutral_share: Annotated[float, Meta(ge=0.0, le=1.0)] = 1.0
    top_logprobs: Annotated[int, Meta(ge=1, le=10_000)] = 400


class SourceSpec(Strict, frozen=True, kw_only=True):
    """Where the files came from."""

    kind: Literal["pypi", "path"]
    location: str
    version: str = ""
    sha256: Sha256 | None = None


class Manifest(Strict, frozen=True, kw_only=True):
    """Everything the daemon and a worker need to know about an engine."""

    schema: Literal[1] = SCHEMA
    name: str
    description: str
    backend: BackendSpec
    model: str
    files: tuple[FileSpec, ...]
    context_tokens: Annotated[int, Meta(ge=256, le=1_048_576)]
    max_output_tokens: PositiveInt
    slots: Annotated[int, Meta(ge=1, le=64)]
    layers: tuple[LayerKind, ...]
    memory: MemorySpec
    prompt: PromptFormat
    tools: ToolFormat
    stop: tuple[str, ...]
    capabilities: tuple[Literal["text", "tools", "output_schema"], ...]
    licence: str
    source: SourceSpec

    def check(self) -> None:
        """Raise what the field types alone can't see.

        Raises:
            ManifestError: names the field, the value and the rule.
        """
        check_name(self.name)
        _check_files([spec.path for spec in self.files])
        if not any(spec.path == self.model for spec in self.files):
            raise ManifestError(f"model: {self.model!r} is not among files")
        if self.max_output_tokens >= self.context_tokens:
            raise ManifestError(
                f"max_output_tokens: {self.max_output_tokens}, must be below context_tokens "
                f"({self.context_tokens})"
            )
        if self.memory.load_peak_bytes < self.memory.steady_bytes:
            raise ManifestError("memory.load_peak_bytes: must be at least steady_bytes")
        if self.memory.cache_bytes >= self.memory.steady_bytes:
            raise ManifestError("memory.cache_bytes: must be below steady_bytes")
        if self.memory.prefix_cache_bytes >= self.memory.steady_bytes:
            raise ManifestError("memory.prefix_cache_bytes: must be below steady_bytes")
        if problem := self.cannot(self.tools.strategy):
            raise ManifestError(problem)

    def cannot(self, strategy: ToolStrategy) -> str | None:
        """Why the engine can't choose tools in this way; None if it can."""
        if strategy in (ToolStrategy.RANKED, ToolStrategy.RANKED_FULL):
            if not self.tools.neutral_goals:
                return f"tools.neutral_goals: the {strategy} strategy needs at least one"
            if strategy is ToolStrategy.RANKED_FULL and self.tools.reverse is None:
                return "tools.reverse: is not set, the ranked_full strategy needs it"
        elif strategy is ToolStrategy.NATIVE:
            if self.tools.native is None:
                return "tools.native: is not set, the native strategy needs it"
            if not (self.tools.native.call.open.strip() and self.tools.native.call.close.strip()):
                return "tools.native.call: open and close must not be blank"
        return None


def check_name(name: str) -> None:
    """An engine's name is safe as a directory name.

    Raises:
        ManifestError: names the value and the pattern.
    """
    if not NAME.fullmatch(name):
        raise ManifestError(f"name: {name!r}, must match {NAME.pattern}", metadata={"name": name})


def check_path(path: str) -> None:
    """A file of an engine lies below the engine's directory, under one spelling.

    Raises:
        ManifestError: names the value and the rule.
    """
    pure = PurePosixPath(path)
    wrong = pure.is_absolute() or ".." in pure.parts or str(pure) != path or path == "."
    if wrong or "\\" in path or not path.isprintable() or len(path.encode()) > MAX_PATH_BYTES:
        raise ManifestError(
            f"files: path {path!r}, must be relative and plain, without '..', '\\' or unprintable "
            f"characters, at most {MAX_PATH_BYTES} bytes",
            metadata={"path": path},
        )


def _check_files(paths: list[str]) -> None:
    """No two files in one place, and none where the manifest or the seal goes."""
    for path in paths:
        check_path(path)
    taken = [*paths, MANIFEST_NAME, SEAL_NAME]
    for path in taken:
        above = {str(parent) for parent in PurePosixPath(path).parents}
        if taken.count(path) > 1 or above.intersection(taken):
            raise ManifestError(
                f"files: path {path!r} is taken by another file or the manifest",
                metadata={"path": path},
            )


def decode_manifest(raw: bytes) -> Manifest:
    """A manifest from `manifest.json`.

    Raises:
        ManifestError: says where and what.
    """
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ManifestError(f"manifest.json: {error}") from error
    manifest.check()
    return manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`; the same manifest gives the same bytes."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


@functools.lru_cache(maxsize=64)
def digest(manifest: Manifest) -> str:
    """SHA-256 over the manifest, which holds the files' own digests: one engine, one digest."""
    return hashlib.sha256(encode_manifest(manifest)).hexdigest()


@functools.lru_cache(maxsize=64)
def template_hash(manifest: Manifest) -> str:
    """The first 16 digits of SHA-256 over how prompts are rendered and tools chosen."""
    content = msgspec.json.encode((manifest.prompt, manifest.tools))
    return hashlib.sha256(content).hexdigest()[:16]
