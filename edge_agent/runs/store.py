"""Where runs are kept in memory, until their retention there is over.

What is durable of them stays in the ledger for longer.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator

from edge_agent.runs.loop import RunLoop


class MemoryRunStore:
    """Runs by id and by the request that made them; a restart forgets them."""

    def __init__(
        self,
        *,
        retention_s: Callable[[], float],
        max_retained: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep ended runs for this long, and this many of them."""
        self._retention_s = retention_s
        self._max_retained = max_retained
        self._clock = clock
        self._runs: dict[str, RunLoop] = {}
        self._requests: dict[tuple[str, str], str] = {}
        self._ended: deque[tuple[float, str]] = deque()

    def add(self, loop: RunLoop) -> None:
        """Keep an accepted run."""
        self._expire()
        run = loop.live.run
        self._runs[run.id] = loop
        if run.request_id:
            self._requests[run.client, run.request_id] = run.id

    def forget(self, run_id: str) -> None:
        """Keep no longer a run that never began."""
        run = self._runs.pop(run_id).live.run
        self._requests.pop((run.client, run.request_id), None)

    def get(self, run_id: str) -> RunLoop | None:
        """The run, while it is kept."""
        self._expire()
        return self._runs.get(run_id)

    def find_request(self, client: str, request_id: str) -> RunLoop | None:
        """The run that this client's request made, while it is kept."""
        self._expire()
        return self._runs.get(self._requests.get((client, request_id), ""))

    def newest_first(self) -> Iterator[RunLoop]:
        """All runs that are kept."""
        self._expire()
        return reversed(self._runs.values())

    def ended(self, run_id: str) -> None:
        """The run's retention begins."""
        self._ended.append((self._clock(), run_id))
        self._expire()

    def _expire(self) -> None:
        oldest_s = self._clock() - self._retention_s()
        while self._ended and (
            self._ended[0][0] < oldest_s or len(self._ended) > self._max_retained()
        ):
            _, run_id = self._ended.popleft()
            run = self._runs.pop(run_id).live.run
            self._requests.pop((run.client, run.request_id), None)
