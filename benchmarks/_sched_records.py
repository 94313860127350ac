"""What a simulation is made of and leaves behind: policies, processes, runs, outcomes. No logic."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks._sched_devices import Engine
from benchmarks._sched_workloads import Task
from edge_agent.scheduling.pace import Served
from edge_agent.scheduling.values import Action, MachineView, QueuedStep


class Policy(Protocol):
    """What decides. It sees what the product's scheduler sees, and nothing else."""

    verified: bool
    """Whether it hears that a process has gone only when the memory is back."""
    keeps_steps: bool
    """Whether steps of a killed engine wait again in it; else their clients come back."""

    def observe(self, machine: MachineView) -> None:
        """Memory and heat now."""

    def submit(self, step: QueuedStep, now_s: float) -> bool:
        """A step arrives; False: it is refused."""

    def first_token(self, step: QueuedStep) -> None:
        """A step has its first token."""

    def ended(self, step: QueuedStep, now_s: float, served: Served) -> None:
        """A step has ended."""

    def preempted(self, step: QueuedStep, now_s: float) -> None:
        """A step was stopped as decided."""

    def loaded(self, engine: Engine, now_s: float) -> None:
        """A load has ended."""

    def gone(self, engine: str, now_s: float) -> None:
        """A process has ended, asked for or not."""

    def decide(self, now_s: float) -> Sequence[Action]:
        """What to do now."""

    def wake_s(self) -> float | None:
        """When to ask again though nothing happened."""


@dataclass(slots=True)
class Process:
    """An engine's process. `ending`: it was told to end, or was killed."""

    engine: Engine
    started_s: float
    number: int
    loaded: bool = False
    ending: bool = False
    held_bytes: int = 0

    def held(self, now_s: float) -> int:
        """What it holds now."""
        if self.loaded or self.ending:
            return self.held_bytes
        share = min(1.0, (now_s - self.started_s) / self.engine.load_s)
        return int(share * self.engine.peak_bytes)


@dataclass(slots=True)
class Run:
    """A step being served: seconds of work left in its phase, alone on the device."""

    task: Task
    step: QueuedStep
    started_s: float
    left_s: float
    decoding: bool = False
    speed: float = 0.0
    first_token_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one step fared. `ended_s` None: never. `wait_s`: until the start that led to its end."""

    step: QueuedStep
    wait_s: float
    ended_s: float | None

    @property
    def missed(self) -> bool:
        """Whether its deadline was missed."""
        due_s = self.step.deadline_s
        return due_s is not None and (self.ended_s is None or self.ended_s > due_s)


@dataclass(slots=True)
class Tally:
    """What happened in one simulation."""

    outcomes: list[Outcome] = field(default_factory=list)
    loads: int = 0
    load_s: float = 0.0
    floor_violations: int = 0
    floor_touches: int = 0
    oom_kills: int = 0
    busy_evictions: int = 0
    preemptions: int = 0
    events: int = 0
