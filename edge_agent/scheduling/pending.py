"""One step on the owner's side: who waits for it, what it has written, and how it goes on.

A BATCH step may be stopped for another and starts again later. Free text goes on from its own
words. Whatever is decoded under a schema is written anew: as far as it says the same again, nobody
is told twice; where it does not, the decided message is what counts.
"""

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_agent.core import Priority, RunState, StepOrigin, StepRequest, StepResult, Usage
from edge_agent.engines.host import OnText, Sequence
from edge_agent.scheduling.pace import Served
from edge_agent.scheduling.values import QueuedStep

OnState = Callable[[RunState, float | None], None]

_CHARACTERS_PER_TOKEN = 4
"""Of English text with a byte-pair vocabulary, roughly; for estimates only."""


def queued_step(
    step_id: int,
    engine: str,
    request: StepRequest,
    origin: StepOrigin,
    asked_s: float,
    *,
    context_tokens: int,
    max_output_tokens: int,
) -> QueuedStep:
    """The step as the planner sees it.

    No text has more tokens than bytes, so its bytes are a safe reservation; a step never fills more
    than the context of its slot.
    """
    characters = _characters(request)
    output = request.max_output_tokens or max_output_tokens
    return QueuedStep(
        id=step_id,
        engine=engine,
        client=origin.client,
        priority=origin.priority,
        asked_s=asked_s,
        need_tokens=min(context_tokens, characters + output),
        prompt_tokens=min(context_tokens, characters // _CHARACTERS_PER_TOKEN),
        output_tokens=output,
        deadline_s=origin.deadline_s,
        run_id=origin.run_id,
        preemptible=origin.priority is Priority.BATCH and _may_stop(request),
    )


def _may_stop(request: StepRequest) -> bool:
    """Whether it can be stopped and started again without contradicting itself."""
    sampling = request.sampling
    return _resumes(request) or sampling.temperature == 0.0 or sampling.seed is not None


def _resumes(request: StepRequest) -> bool:
    """Free text goes on from its own words."""
    return not request.tools and not request.output_schema_json


@dataclass(slots=True, eq=False)
class PendingStep:
    """A step from its request to its result, over all its attempts."""

    step: QueuedStep
    request: StepRequest
    on_text: OnText
    on_state: OnState
    done: "asyncio.Future[StepResult | None]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    sequence: Sequence | None = None
    stopping: bool = False
    abandoned: bool = False
    state: RunState | None = None
    _waits_since_s: float = 0.0
    _queue_s: float = 0.0
    _load_s: float = 0.0
    _decode_s: float = 0.0
    _ttft_ms: float | None = None
    _started_s: float = 0.0
    _first_text_s: float | None = None
    _written: str = ""
    _again: str | None = None
    _tokens_before: int = 0
    _tokens: int = 0

    def __post_init__(self) -> None:
        """It waits from when it was asked for."""
        self._waits_since_s = self.step.asked_s

    def tell(self, state: RunState, progress: float | None = None) -> None:
        """Say where the step is, once for each change."""
        if self.abandoned or (state is self.state and progress is None):
            return
        self.state = state
        self.on_state(state, progress)

    def started(self, now_s: float, load_asked_s: float, ready_s: float) -> None:
        """It has a place, in an engine whose load began and ended at these times."""
        load_s = max(0.0, ready_s - max(self._waits_since_s, load_asked_s))
        self._load_s += load_s
        self._queue_s += max(0.0, now_s - self._waits_since_s - load_s)
        self._started_s, self._first_text_s = now_s, None

    def next_request(self) -> StepRequest:
        """What the worker is asked: at another attempt, to go on from what was written."""
        if not self._written:
            return self.request
        if not _resumes(self.request):
            self._again = ""
            return self.request
        left = max(1, self.step.output_tokens - self._tokens_before)
        return dataclasses.replace(self.request, resume_text=self._written, max_output_tokens=left)

    def stopped(self, now_s: float) -> None:
        """The attempt has ended without a result, and it waits again."""
        self.sequence, self.stopping = None, False
        self._tokens_before += self._tokens
        self._tokens = 0
        self._waits_since_s = now_s
        if self._first_text_s is not None:
            self._decode_s += now_s - self._first_text_s

    def take_text(self, text: str, tokens: int, now_s: float) -> None:
        """The worker has written more."""
        self._tokens += tokens
        if self._first_text_s is None:
            self._first_text_s = now_s
        if self._ttft_ms is None:
            self._ttft_ms = (now_s - self._started_s) * 1000
        if self._again is not None:
            text = self._new_part(text)
        if text:
            self._written += text
            self.on_text(text, tokens)

    def _new_part(self, text: str) -> str:
        """What an attempt that writes everything anew adds to what was told already."""
        self._again = f"{self._again}{text}"
        if not self._again.startswith(self._written):
            return ""
        return self._again[len(self._written) :]

    def result(self, result: StepResult) -> StepResult:
        """The worker's result with what went before it: waiting, loading, other attempts."""
        last = result.usage
        if self.stopping and result.text.startswith(self._written):
            # it has finished before it could be stopped, and what it wrote meanwhile went nowhere
            rest = result.text[len(self._written) :]
            if rest:
                self.on_text(rest, max(0, last.completion_tokens - self._tokens))
        usage = dataclasses.replace(
            last,
            completion_tokens=last.completion_tokens + self._tokens_before,
            decode_s=last.decode_s + self._decode_s,
            ttft_ms=self._ttft_ms if self._tokens_before else last.ttft_ms,
            queue_s=self._queue_s,
            load_s=self._load_s,
        )
        return dataclasses.replace(result, usage=usage)


def served(usage: Usage) -> Served:
    """What a finished step says about the engine's pace."""
    return Served(
        computed_tokens=max(0, usage.prompt_tokens - usage.cached_tokens),
        output_tokens=usage.completion_tokens,
        prefill_s=(usage.ttft_ms or 0.0) / 1000,
        decode_s=usage.decode_s,
    )


def _characters(request: StepRequest) -> int:
    """UTF-8 bytes of everything that becomes prompt, as far as lengths tell without encoding."""
    count = 0
    for message in request.messages:
        count += len(message.text.encode())
        count += sum(len(call.arguments_json.encode()) for call in message.tool_calls)
    for tool in request.tools:
        count += len(tool.description.encode()) + len(tool.input_schema_json.encode())
        count += sum(len(each.goal) + len(each.arguments_json) for each in tool.examples)
    return count
