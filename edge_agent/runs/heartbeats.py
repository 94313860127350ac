"""The owner of clients' heartbeats: who is watched, and what befalls the runs of who is silent.

A client is watched for all of its runs, for those of one of its sessions, or for several of these,
each by itself.

A nonce shows that the client has read the last answer, so that a beat which is repeated or was sent
long ago keeps nobody alive. Nothing is kept over a restart. How runs are stopped is their owner's.
"""

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from edge_agent.core import RunError, RunState
from edge_agent.errors import FailedPrecondition, Overloaded, Unavailable
from edge_agent.heartbeat import Heartbeat, Lapse

MAX_WATCHED = 1000
HELD_UP_S = 0.05
"""A timer that fires later than this tells of the daemon's own loop: beats may lie unread."""
_RETRY_AFTER_S = 1.0
_STOPS = {Lapse.SUSPENDED: RunState.SUSPENDED, Lapse.CANCELLED: RunState.CANCELLED}

log = structlog.get_logger()


@dataclass(eq=False, slots=True)
class _Watched:
    """A client that is watched; `session` empty: for all of its runs."""

    client: str
    session: str
    heartbeat: Heartbeat
    nonce: int
    beaten_s: float
    lapse: Lapse = Lapse.NONE
    heard_out: bool = False
    timer: asyncio.TimerHandle | None = None

    def next_s(self) -> float | None:
        """When its silence comes to something next, by the loop's clock."""
        coming = self.heartbeat.after(self.lapse)
        return self.beaten_s + coming[0][1] if coming else None


class Heartbeats:
    """Who is watched. All methods on the daemon's loop, whose clock it is."""

    def __init__(self, stop_runs: Callable[[str, str, RunState, RunError], int]) -> None:
        """`stop_runs` suspends or cancels runs of a client and session, and returns how many."""
        self._stop_runs = stop_runs
        self._watched: dict[tuple[str, str], _Watched] = {}
        self._closed = False

    def beat(
        self, client: str, session: str, nonce: int, heartbeat: Heartbeat | None, *, stop: bool
    ) -> int:
        """Take a beat; returns the nonce of the next one, 0 where the watch ends.

        `session` empty: for all runs of the client.

        `heartbeat` is what a beat with nonce 0 asks for, and None with any other, and with `stop`.

        Raises:
            FailedPrecondition: reason BEAT_OUT_OF_TURN, another nonce was expected.
            Overloaded: reason TOO_MANY_WATCHED_CLIENTS.
            Unavailable: the daemon is stopping.
        """
        if self._closed:
            raise Unavailable("the daemon is stopping", reason="DAEMON_DRAINING")
        if heartbeat is not None:
            return self._beaten(self._begin(client, session, heartbeat))
        watched = self._watched.get((client, session))
        if nonce or not stop:
            watched = _in_turn(watched, client, session, nonce)
        if watched is None or stop:
            self._forget(client, session)
            return 0
        return self._beaten(watched)

    def close(self) -> None:
        """Watch nobody any more: the daemon stops, and will not hear them."""
        self._closed = True
        for client, session in tuple(self._watched):
            self._forget(client, session)

    def _begin(self, client: str, session: str, heartbeat: Heartbeat) -> _Watched:
        before = self._watched.get((client, session))
        if before is None:
            self._make_room()
            log.info("client_watched", client=client, session=session, window_s=heartbeat.window_s)
        else:
            self._forget(client, session)
        now_s = asyncio.get_running_loop().time()
        watched = _Watched(client, session, heartbeat, 0, now_s)
        if before is not None:
            watched.lapse = before.lapse  # over with this beat, which says so
        self._watched[client, session] = watched
        return watched

    def _make_room(self) -> None:
        """One whose lapse has come to its end makes room: nothing more can happen to it."""
        if len(self._watched) < MAX_WATCHED:
            return
        done = next((each for each in self._watched.values() if each.next_s() is None), None)
        if done is None:
            raise Overloaded(
                f"{MAX_WATCHED} clients are watched, and not more",
                reason="TOO_MANY_WATCHED_CLIENTS",
                metadata={"limit": MAX_WATCHED},
                retry_after_s=_RETRY_AFTER_S,
            )
        self._forget(done.client, done.session)

    def _beaten(self, watched: _Watched) -> int:
        now_s = asyncio.get_running_loop().time()
        if watched.lapse is not Lapse.NONE:
            log.info(
                "client_back",
                client=watched.client,
                session=watched.session,
                lapse=watched.lapse.name,
            )
        watched.beaten_s, watched.lapse, watched.heard_out = now_s, Lapse.NONE, False
        watched.nonce = 1 + secrets.randbelow(2**63 - 1)
        if watched.timer is None:  # one that is set looks when it fires: a beat costs no timer
            self._set_timer(watched)
        return watched.nonce

    def _forget(self, client: str, session: str) -> None:
        watched = self._watched.pop((client, session), None)
        if watched is not None and watched.timer is not None:
            watched.timer.cancel()

    def _set_timer(self, watched: _Watched, at_s: float | None = None) -> None:
        at_s = watched.next_s() if at_s is None else at_s
        watched.timer = None
        if at_s is not None:
            loop = asyncio.get_running_loop()
            watched.timer = loop.call_at(at_s, self._look, watched, at_s)

    def _look(self, watched: _Watched, due_s: float) -> None:
        """See whether a client is silent, at the time when it was to be."""
        now_s = asyncio.get_running_loop().time()
        next_s = watched.next_s()
        if next_s is None or now_s < next_s:  # it has beaten meanwhile
            self._set_timer(watched)
        elif now_s - due_s > HELD_UP_S and not watched.heard_out:
            watched.heard_out = True
            self._set_timer(watched, now_s + HELD_UP_S)
        else:
            watched.heard_out = False
            self._lapse(watched, now_s - watched.beaten_s)
            self._set_timer(watched)

    def _lapse(self, watched: _Watched, silent_s: float) -> None:
        """Do all that a silence has come to, in order."""
        reached = watched.heartbeat.reached(silent_s)
        for lapse, _at_s in watched.heartbeat.after(watched.lapse):
            if lapse <= reached:
                log.warning(
                    "client_lapsed",
                    client=watched.client,
                    session=watched.session,
                    lapse=lapse.name,
                    silent_s=round(silent_s, 3),
                    runs=self._stop(watched, _STOPS.get(lapse)),
                )
        watched.lapse = reached

    def _stop(self, watched: _Watched, state: RunState | None) -> int | None:
        """How many runs were stopped; None where none are to be."""
        if state is None:
            return None
        return self._stop_runs(watched.client, watched.session, state, _error(watched))


def _in_turn(watched: _Watched | None, client: str, session: str, nonce: int) -> _Watched:
    if watched is not None and watched.nonce == nonce:
        return watched
    expected = watched.nonce if watched else 0
    raise FailedPrecondition(
        f"nonce: {nonce} is out of turn, {expected} expected",
        reason="BEAT_OUT_OF_TURN",
        metadata={"client": client, "session_id": session, "nonce": nonce, "expected": expected},
    )


def _error(watched: _Watched) -> RunError:
    window_s = watched.heartbeat.window_s
    message = f"its client {watched.client} has not beaten within its window of {window_s:g} s"
    metadata = {"client": watched.client, "window_s": f"{window_s:g}"}
    if watched.session:
        metadata["session_id"] = watched.session
    return RunError("HEARTBEAT_LAPSED", message, metadata=metadata)
