"""A toy engine: one token a character, and a model that writes what its test says."""

import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.backends.base import Cancelled, Completion, Likelihood, LoadOptions, NextToken
from edge_agent.backends.llama_cpp import LlamaCpp
from edge_agent.core import Sampling
from edge_agent.engines.manifest import Manifest, decode_manifest
from tests.support.engine_files import FILES, recipe_data

MARKERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|begin|>")
FIRST_MARKER = 0x110000  # above every code point
CONTEXT_TOKENS = 2048
_SPLIT = re.compile("(" + "|".join(re.escape(marker) for marker in MARKERS) + ")")


def tokenize(text: str, markers: bool) -> list[int]:  # noqa: FBT001 - the renderer's call
    """One token a code point, and one a marker where markers are parsed."""
    text.encode()  # as real tokenizers: raises for what is no text
    if not markers:
        return [ord(character) for character in text]
    ids: list[int] = []
    for piece in _SPLIT.split(text):
        if piece in MARKERS:
            ids.append(FIRST_MARKER + MARKERS.index(piece))
        else:
            ids += [ord(character) for character in piece]
    return ids


def text_of(ids: Sequence[int]) -> str:
    """The tokens as text, markers in their own words."""
    return "".join(
        MARKERS[token - FIRST_MARKER] if token >= FIRST_MARKER else chr(token) for token in ids
    )


def markers_of(ids: Sequence[int]) -> list[str]:
    """The markers among the tokens."""
    return [MARKERS[token - FIRST_MARKER] for token in ids if token >= FIRST_MARKER]


def manifest(**tools: Any) -> Manifest:
    """The toy's manifest, with changes to how it takes tools."""
    data: dict[str, Any] = recipe_data(FILES)
    del data["obtain"]
    data["source"] = {"kind": "path", "location": "files"}
    data["prompt"] = {
        role: {"open": f"<|{role}|>", "close": "<|end|>"}
        for role in ("system", "user", "assistant", "tool")
    } | {"prefix": "<|begin|>", "default_system": "You help."}
    data["tools"] = {
        "strategy": "schema",
        "instructions": "Tools:",
        "answer_examples": [["Hi.", "Hello!"]],
        **tools,
    }
    data["stop"] = ["<|end|>"]
    return decode_manifest(msgspec.json.encode(data))


class ToyBackend:
    """Implements `Backend`: `writes` is what it decodes, a token each; `prefers` scores texts."""

    def __init__(self) -> None:
        self.writes: Callable[[str], Sequence[str]] = lambda _prompt: ("Hello",)
        self.prefers: Callable[[str, str], float] = lambda _prompt, _next: -1.0
        self.completions: list[dict[str, Any]] = []
        self.rankings: list[str] = []
        self.forced: list[tuple[str, str]] = []

    def load(
        self,
        manifest: Manifest,
        directory: Path,
        options: LoadOptions,
        progress: Callable[[float], None],
    ) -> None:
        """Nothing to load."""

    def version(self) -> str:
        """Of the toy."""
        return "1"

    def tokenize(self, text: str, *, markers: bool) -> list[int]:
        """One token a character."""
        return tokenize(text, markers)

    def check_schema(self, schema_json: str) -> str | None:
        """As the embedded engine."""
        return LlamaCpp().check_schema(schema_json)

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
        """Write what the test says, up to the limit."""
        self.completions.append(
            {
                "prompt": text_of(prompt),
                "max_tokens": max_tokens,
                "schema_json": schema_json,
                "lead": lead,
                "sampling": sampling,
                "stop": stop,
            }
        )
        pieces = list(self.writes(text_of(prompt)))
        for piece in pieces[:max_tokens]:
            if cancel.is_set():
                raise Cancelled
            on_text(piece, 1)
        written = min(len(pieces), max_tokens)
        return Completion(len(pieces) > max_tokens, len(prompt), 3, written, 0.5)

    def next_token_logprobs(
        self, prompt: Sequence[int], *, top: int, cancel: threading.Event
    ) -> NextToken:
        """Score each character that may come next."""
        if cancel.is_set():
            raise Cancelled
        text = text_of(prompt)
        self.rankings.append(text)
        scores = {ord(c): self.prefers(text, c) for c in map(chr, range(32, 127))}
        likeliest = sorted(scores.items(), key=lambda item: -item[1])[:top]
        return NextToken(dict(likeliest), cached_tokens=len(self.rankings))

    def log_likelihood(
        self, prompt: Sequence[int], text: str, *, cancel: threading.Event
    ) -> Likelihood:
        """The sum of what each character in its place is preferred by."""
        if cancel.is_set():
            raise Cancelled
        shown = text_of(prompt)
        self.forced.append((shown, text))
        total = sum(self.prefers(shown + text[:at], text[at]) for at in range(len(text)))
        return Likelihood(total, cached_tokens=len(self.forced))

    def drop_cache(self) -> None:
        """None is kept."""

    def close(self) -> None:
        """Nothing to let go of."""
