"""Which tool a small model means, by its probabilities instead of by what it would write.

RANKED asks how likely each call is after the goal: the likeliest next tokens are read where the
tools' names part, in one pass mostly. Scores are calibrated by what they are after prompts that ask
for nothing in particular. RANKED_FULL asks the other way round as well: how likely is the goal as
what somebody says who wants this tool (noisy channel, Min et al. 2022, arXiv:2108.04106)? That is a
short request for each tool, made side by side. The answer is ranked like a tool in both.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from edge_agent.backends.base import Backend
from edge_agent.core import ANSWER, Message, Role, StepRequest, Tool, ToolStrategy
from edge_agent.decoding import ranking
from edge_agent.decoding.dialects import signature
from edge_agent.decoding.prompt import PromptRenderer
from edge_agent.decoding.writing import ANSWER_HEAD, call_head
from edge_agent.engines.manifest import Manifest, ReverseFormat

_Key = tuple[tuple[Message, ...], tuple[Tool, ...]]
_CACHED_BASELINES = 32
_FORWARD_WEIGHT = 2.0
"""Of the call after the goal, against the goal after the tool, where both are asked."""
_GOAL_CHARACTERS = 240
"""Of a longer goal the beginning is scored: every token of it takes its time for each tool."""

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
            return self._parting(request.tools, prompt, cancel, saw_cached)

        scores = score(prompt)
        share = self._manifest.tools.neutral_share
        calibrated = ranking.calibrate(scores, self._baseline(request, score), share)
        last = request.messages[-1]
        if last.role is Role.TOOL:
            if max(scores, key=scores.__getitem__) == ANSWER:
                return ANSWER, ranking.margin(scores)
            del calibrated[ANSWER]
        reverse = self._manifest.tools.reverse
        goal = last.text[:_GOAL_CHARACTERS] if last.role is Role.USER else ""
        if strategy is ToolStrategy.RANKED_FULL and reverse is not None and goal:
            backwards = self._backwards(reverse, request.tools, goal, cancel)
            calibrated = ranking.combine(backwards, calibrated, _FORWARD_WEIGHT)
        return max(calibrated, key=calibrated.__getitem__), ranking.margin(calibrated)

    def _baseline(
        self,
        request: StepRequest,
        score: Callable[[Sequence[int]], dict[str, float]],
    ) -> dict[str, float]:
        """Mean scores after the neutral prompts, measured once for each system text and tools."""
        first, tools = request.messages[0], request.tools
        system = (first,) if first.role is Role.SYSTEM else ()
        key = system, tools
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

    def _backwards(
        self,
        reverse: ReverseFormat,
        tools: Sequence[Tool],
        goal: str,
        cancel: threading.Event,
    ) -> dict[str, float]:
        """By all tokens of the goal, as what somebody says who wants the tool."""
        with self._render_lock:
            prompts = {
                name: self._renderer.conversation(
                    reverse.system, [(question, said) for said in examples], question
                )
                for name, (question, examples) in _questions(reverse, tools).items()
            }

        def likelihood(prompt: Sequence[int]) -> float:
            return self._backend.log_likelihood(prompt, goal, cancel=cancel).logprob

        with ThreadPoolExecutor(self._manifest.slots) as side_by_side:
            found = side_by_side.map(likelihood, prompts.values())
            return dict(zip(prompts, found, strict=True))


def _questions(
    reverse: ReverseFormat, tools: Sequence[Tool]
) -> dict[str, tuple[str, Sequence[str]]]:
    """Of each tool and the answer: what the model is asked, and what was said to it before."""
    asked: dict[str, tuple[str, Sequence[str]]] = {
        tool.name: (
            reverse.question.replace("{tool}", signature(tool)),
            [example.goal for example in tool.examples],
        )
        for tool in tools
    }
    return asked | {ANSWER: (reverse.answer_question, reverse.answer_goals)}


def _heads(tools: Sequence[Tool]) -> dict[str, str]:
    """How a call of each tool begins, and the answer."""
    return {tool.name: call_head(tool.name) for tool in tools} | {ANSWER: ANSWER_HEAD}
