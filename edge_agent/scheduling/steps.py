"""The steps that somebody waits for: into the queue, to a worker, back to whoever asked.

Carries out what the planner has decided about steps, and reports what comes of it. Runs on the
daemon's loop; every method but `run` acts at once.
"""

import asyncio
from collections.abc import Callable

import structlog

from edge_agent.core import EngineState, RunState, StepResult
from edge_agent.errors import EdgeAgentError, StepFailed, Unavailable, WorkerError
from edge_agent.scheduling.pending import PendingStep, served
from edge_agent.scheduling.planner import Planner
from edge_agent.scheduling.residency import Residency
from edge_agent.scheduling.values import QueuedStep

log = structlog.get_logger()


class Steps:
    """All steps from their submission to their end. `moves` counts texts and results."""

    def __init__(self, planner: Planner, residency: Residency, changed: Callable[[], None]) -> None:
        """None yet. `changed` is told whenever the planner has something to decide."""
        self.moves = 0
        self._planner = planner
        self._residency = residency
        self._changed = changed
        self._pending: dict[int, PendingStep] = {}
        self._stopping = False

    async def run(self, pending: PendingStep) -> StepResult | None:
        """Submit a step and wait for its end; None for one that only loads.

        Cancelling this returns at once; the place is free when the worker has let go.

        Raises:
            EdgeAgentError: why it was refused, or has failed.
        """
        if self._stopping:
            raise Unavailable("the daemon is stopping")
        step = pending.step
        self._pending[step.id] = pending
        try:
            self._planner.submit(step, self._now_s())
            self._changed()
            return await asyncio.shield(pending.done)
        except asyncio.CancelledError:
            self._abandon(pending)
            raise
        finally:
            if pending.sequence is None:
                self._pending.pop(step.id, None)

    def ready(self, step: QueuedStep) -> None:
        """The engine that a step only wanted loaded is in memory."""
        self._finish(self._pending[step.id], None)

    def refuse(self, step: QueuedStep, error: EdgeAgentError) -> None:
        """A waiting step ends with an error."""
        self._fail(self._pending[step.id], error)

    def _abandon(self, pending: PendingStep) -> None:
        """Nobody waits for it any more."""
        pending.abandoned = True
        pending.done.cancel()
        if self._planner.withdraw(pending.step.id):
            self._changed()
        elif pending.sequence is not None:
            self._residency.host(pending.step.engine).cancel(pending.sequence)

    def tell_waiting(self) -> None:
        """Each waiting step hears whether its engine is being loaded."""
        residents = self._planner.state.residents
        for step in self._planner.state.queue.waiting():
            resident = residents.get(step.engine)
            pending = self._pending[step.id]
            if resident is None or resident.state is not EngineState.LOADING:
                pending.tell(RunState.QUEUED)
            elif pending.state is not RunState.LOADING:
                pending.tell(RunState.LOADING)

    def start(self, step: QueuedStep) -> None:
        """Hand a step to its engine's worker."""
        pending, now_s = self._pending[step.id], self._now_s()
        resident = self._planner.state.residents[step.engine]
        pending.started(now_s, resident.asked_s, resident.ready_s)
        try:
            pending.sequence = self._residency.host(step.engine).decide(
                pending.next_request(), lambda text, tokens: self._took_text(pending, text, tokens)
            )
        except (EdgeAgentError, ValueError) as error:  # the process is gone, or no frame holds it
            self._planner.ended(step, now_s, None)
            self._fail(pending, error)
            return
        pending.tell(RunState.RUNNING)
        sequence = pending.sequence
        sequence.ended.add_done_callback(lambda ended: self._let_go(pending, ended))

    def _took_text(self, pending: PendingStep, text: str, tokens: int) -> None:
        self.moves += 1
        self._planner.first_token(pending.step)
        pending.take_text(text, tokens, self._now_s())

    def preempt(self, step: QueuedStep, by: QueuedStep) -> None:
        """Stop a running step for another; it waits again when the worker has let go."""
        pending = self._pending[step.id]
        if pending.sequence is None:
            return
        pending.stopping = True
        log.info("step_preempted", run=step.run_id, by_run=by.run_id, by_client=by.client)
        self._residency.host(step.engine).cancel(pending.sequence)

    def _let_go(self, pending: PendingStep, ended: "asyncio.Future[StepResult]") -> None:
        """The worker is done with a step, well or not."""
        step, now_s, error = pending.step, self._now_s(), ended.exception()
        if pending.abandoned:
            self._pending.pop(step.id, None)
            self._planner.ended(step, now_s, None)
        elif error is None:
            self.moves += 1
            usage = ended.result().usage
            self._planner.ended(step, now_s, served(usage))
            self._finish(pending, pending.result(ended.result()))
            self._residency.step_ended(step.engine, usage.prompt_tokens + usage.completion_tokens)
        elif pending.stopping and _was_stopped(error):
            pending.stopped(now_s)
            self._planner.preempted(step, now_s)
        else:
            self._planner.ended(step, now_s, None)
            self._fail(pending, error)
        self._changed()

    def _finish(self, pending: PendingStep, result: StepResult | None) -> None:
        pending.sequence = None
        self._pending.pop(pending.step.id, None)
        if not pending.done.done():
            pending.done.set_result(result)

    def _fail(self, pending: PendingStep, error: BaseException) -> None:
        pending.sequence = None
        self._pending.pop(pending.step.id, None)
        if not pending.done.done():
            pending.done.set_exception(error)
            pending.done.exception()  # retrieved here too: nobody may wait for it any more

    def put_off(self, engine: str) -> None:
        """The engine's process is about to be killed: its steps wait for better times."""
        for pending in self._pending.values():
            if pending.step.engine == engine and pending.sequence is not None:
                pending.stopping = True

    def tell_progress(self, engine: str, fraction: float) -> None:
        """How far the load of an engine has come."""
        for pending in list(self._pending.values()):
            if pending.step.engine == engine and pending.state is RunState.LOADING:
                pending.tell(RunState.LOADING, fraction)

    def stop(self) -> None:
        """Every step that has not ended fails, and no other is taken."""
        self._stopping = True
        for pending in list(self._pending.values()):
            self._fail(pending, WorkerError("the daemon stops", reason="ENGINE_UNLOADED"))

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()


def _was_stopped(error: BaseException) -> bool:
    """Stopped by us: cancelled in the worker, or the worker was killed."""
    return isinstance(error, WorkerError) or (
        isinstance(error, StepFailed) and error.reason == "CANCELLED"
    )
