"""Who has which resource of the robot: calls that use the same one never run at once. Pure.

A call gets all of its resources at once or none, so that nobody holds one while it waits for
another: there is no deadlock. Whoever waits is served in turn, and nobody overtakes somebody who
waits for one of the same resources. Taking over by force is for people, so it is not here.
"""

import dataclasses
import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from edge_agent.core import Fence


class Holding(enum.StrEnum):
    """What a holder is doing: INSTANT ends soon, and is waited for.

    BACKGROUND goes on until its caller says that it is done. UNKNOWN: nobody knows whether it still
    acts, until somebody says so.
    """

    INSTANT = "INSTANT"
    BACKGROUND = "BACKGROUND"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True)
class Holder:
    """A tool call, and whose it is. `(run_id, call_id)` is its identity."""

    run_id: str
    call_id: str
    tool: str
    client: str
    agent: str
    holding: Holding

    @property
    def key(self) -> tuple[str, str]:
        """Run and call."""
        return self.run_id, self.call_id


@dataclass(frozen=True, slots=True)
class Granted:
    """The call has its resources; `fence` orders it among all calls."""

    fence: Fence


@dataclass(frozen=True, slots=True)
class Refused:
    """`holder` has the resource for as long as it likes."""

    resource: str
    holder: Holder


@dataclass(frozen=True, slots=True)
class Waits:
    """`ahead` has the resource, or is before this call in waiting for it."""

    resource: str
    ahead: Holder


@dataclass(frozen=True, slots=True)
class _Asked:
    holder: Holder
    resources: frozenset[str]


@dataclass(slots=True)
class Holds:
    """All holds of one daemon. `epoch` is higher than that of any daemon before it."""

    epoch: int
    _sequence: int = 0
    _held: dict[str, Holder] = field(default_factory=dict)
    _waiting: list[_Asked] = field(default_factory=list)

    def holders(self) -> dict[str, Holder]:
        """Who has what, by resource."""
        return dict(self._held)

    def ask(self, holder: Holder, resources: Iterable[str]) -> Granted | Refused | Waits:
        """Take the resources, be refused, or wait: `release` and `withdraw` tell the rest."""
        asked = _Asked(holder, frozenset(resources))
        decision = self._decide(asked, self._waiting)
        if isinstance(decision, Granted):
            self._take(asked)
        elif isinstance(decision, Waits):
            self._waiting.append(asked)
        return decision

    def retake(self, holder: Holder, resources: Iterable[str]) -> None:
        """What a call had before a restart of the daemon, and has still."""
        self._take(_Asked(holder, frozenset(resources)))

    def change(
        self, run_id: str, call_id: str, holding: Holding
    ) -> list[tuple[Holder, Granted | Refused]]:
        """A holder does something else now; whom that refuses, and who is next in their place."""
        for resource, holder in self._held.items():
            if holder.key == (run_id, call_id):
                self._held[resource] = dataclasses.replace(holder, holding=holding)
        return self._serve()

    def release(self, run_id: str, call_id: str) -> list[tuple[Holder, Granted | Refused]]:
        """A call has no resources any more; who gets them, or is refused now, in turn."""
        self._held = {
            resource: holder
            for resource, holder in self._held.items()
            if holder.key != (run_id, call_id)
        }
        return self._serve()

    def withdraw(self, run_id: str, call_id: str) -> list[tuple[Holder, Granted | Refused]]:
        """A call waits no more; who need not wait for it either."""
        self._waiting = [each for each in self._waiting if each.holder.key != (run_id, call_id)]
        return self._serve()

    def _serve(self) -> list[tuple[Holder, Granted | Refused]]:
        served: list[tuple[Holder, Granted | Refused]] = []
        left: list[_Asked] = []
        for asked in self._waiting:
            decision = self._decide(asked, left)
            if isinstance(decision, Waits):
                left.append(asked)
                continue
            if isinstance(decision, Granted):
                self._take(asked)
            served.append((asked.holder, decision))
        self._waiting = left
        return served

    def _decide(self, asked: _Asked, before: Iterable[_Asked]) -> Granted | Refused | Waits:
        held = [(name, self._held[name]) for name in sorted(asked.resources) if name in self._held]
        for resource, holder in held:
            if holder.holding is not Holding.INSTANT:
                return Refused(resource, holder)
        if held:
            return Waits(*held[0])
        for earlier in before:
            if shared := asked.resources & earlier.resources:
                return Waits(min(shared), earlier.holder)
        self._sequence += 1
        return Granted(Fence(self.epoch, self._sequence))

    def _take(self, asked: _Asked) -> None:
        for resource in asked.resources:
            self._held[resource] = asked.holder
