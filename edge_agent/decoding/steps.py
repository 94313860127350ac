"""One step: from a request to the model's decision.

Owns the strategies (`ranked`, `schema`) and the token budget. Knows no protocol and no process;
the backend underneath decodes.
"""

import functools
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from edge_agent.backends.base import Backend, Completion
from edge_agent.core import (
    ANSWER,
    BlobPart,
    FinishReason,
    Message,
    Role,
    RunError,
    StepRequest,
    StepResult,
    Tool,
    ToolCall,
    Usage,
)
from edge_agent.decoding import ranking, schemas
from edge_agent.decoding.json_text import JsonStringReader
from edge_agent.decoding.prompt import PromptRenderer, to_json
from edge_agent.engines.manifest import Manifest
from edge_agent.errors import StepFailed

OnText = Callable[[str, int], None]
_BaselineKey = tuple[tuple[Message, ...], tuple[Tool, ...]]

_ANSWER_HEAD = f'{{"{ANSWER}":'
_LEAD = " "
"""What models write between the colon and the value."""

_CACHED_BASELINES = 32
_MIN_OUTPUT_TOKENS = 16
"""Room that must be left for an answer when the caller named no maximum."""
_CACHED_SCHEMAS = 512
_SAMPLE_CHARACTERS_PER_TOKEN = 16
"""Far more than a token has, on average: a text that is longer is measured by its beginning."""


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
        self._baselines: OrderedDict[_BaselineKey, dict[str, float]] = OrderedDict()

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
        schemas.check_schemas(request.tools, request.output_schema_json, self._check_schema)
        with self._render_lock:
            prompt = self._renderer.render(request.messages, request.tools)
        if len(prompt) > self._context_tokens:  # before the heads of many tools take their time
            self._output_budget(len(prompt), request.max_output_tokens)
        needed = len(prompt) + self._longest_head(request) + len(self._plain(request.resume_text))
        max_tokens = self._output_budget(needed, request.max_output_tokens)
        step = _Step(self._backend, self._manifest, request, prompt, max_tokens, cancel, on_text)
        if not request.tools:
            return step.free_answer(self._plain(request.resume_text))
        if request.answer_only:
            return step.answer(self._plain(_ANSWER_HEAD))
        if self._manifest.tools.strategy == "schema":
            return step.union()
        name, margin = self._choose(step)
        if name == ANSWER:
            return step.answer(self._plain(_ANSWER_HEAD), margin)
        tool = next(tool for tool in request.tools if tool.name == name)
        return step.arguments(tool, self._plain(_call_head(name)), margin)

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

    def _longest_head(self, request: StepRequest) -> int:
        """Tokens that come before what is decoded, and are part of the prompt then."""
        heads = [_ANSWER_HEAD] if request.tools else []
        if not request.answer_only:
            if self._manifest.tools.strategy == "schema":
                return 0
            heads += [_call_head(tool.name) for tool in request.tools]
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

    def _choose(self, step: "_Step") -> tuple[str, float]:
        """The tool's name or ANSWER, and how far it is ahead.

        The neutral prompts stand where a user has just spoken, so their baseline is fair there.
        After a tool's result it is not: there the raw scores decide whether to answer.
        """
        request = step.request
        candidates = {tool.name: self._plain(_call_head(tool.name)) for tool in request.tools}
        candidates[ANSWER] = self._plain(_ANSWER_HEAD)
        scores = self._rank(candidates, step.prompt, step)
        calibrated = ranking.calibrate(scores, self._baseline(candidates, step))
        if request.messages[-1].role is Role.TOOL:
            if max(scores, key=scores.__getitem__) == ANSWER:
                return ANSWER, ranking.margin(scores)
            del calibrated[ANSWER]
        return max(calibrated, key=calibrated.__getitem__), ranking.margin(calibrated)

    def _baseline(self, candidates: dict[str, list[int]], step: "_Step") -> dict[str, float]:
        """Mean scores after the neutral prompts, measured once for each system text and tools."""
        first, tools = step.request.messages[0], step.request.tools
        system = (first,) if first.role is Role.SYSTEM else ()
        cached = self._baselines.get((system, tools))
        if cached is None:
            with self._render_lock:
                head = self._renderer.render(system, tools)
                opening = len(self._renderer.markers(self._manifest.prompt.assistant.open))
                goals = self._manifest.tools.neutral_goals
                prompts = [
                    head[: len(head) - opening] + self._renderer.user_turn(goal) for goal in goals
                ]
            cached = ranking.mean([self._rank(candidates, p, step) for p in prompts])
            self._baselines[system, tools] = cached
            while len(self._baselines) > _CACHED_BASELINES:
                self._baselines.popitem(last=False)
        return cached

    def _rank(
        self, candidates: dict[str, list[int]], prompt: Sequence[int], step: "_Step"
    ) -> dict[str, float]:
        top = self._manifest.tools.top_logprobs

        def logprobs(tokens: Sequence[int]) -> dict[int, float]:
            prompt_and_tokens = [*prompt, *tokens]
            found = self._backend.next_token_logprobs(
                prompt_and_tokens, top=top, cancel=step.cancel
            )
            step.saw_cached(found.cached_tokens)
            return found.logprobs

        return ranking.rank(candidates, logprobs)


