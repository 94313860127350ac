"""One step: from a request to the model's decision.

Owns which strategy decides, the token budget, and the one repair of an output that is invalid.
Knows no protocol and no process; the backend underneath decodes.

    SCHEMA       one JSON union of all calls and the answer; the model chooses while it writes
    RANKED       the likeliest tool, then its arguments under its schema (`choosing`)
    RANKED_FULL  the same, chosen by how likely the goal is for each tool as well
    NATIVE       free text in the way that the model was trained for, read strictly (`native`)
"""

import dataclasses
import functools
import threading

from edge_agent.backends.base import Backend
from edge_agent.core import ANSWER, BlobPart, RunError, StepRequest, StepResult, ToolStrategy
from edge_agent.decoding import schemas
from edge_agent.decoding.choosing import Chooser
from edge_agent.decoding.prompt import PromptRenderer
from edge_agent.decoding.writing import (
    ANSWER_HEAD,
    InvalidOutput,
    OnText,
    StepWriter,
    call_head,
)
from edge_agent.engines.manifest import Manifest
from edge_agent.errors import StepFailed

_MIN_OUTPUT_TOKENS = 16
"""Room that must be left for an answer when the caller named no maximum."""
_CACHED_SCHEMAS = 512
_SAMPLE_CHARACTERS_PER_TOKEN = 16
"""Far more than a token has, on average: a text that is longer is measured by its beginning."""
_CORRECTION = "That can't be used: {problem}. Write it again, whole and right."


