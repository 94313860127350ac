"""Engines in memory or on their way in or out: their places, their claims, and what protects them.

What a process leaves behind is a `Leak`.

Changed by the planner only; reads no clock.
"""

import dataclasses
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from edge_agent.core import EngineState
from edge_agent.scheduling.budget import Reservation
from edge_agent.scheduling.queue import Key
from edge_agent.scheduling.values import EngineFacts, QueuedStep, Rules

_LEAK_TOLERANCE = 0.25
"""A leak counts as returned once all but this share of it is free again."""


@dataclass(slots=True)
class Running:
    """A step that holds a place."""

    step: QueuedStep
    key: Key
    started_s: float
    preempting: bool = False


@dataclass(slots=True)
class Resident:
    """One engine with a process.

    `lease`: the step for which it was loaded; until that step's first token the engine is no
    victim, for nobody. `held_bytes` is what it is known to have taken.
    """

    facts: EngineFacts
    asked_s: float
    state: EngineState = EngineState.LOADING
    attempt: int = 1
    slots: int = 0
    held_bytes: int = 0
    committed_bytes: int = 0
    cache_bytes: int = 0
    ready_s: float = 0.0
    last_used_s: float = 0.0
    lease: int | None = None
    why: str = ""
    running: dict[int, Running] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The engine's."""
        return self.facts.name

    @property
    def reservation(self) -> Reservation:
        """Its entry in the ledger."""
        return Reservation(self.committed_bytes, self.held_bytes)

    @property
    def used_tokens(self) -> int:
        """What running steps may fill of the KV cache."""
        return sum(run.step.need_tokens for run in self.running.values())

    def has_place(
        self, step: QueuedStep, parallel: int, without: AbstractSet[int] = frozenset()
    ) -> bool:
        """Whether this step's whole need is free, now or `without` these running steps."""
        if len(self.running) - len(without) >= parallel:
            return False
        left = [run.step for run in self.running.values() if run.step.id not in without]
        used_tokens = sum(each.need_tokens for each in left)
        return not left or used_tokens + step.need_tokens <= self.facts.kv_tokens

    def became_ready(self, slots: int, held_bytes: int, now_s: float) -> None:
        """Its load has ended well."""
        self.state = EngineState.READY
        self.facts = dataclasses.replace(self.facts, load_s=now_s - self.asked_s)
        self.slots = slots
        self.ready_s = self.last_used_s = now_s
        self.committed_bytes = self.facts.footprint.steady_bytes
        self.held_bytes = min(held_bytes, self.committed_bytes)
        self.cache_bytes = self.facts.cache_bytes

    def min_residency_s(self, rules: Rules) -> float:
        """How long it stays once loaded, so that loading is a small part of the time."""
        return max(rules.min_residency_s, rules.residency_per_load * self.facts.load_s)

    def protected_until_s(self, rules: Rules, *, wanted: bool) -> float:
        """Until when a step that is not URGENT must leave it in memory.

        While it is in use (or `wanted`), for its minimum residency; once it idles, not longer than
        a load takes: then keeping it has cost as much as bringing it back (the ski-rental rule).
        """
        residency_s = self.ready_s + self.min_residency_s(rules)
        if self.running or wanted:
            return residency_s
        return min(residency_s, self.last_used_s + self.facts.load_s)


@dataclass(frozen=True, slots=True)
class Leak:
    """Memory that did not come back when an engine's process ended.

    `others_bytes` is what everything but the engines used before that.
    """

    missing_bytes: int
    others_bytes: int

    @property
    def reservation(self) -> Reservation:
        """Its entry in the ledger."""
        return Reservation(self.missing_bytes, self.missing_bytes)

    def returned(self, unclaimed_bytes: int) -> bool:
        """Whether it is free again; `unclaimed_bytes` is what others use, this leak included."""
        return unclaimed_bytes <= self.others_bytes + self.missing_bytes * _LEAK_TOLERANCE
