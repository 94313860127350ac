"""The embedded engine in this process, for tests of prompts and schemas: nothing is decoded."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_agent.backends import create_backend
from edge_agent.backends.base import Backend, LoadOptions
from edge_agent.decoding.prompt import PromptRenderer
from edge_agent.engines.manifest import MANIFEST_NAME, Manifest, decode_manifest

_OPTIONS = LoadOptions(slots=1, context_tokens=256, threads=1, prefill_batch_tokens=64)


@dataclass(frozen=True)
class Engine:
    """A loaded engine with the smallest context; tokenises and checks schemas as any other."""

    backend: Backend
    manifest: Manifest
    renderer: PromptRenderer


@contextlib.contextmanager
def loaded_engine(directory: Path) -> Iterator[Engine]:
    """The engine in a directory of a store, for as long as the block runs."""
    manifest = decode_manifest((directory / MANIFEST_NAME).read_bytes())
    backend = create_backend(manifest.backend.name)
    backend.load(manifest, directory, _OPTIONS, lambda _fraction: None)
    try:
        renderer = PromptRenderer(
            manifest, lambda text, markers: backend.tokenize(text, markers=markers)
        )
        yield Engine(backend, manifest, renderer)
    finally:
        backend.close()