class StepDecoder:
    """Decides steps with one loaded engine. `decide` may be called from many threads."""

    def __init__(self, backend: Backend, manifest: Manifest, context_tokens: int) -> None:
        """Decide with `backend`, loaded for contexts of this size, in the way the manifest says."""
        self._backend = backend
        self._manifest = manifest
        self._context_tokens = context_tokens
        self._renderer = PromptRenderer(
            manifest, lambda text, markers: backend.tokenize(text, markers=markers)
        )
        self._render_lock = threading.Lock()
        self._check_schema = functools.lru_cache(_CACHED_SCHEMAS)(backend.check_schema)
        self._chooser = Chooser(backend, manifest, self._renderer, self._render_lock)

    def decide(self, request: StepRequest, cancel: threading.Event, on_text: OnText) -> StepResult:
        """Decide one step. Blocks.

        Args:
            request: what is to be decided.
            cancel: set from another thread to stop.
            on_text: told the answer's text while it is written, and its number of tokens.

        Raises:
            Cancelled: `cancel` was set.
            StepFailed: the request can't be decided by this engine; says why.
        """
        _refuse_blobs(request)
        self._refuse_hopeless(request)
        strategy = self._strategy(request)
        schemas.check_schemas(request.tools, request.output_schema_json, self._check_schema)
        native = strategy is ToolStrategy.NATIVE
        with self._render_lock:
            prompt = self._renderer.render(request.messages, request.tools, native=native)
        if len(prompt) > self._context_tokens:  # before the heads of many tools take their time
            self._output_budget(len(prompt), request.max_output_tokens)
        try:
            return self._attempt(strategy, request, prompt, cancel, on_text)
        except InvalidOutput as first:
            return self._repair(strategy, request, prompt, first, cancel, on_text)

    def _strategy(self, request: StepRequest) -> ToolStrategy:
        strategy = request.tool_strategy or self._manifest.tools.strategy
        if request.tools and (problem := self._manifest.cannot(strategy)):
            message = f"engine {self._manifest.name} has no strategy {strategy}: {problem}"
            metadata = {"engine": self._manifest.name, "tool_strategy": strategy.value}
            raise StepFailed(RunError("STRATEGY_UNSUPPORTED", message, metadata=metadata))
        return strategy

    def _attempt(
        self,
        strategy: ToolStrategy,
        request: StepRequest,
        prompt: list[int],
        cancel: threading.Event,
        on_text: OnText,
    ) -> StepResult:
        needed = len(prompt) + len(self._plain(request.resume_text))
        needed += self._longest_head(strategy, request)
        max_tokens = self._output_budget(needed, request.max_output_tokens)
        step = StepWriter(
            self._backend, self._manifest, request, prompt, max_tokens, cancel, on_text
        )
        if not request.tools:
            return step.free_answer(self._plain(request.resume_text))
        if strategy is ToolStrategy.NATIVE and self._manifest.tools.native is not None:
            return step.native(self._manifest.tools.native)
        if request.answer_only:
            return step.answer(self._plain(ANSWER_HEAD))
        if strategy is ToolStrategy.SCHEMA:
            return step.union()
        name, margin = self._chooser.choose(strategy, request, prompt, cancel, step.saw_cached)
        if name == ANSWER:
            return step.answer(self._plain(ANSWER_HEAD), margin)
        tool = next(tool for tool in request.tools if tool.name == name)
        return step.arguments(tool, self._plain(call_head(name)), margin)

    def _repair(
        self,
        strategy: ToolStrategy,
        request: StepRequest,
        prompt: list[int],
        first: InvalidOutput,
        cancel: threading.Event,
        on_text: OnText,
    ) -> StepResult:
        """Once more, after what was written and what is wrong with it.

        Raises:
            StepFailed: it is invalid again, or there is no room for another try.
        """
        problem = first.failure.metadata.get("detail", first.failure.message)
        with self._render_lock:
            shown = self._renderer.corrected(first.written, _CORRECTION.format(problem=problem))
        try:
            self._output_budget(len(prompt) + len(shown), request.max_output_tokens)
        except StepFailed:
            raise first.failure from first
        try:
            result = self._attempt(strategy, request, prompt + shown, cancel, on_text)
        except InvalidOutput as second:
            raise second.failure from first
        usage = first.usage.plus(result.usage)
        return dataclasses.replace(result, repaired=True, usage=usage)

    def _plain(self, text: str) -> list[int]:
        with self._render_lock:
            return self._renderer.plain(text)

    def _refuse_hopeless(self, request: StepRequest) -> None:
        """Refuse a message whose beginning alone is too long: to tokenise 4 MiB takes seconds."""
        sample = self._context_tokens * _SAMPLE_CHARACTERS_PER_TOKEN
        for message in request.messages:
            text = message.text
            characters = sample
            while characters < len(text):
                tokens = len(self._plain(text[:characters]))
                if tokens > self._context_tokens:
                    self._output_budget(tokens, request.max_output_tokens, "at least ")
                characters *= 2

    def _longest_head(self, strategy: ToolStrategy, request: StepRequest) -> int:
        """Tokens that come before what is decoded, and are part of the prompt then."""
        if strategy is ToolStrategy.NATIVE:
            return 0
        heads = [ANSWER_HEAD] if request.tools else []
        if not request.answer_only:
            if strategy is ToolStrategy.SCHEMA:
                return 0
            heads += [call_head(tool.name) for tool in request.tools]
        return max((len(self._plain(head)) for head in heads), default=0)

    def _output_budget(self, prompt_tokens: int, wanted: int | None, about: str = "") -> int:
        """How many tokens may be generated; refuses rather than cuts anything."""
        context, ceiling = self._context_tokens, self._manifest.max_output_tokens
        numbers = {
            "prompt_tokens": str(prompt_tokens),
            "context_tokens": str(context),
            "max_output_tokens": str(ceiling if wanted is None else wanted),
        }
        if wanted is not None and wanted > ceiling:
            message = f"max_output_tokens: {wanted}, at most {ceiling} for this engine"
            raise StepFailed(RunError("MAX_OUTPUT_TOO_LONG", message, metadata=numbers))
        needed = _MIN_OUTPUT_TOKENS if wanted is None else wanted
        if prompt_tokens + needed > context:
            message = (
                f"the prompt has {about}{prompt_tokens} tokens and {needed} are needed for the "
                f"output, but the engine's context holds {context}"
            )
            raise StepFailed(RunError("PROMPT_TOO_LONG", message, metadata=numbers))
        return min(ceiling, context - prompt_tokens) if wanted is None else wanted


def _refuse_blobs(request: StepRequest) -> None:
    for index, message in enumerate(request.messages):
        for part in message.parts:
            if isinstance(part, BlobPart):
                raise StepFailed(
                    RunError(
                        "UNSUPPORTED_PART",
                        f"messages[{index}]: {part.kind} parts, but this engine takes text only",
                        metadata={"field": f"messages[{index}]", "kind": part.kind.value},
                    )
                )
