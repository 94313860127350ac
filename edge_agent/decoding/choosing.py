"""Which tool a small model means, by its probabilities instead of by what it would write.

Two strategies. RANKED reads the likeliest next tokens where the tools' names part: one pass,
mostly. RANKED_FULL has the model go through the beginning of every call, and takes the sum over all
of its tokens: better, and a short request for each tool. The answer is ranked like a tool in both.
Scores are calibrated by what they are after prompts that ask for nothing in particular.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from edge_agent.backends.base import Backend
from edge_agent.core import ANSWER, Message, Role, StepRequest, Tool, ToolStrategy
from edge_agent.decoding import ranking
from edge_agent.decoding.prompt import PromptRenderer
from edge_agent.decoding.writing import ANSWER_HEAD, call_head
from edge_agent.engines.manifest import Manifest

_Key = tuple[ToolStrategy, tuple[Message, ...], tuple[Tool, ...]]
_CACHED_BASELINES = 32

SawCached = Callable[[int], None]
"""Told how many tokens of each request's prompt were in the prefix cache."""


class Chooser:
    """Chooses with one loaded engine. May be used from many threads."""

    def __init__(
        self,
        backend: Backend,
        manifest: Manifest,
        renderer: PromptRenderer,
        render_lock: threading.Lock,
    ) -> None:
        """`render_lock` is held while `renderer` is used."""
        self._backend = backend
        self._manifest = manifest
        self._renderer = renderer
        self._render_lock = render_lock
        self._baselines: OrderedDict[_Key, dict[str, float]] = OrderedDict()

    def choose(
        self,
        strategy: ToolStrategy,
        request: StepRequest,
        prompt: Sequence[int],
        cancel: threading.Event,
        saw_cached: SawCached,
    ) -> tuple[str, float]:
        """The tool's name or ANSWER, and how far it is ahead. Blocks.

        The neutral prompts stand where a user has just spoken, so their baseline is fair there.
        After a tool's result it is not: there the raw scores decide whether to answer.

        Raises:
            Cancelled, StepFailed: as the backend does.
        """

        def score(prompt: Sequence[int]) -> dict[str, float]:
            if strategy is ToolStrategy.RANKED_FULL:
                return self._whole(request.tools, prompt, cancel, saw_cached)
            return self._parting(request.tools, prompt, cancel, saw_cached)

        scores = score(prompt)
        calibrated = ranking.calibrate(scores, self._baseline(strategy, request, score))
        if request.messages[-1].role is Role.TOOL:
            if max(scores, key=scores.__getitem__) == ANSWER:
                return ANSWER, ranking.margin(scores)
            del calibrated[ANSWER]
        return max(calibrated, key=calibrated.__getitem__), ranking.margin(calibrated)

    def _baseline(
        self,
        strategy: ToolStrategy,
        request: StepRequest,
        score: Callable[[Sequence[int]], dict[str, float]],
    ) -> dict[str, float]:
        """Mean scores after the neutral prompts, measured once for each system text and tools."""
        first, tools = request.messages[0], request.tools
        system = (first,) if first.role is Role.SYSTEM else ()
        key = strategy, system, tools
        cached = self._baselines.get(key)
        if cached is None:
            cached = ranking.mean([score(prompt) for prompt in self._neutral(system, tools)])
            self._baselines[key] = cached
            while len(self._baselines) > _CACHED_BASELINES:
                self._baselines.popitem(last=False)
        return cached

    def _neutral(self, system: tuple[Message, ...], tools: tuple[Tool, ...]) -> list[list[int]]:
        with self._render_lock:
            head = self._renderer.render(system, tools)
            opening = len(self._renderer.markers(self._manifest.prompt.assistant.open))
            return [
                head[: len(head) - opening] + self._renderer.user_turn(goal)
                for goal in self._manifest.tools.neutral_goals
            ]

    def _parting(
        self,
        tools: Sequence[Tool],
        prompt: Sequence[int],
        cancel: threading.Event,
        saw_cached: SawCached,
    ) -> dict[str, float]:
        """By the tokens where the beginnings of the calls part."""
        top = self._manifest.tools.top_logprobs

        def logprobs(tokens: Sequence[int]) -> Mapping[int, float]:
            found = self._backend.next_token_logprobs([*prompt, *tokens], top=top, cancel=cancel)
            saw_cached(found.cached_tokens)
            return found.logprobs

        with self._render_lock:
            heads = {name: self._renderer.plain(head) for name, head in _heads(tools).items()}
        return ranking.rank(heads, logprobs)

    def _whole(
        self,
        tools: Sequence[Tool],
        prompt: Sequence[int],
        cancel: threading.Event,
        saw_cached: SawCached,
    ) -> dict[str, float]:
        """By all tokens of the beginnings of the calls."""
        scores = {}
        for name, head in _heads(tools).items():
            found = self._backend.log_likelihood(prompt, head, cancel=cancel)
            saw_cached(found.cached_tokens)
            scores[name] = found.logprob
        return scores


def _heads(tools: Sequence[Tool]) -> dict[str, str]:
    """How a call of each tool begins, and the answer."""
    return {tool.name: call_head(tool.name) for tool in tools} | {ANSWER: ANSWER_HEAD}
