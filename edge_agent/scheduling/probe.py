"""Whether steps move: health that can't stay green while nothing does.

Where something has moved since the last look, all is well. Else one token is decided through the
whole path (the real queue, a place, the worker) on an engine that is in memory; nothing is ever
loaded or evicted for it. An idle engine with a single place is left alone: the probe would take the
prefix that its next step wants.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from edge_agent.core import EngineState, Message, Priority, Role, StepOrigin, StepRequest, TextPart
from edge_agent.errors import EdgeAgentError, Unavailable
from edge_agent.scheduling.scheduler import DAEMON, Scheduler
from edge_agent.status import WaitReason

_REQUEST = StepRequest((Message(Role.USER, (TextPart("Hi"),)),), max_output_tokens=1)

_OFF_S = 60.0
"""How often to see whether it has been switched on."""
_MOVABLE = frozenset({WaitReason.PLACE, WaitReason.TURN, WaitReason.DRAINING})
"""What steps wait for while others go: there must be others then."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Stuck:
    """Nothing moves: on which engine, and in which words."""

    engine: str
    text: str


class Probe:
    """Looks every `interval_s` (None: never), and tells `on_change` when the answer changes."""

    def __init__(
        self,
        scheduler: Scheduler,
        interval_s: Callable[[], float | None],
        on_change: Callable[[Stuck | None], None],
    ) -> None:
        """Nothing is stuck until a look says so."""
        self.stuck: Stuck | None = None
        self._scheduler = scheduler
        self._interval_s = interval_s
        self._on_change = on_change
        self._moved = scheduler.moves

    async def run(self) -> None:
        """Look for ever; a probe may take as long as the interval."""
        while True:
            interval_s = self._interval_s()
            await asyncio.sleep(_OFF_S if interval_s is None else interval_s)
            stuck = None if interval_s is None else await self.look(interval_s)
            if stuck != self.stuck:
                self._changed(stuck)

    async def look(self, timeout_s: float) -> Stuck | None:
        """What is stuck now; None when something has moved, or could."""
        before, self._moved = self._moved, self._scheduler.moves
        if self._moved != before:
            return None
        for name in self._candidates():
            stuck = await self._probe(name, timeout_s)
            self._moved = self._scheduler.moves
            if stuck is not None:
                return stuck
        return self._unserved(timeout_s)

    def _changed(self, stuck: Stuck | None) -> None:
        self.stuck = stuck
        if stuck is None:
            log.info("steps_move_again")
        else:
            log.error("steps_stuck", engine=stuck.engine, problem=stuck.text)
        self._on_change(stuck)

    def _candidates(self) -> list[str]:
        """Engines in memory that a probe does not harm."""
        state = self._scheduler.planner.state
        return [
            resident.name
            for resident in state.residents.values()
            if resident.state is EngineState.READY
            and (resident.slots > 1 or resident.running or state.queue.count(resident.name))
        ]

    async def _probe(self, name: str, timeout_s: float) -> Stuck | None:
        origin = StepOrigin(DAEMON, Priority.INTERACTIVE)
        try:
            async with asyncio.timeout(timeout_s):
                await self._scheduler.probe(name, _REQUEST, origin)
        except TimeoutError:
            return Stuck(name, f"engine {name} did not decide one token within {timeout_s:g} s")
        except Unavailable:  # it has left memory meanwhile, or its worker was lost: told elsewhere
            return None
        except EdgeAgentError as error:
            return Stuck(name, f"engine {name} does not decide one token: {error.message}")
        return None

    def _unserved(self, timeout_s: float) -> Stuck | None:
        """A step that could go on, by all that is known, while nothing runs or is on its way."""
        state = self._scheduler.planner.state
        running = any(resident.running for resident in state.residents.values())
        if running or state.in_transition():
            return None
        for wait in self._scheduler.explain():
            if wait.waited_s > timeout_s and wait.reason in _MOVABLE:
                return Stuck(wait.engine, f"a step for {wait.engine} waits and nothing moves")
        return None
