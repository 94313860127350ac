"""What every backend must do. `tests/contract` holds each one to it.

A backend lives inside one worker process and hosts one engine. It knows tokens and grammars,
nothing of tools, messages, runs or the protocol.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_agent.core import Sampling
from edge_agent.engines.manifest import Manifest


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load; each slot has a context of its own, `threads` None leaves one core free."""

    slots: int
    context_tokens: int
    threads: int | None
    prefill_batch_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """How one completion ended. Counts are in tokens, times in milliseconds or seconds."""

    truncated: bool
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    decode_s: float


@dataclass(frozen=True, slots=True)
class NextToken:
    """What may come after a prompt: natural-log probabilities by token id."""

    logprobs: dict[int, float]
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The natural-log probability of a text after a prompt, summed over its tokens."""

    logprob: float
    cached_tokens: int


class Cancelled(Exception):
    """The completion was stopped by its cancel event."""


class Backend(Protocol):
    """One loaded engine. `complete` and `next_token_logprobs` are called from many threads."""

    def load(
        self,
        manifest: Manifest,
        directory: Path,
        options: LoadOptions,
        progress: Callable[[float], None],
    ) -> None:
        """Load the engine. Called once, before anything else.

        Args:
            manifest: of the engine.
            directory: holds the manifest's files.
            options: how to load it.
            progress: told the fraction done, 0 to 1, as far as it is known.

        Raises:
            LoadFailed: with the library's own words.
        """

    def version(self) -> str:
        """The version of the library underneath."""

    def tokenize(self, text: str, *, markers: bool) -> list[int]:
        """Token ids of `text`; control tokens only with `markers`, else all is plain text."""

    def check_schema(self, schema_json: str) -> str | None:
        """What of a JSON Schema can't be enforced while decoding, in words; None if all can."""

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
        """Decode after `prompt` until the model or a limit ends it. Blocks.

        Args:
            prompt: token ids, at least one.
            max_tokens: how many may be generated, at least 1.
            schema_json: decode JSON that satisfies this schema and nothing else.
            lead: with a schema, text that comes before the JSON, so that the prompt can end where
                a token naturally ends (a space is part of the token after it).
            sampling: how tokens are drawn.
            stop: texts that end the completion and are not part of it.
            cancel: set from another thread to stop, also during prefill.
            on_text: told each piece of text, whole characters, and its number of tokens. These
                add up to the completion's, less those without text (the end, a stop text).

        Raises:
            Cancelled: `cancel` was set.
            StepFailed: the library refused or failed.
        """

    def next_token_logprobs(
        self, prompt: Sequence[int], *, top: int, cancel: threading.Event
    ) -> "NextToken":
        """How likely the `top` likeliest next tokens are. Blocks.

        Raises:
            Cancelled: `cancel` was set.
            StepFailed: the library refused or failed.
        """

    def log_likelihood(
        self, prompt: Sequence[int], text: str, *, cancel: threading.Event
    ) -> "Likelihood":
        """How likely it is that exactly `text` comes next, whatever the model would prefer. Blocks.

        Raises:
            Cancelled: `cancel` was set.
            StepFailed: the library refused or failed.
        """

    def drop_cache(self) -> None:
        """Give back the memory of prefix caches that no sequence uses (`memory.cache_bytes`)."""

    def close(self) -> None:
        """Let go of the engine and of what it has on disk, for a process that goes on.

        A worker ends its process instead: nothing native may hold up an unload.
        """
