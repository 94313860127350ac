"""The messages between the daemon and a worker.

Version 1: each frame (`edge_agent.frames`) is one MessagePack map, tagged by `t`. The
first frame of a worker is `Hello`, the first of the daemon is `Load`; both carry the version and a
mismatch ends the worker. Needs msgspec and nothing else, since a worker may run in an environment
of its own.
"""

import msgspec

from edge_agent import frames
from edge_agent.core import RunError, StepRequest, StepResult
from edge_agent.engines.manifest import Manifest

PROTOCOL_VERSION = 1


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to load an engine; chosen by the daemon, not by the manifest."""

    slots: int
    context_tokens: int
    threads: int | None
    prefill_batch_tokens: int
    backlog_tokens: int
    backlog_s: float


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="t"):
    """Base: after the versions agreed, a field that one end does not know is a fault."""


class Load(_Message, frozen=True, forbid_unknown_fields=False, tag="load"):
    """Load this engine. Sent once."""

    version: int
    manifest: Manifest
    directory: str
    options: Options


class Generate(_Message, frozen=True, tag="generate"):
    """Decide one step. `sequence` is unique within the worker."""

    sequence: int
    request: StepRequest


class Cancel(_Message, frozen=True, tag="cancel"):
    """Stop deciding; answered by the sequence's `Failed` with reason CANCELLED, or its end."""

    sequence: int


class DropCache(_Message, frozen=True, tag="drop_cache"):
    """Give back the memory of prefix caches that no sequence uses."""


class Ping(_Message, frozen=True, tag="ping"):
    """Answered by `Pong` from the worker's main loop."""

    nonce: int


class Shutdown(_Message, frozen=True, tag="shutdown"):
    """End now."""


class Hello(_Message, frozen=True, forbid_unknown_fields=False, tag="hello"):
    """The worker is up."""

    version: int


class Loading(_Message, frozen=True, tag="loading"):
    """Progress of the load, 0 to 1."""

    fraction: float


class Ready(_Message, frozen=True, tag="ready"):
    """The engine takes steps, this many at once."""

    slots: int
    load_s: float
    backend_version: str


class Refused(_Message, frozen=True, tag="refused"):
    """The engine could not be loaded; the worker ends."""

    error: RunError


class Pong(_Message, frozen=True, tag="pong"):
    """The answer to `Ping`."""

    nonce: int


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """More text of one sequence."""

    sequence: int
    text: str
    tokens: int


class Finished(msgspec.Struct, frozen=True, array_like=True):
    """A sequence ended with a decision."""

    sequence: int
    result: StepResult


class Failed(msgspec.Struct, frozen=True, array_like=True):
    """A sequence ended without one."""

    sequence: int
    error: RunError


class Batch(_Message, frozen=True, tag="batch"):
    """What one engine step brought, for all active sequences."""

    deltas: tuple[Delta, ...] = ()
    finished: tuple[Finished, ...] = ()
    failed: tuple[Failed, ...] = ()


ToWorker = Load | Generate | Cancel | DropCache | Ping | Shutdown
ToDaemon = Hello | Loading | Ready | Refused | Pong | Batch

_encoder = msgspec.msgpack.Encoder()
to_worker_decoder = msgspec.msgpack.Decoder(ToWorker)
to_daemon_decoder = msgspec.msgpack.Decoder(ToDaemon)


def encode(message: ToWorker | ToDaemon) -> bytes:
    """One whole frame.

    Raises:
        ValueError: it would exceed `frames.MAX_FRAME_BYTES`.
    """
    return frames.frame(_encoder.encode(message))
