"""One step while it is written: its completions, what they cost, and what reaches the caller.

Owns the checks of what was written. Knows no strategy: `steps` says which of its ways is taken.
"""

import json
import threading
import time
from collections.abc import Callable

from edge_agent.backends.base import Backend, Completion
from edge_agent.core import (
    ANSWER,
    FinishReason,
    RunError,
    StepRequest,
    StepResult,
    Tool,
    ToolCall,
    Usage,
)
from edge_agent.decoding import native, schemas
from edge_agent.decoding.dialects import to_json
from edge_agent.decoding.json_text import JsonStringReader
from edge_agent.engines.manifest import Manifest, NativeFormat
from edge_agent.errors import StepFailed

OnText = Callable[[str, int], None]
ANSWER_HEAD = f'{{"{ANSWER}":'
_LEAD = " "
"""What models write between the colon and the value."""


class InvalidOutput(Exception):
    """The model has `written` something that is not as asked; `failure` is why, for the caller."""

    def __init__(self, written: str, failure: StepFailed, usage: Usage) -> None:
        """With what it cost."""
        super().__init__(failure.message)
        self.written = written
        self.failure = failure
        self.usage = usage


class StepWriter:
    """One step: its request, prompt and budget, and the clock for its TTFT."""

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
        self._check(schema, text, completion)
        return self._result(text, (), completion)

    def answer(self, head: list[int], margin: float | None = None) -> StepResult:
        """The answer branch, after its head `{"answer":`."""
        schema = self.request.output_schema_json
        if schema:
            text, completion = self._complete(head, schema, self._on_text)
            self._check(schema, text, completion, f"{ANSWER_HEAD}{text}}}")
            return self._result(text.strip(), (), completion, margin)
        stream = _AnswerStream("", self._on_text)
        _, completion = self._complete(head, schemas.TEXT_ANSWER, stream.feed)
        return self._result(stream.text, (), completion, margin)

    def arguments(self, tool: Tool, head: list[int], margin: float) -> StepResult:
        """The arguments of a chosen tool, after the call's head."""
        text, completion = self._complete(head, tool.input_schema_json, _ignore)
        head_text = call_head(tool.name)
        self._check(tool.input_schema_json, text, completion, f"{head_text}{text}}}")
        return self._result("", (ToolCall("", tool.name, text.strip()),), completion, margin)

    def union(self) -> StepResult:
        """A tool call or an answer, whichever the model writes."""
        schema = schemas.union_schema(self.request.tools, self.request.output_schema_json)
        streams = not self.request.output_schema_json
        stream = _AnswerStream(ANSWER_HEAD, self._on_text if streams else _ignore)
        text, completion = self._complete([], schema, stream.feed)
        if completion.truncated and stream.text and streams:
            return self._result(stream.text, (), completion)
        self._check(schema, text, completion)
        decided = json.loads(text)
        if ANSWER in decided:
            answer = stream.text if streams else to_json(decided[ANSWER])
            return self._result(answer, (), completion)
        arguments = to_json(decided["arguments"])
        return self._result("", (ToolCall("", decided["name"], arguments),), completion)

    def native(self, form: NativeFormat) -> StepResult:
        """Calls or an answer, in the way that the model was trained for."""
        schema = self.request.output_schema_json
        stream = _NativeStream(form, _ignore if schema else self._on_text)
        text, completion = self._complete([], None, stream.feed)
        usage = self._usage(completion)
        try:
            said = native.read(text, form, self.request.tools)
        except native.Malformed as error:
            self._require_whole(completion)
            raise _invalid(text, str(error), usage) from error
        if isinstance(said, str):
            if schema:
                self._check(schema, said, completion)
            stream.flush()
            return self._result(said, (), completion)
        self._require_whole(completion)
        if self.request.answer_only:
            raise _invalid(text, "no tool may be called any more: answer in words", usage)
        by_name = {tool.name: tool for tool in self.request.tools}
        for call in said:
            schema = by_name[call.name].input_schema_json
            self._check(schema, call.arguments_json, completion, text)
        return self._result("", tuple(said), completion)

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

    def _check(
        self, schema: str, text: str, completion: Completion, written: str | None = None
    ) -> None:
        """Refuse what was cut, or not as its schema says; `written` is all that it is part of."""
        self._require_whole(completion)
        try:
            schemas.validate(schema, text)
        except StepFailed as failure:
            usage = self._usage(completion)
            raise InvalidOutput(written or text, failure, usage) from failure

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
        finish = FinishReason.TOOL_CALLS if tool_calls else FinishReason.STOP
        if completion.truncated:
            finish = FinishReason.TRUNCATED
        return StepResult(text, tool_calls, finish, self._usage(completion), margin)

    def _usage(self, completion: Completion) -> Usage:
        self.saw_cached(completion.cached_tokens)
        return Usage(
            prompt_tokens=completion.prompt_tokens,
            cached_tokens=self._cached_tokens or 0,
            completion_tokens=completion.completion_tokens,
            decode_s=completion.decode_s,
            ttft_ms=self._ttft_ms,
        )


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


class _NativeStream:
    """Passes on text as it is written, once it can't be the beginning of a call."""

    def __init__(self, form: NativeFormat, on_text: OnText) -> None:
        self._form = form
        self._on_text = on_text
        self._held = ""
        self._tokens = 0
        self._flows = False

    def feed(self, text: str, tokens: int) -> None:
        self._held += text
        self._tokens += tokens
        if self._flows or not native.begins_a_call(self._held, self._form):
            self._flows = True
            self.flush()

    def flush(self) -> None:
        """It was no call after all."""
        if self._held:
            self._on_text(self._held, self._tokens)
        self._held, self._tokens = "", 0


def call_head(name: str) -> str:
    """How a call of this tool begins."""
    return f'{{"name": {json.dumps(name)}, "arguments":'


def _invalid(written: str, detail: str, usage: Usage) -> InvalidOutput:
    metadata = {"detail": detail}
    error = RunError("OUTPUT_INVALID", f"decoded output: {detail}", True, metadata)
    return InvalidOutput(written, StepFailed(error), usage)


def _ignore(_text: str, _tokens: int) -> None:
    """Text that no caller reads."""