class _Step:
    """One step being decided: its request, prompt and budget, and the clock for its TTFT."""

    def __init__(
        self,
        backend: Backend,
        manifest: Manifest,
        request: StepRequest,
        prompt: list[int],
        max_tokens: int,
        cancel: threading.Event,
        on_text: OnText,
    ) -> None:
        self._backend = backend
        self._manifest = manifest
        self.request = request
        self.prompt = prompt
        self._max_tokens = max_tokens
        self.cancel = cancel
        self._on_text = on_text
        self._started_s = time.monotonic()
        self._ttft_ms: float | None = None
        self._cached_tokens: int | None = None

    def saw_cached(self, cached_tokens: int) -> None:
        """What the cache held before this step: the first call tells, later ones see its work."""
        if self._cached_tokens is None:
            self._cached_tokens = cached_tokens

    def free_answer(self, resumed: list[int]) -> StepResult:
        """No tools: text, after what it has written of it already, or JSON of the output schema."""
        schema = self.request.output_schema_json or None
        text, completion = self._complete([] if schema else resumed, schema, self._on_text)
        if schema is None:
            return self._result(self.request.resume_text + text, (), completion)
        self._require_whole(completion)
        schemas.validate(schema, text)
        return self._result(text, (), completion)

    def answer(self, head: list[int], margin: float | None = None) -> StepResult:
        """The answer branch, after its head `{"answer":`."""
        schema = self.request.output_schema_json
        if schema:
            text, completion = self._complete(head, schema, self._on_text)
            self._require_whole(completion)
            schemas.validate(schema, text)
            return self._result(text.strip(), (), completion, margin)
        stream = _AnswerStream("", self._on_text)
        _, completion = self._complete(head, schemas.TEXT_ANSWER, stream.feed)
        return self._result(stream.text, (), completion, margin)

    def arguments(self, tool: Tool, head: list[int], margin: float) -> StepResult:
        """The arguments of a chosen tool, after the call's head."""
        text, completion = self._complete(head, tool.input_schema_json, _ignore)
        self._require_whole(completion)
        schemas.validate(tool.input_schema_json, text)
        return self._result("", (ToolCall("", tool.name, text.strip()),), completion, margin)

    def union(self) -> StepResult:
        """A tool call or an answer, whichever the model writes."""
        schema = schemas.union_schema(self.request.tools, self.request.output_schema_json)
        streams = not self.request.output_schema_json
        stream = _AnswerStream(_ANSWER_HEAD, self._on_text if streams else _ignore)
        text, completion = self._complete([], schema, stream.feed)
        if completion.truncated and stream.text and streams:
            return self._result(stream.text, (), completion)
        self._require_whole(completion)
        schemas.validate(schema, text)
        decided = json.loads(text)
        if ANSWER in decided:
            answer = stream.text if streams else to_json(decided[ANSWER])
            return self._result(answer, (), completion)
        arguments = to_json(decided["arguments"])
        return self._result("", (ToolCall("", decided["name"], arguments),), completion)

    def _complete(
        self, head: list[int], schema_json: str | None, on_text: OnText
    ) -> tuple[str, Completion]:
        pieces: list[str] = []

        def take(text: str, tokens: int) -> None:
            if self._ttft_ms is None:
                self._ttft_ms = (time.monotonic() - self._started_s) * 1000
            pieces.append(text)
            on_text(text, tokens)

        completion = self._backend.complete(
            self.prompt + head,
            max_tokens=self._max_tokens,
            schema_json=schema_json,
            lead=_LEAD if head and schema_json else "",
            sampling=self.request.sampling,
            stop=self._manifest.stop,
            cancel=self.cancel,
            on_text=take,
        )
        return "".join(pieces), completion

    def _require_whole(self, completion: Completion) -> None:
        if completion.truncated:
            message = f"the output was cut at {self._max_tokens} tokens and is not whole JSON"
            metadata = {"max_output_tokens": str(self._max_tokens)}
            raise StepFailed(RunError("OUTPUT_TRUNCATED", message, metadata=metadata))

    def _result(
        self,
        text: str,
        tool_calls: tuple[ToolCall, ...],
        completion: Completion,
        margin: float | None = None,
    ) -> StepResult:
        self.saw_cached(completion.cached_tokens)
        finish = FinishReason.TOOL_CALLS if tool_calls else FinishReason.STOP
        if completion.truncated:
            finish = FinishReason.TRUNCATED
        usage = Usage(
            prompt_tokens=completion.prompt_tokens,
            cached_tokens=self._cached_tokens or 0,
            completion_tokens=completion.completion_tokens,
            decode_s=completion.decode_s,
            ttft_ms=self._ttft_ms,
        )
        return StepResult(text, tool_calls, finish, usage, margin)


class _AnswerStream:
    """Passes on the text of a JSON string that follows `head`, as it is written."""

    def __init__(self, head: str, on_text: OnText) -> None:
        self._head = head
        self._seen = ""
        self._reader: JsonStringReader | None = None
        self._on_text = on_text
        self.text = ""

    def feed(self, text: str, tokens: int) -> None:
        if self._reader is None:
            self._seen += text
            start = self._start()
            if start is None:
                return
            self._reader, text = JsonStringReader(), self._seen[start:]
        decoded = self._reader.feed(text)
        if decoded:
            self.text += decoded
            self._on_text(decoded, tokens)

    def _start(self) -> int | None:
        """Where the string's content begins; None while that is not known."""
        head, at = self._head + '"', 0
        for position, character in enumerate(self._seen):
            if at == len(head):
                return position
            if character.isspace():
                continue
            if character != head[at]:
                return None
            at += 1
        return len(self._seen) if at == len(head) else None


def _call_head(name: str) -> str:
    return f'{{"name": {json.dumps(name)}, "arguments":'


def _ignore(_text: str, _tokens: int) -> None:
    """Text that no caller reads."""


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
