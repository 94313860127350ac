"""A machine and its workers in virtual time: engines that hold memory, write text, fail and die.

A host has the interface of `engines.host.EngineHost`; everything else is the real scheduler. What
goes wrong, and when, comes from one seeded source of chance.
"""

import asyncio
import dataclasses
import itertools
import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from edge_agent.core import FinishReason, RunError, StepRequest, StepResult, Usage
from edge_agent.engines.host import OnProgress, OnText, Sequence, WorkerSettings
from edge_agent.engines.manifest import Manifest
from edge_agent.engines.protocol import Options
from edge_agent.errors import LoadFailed, StepFailed, WorkerError
from edge_agent.scheduling.machine import ProcessBytes
from tests.support.machine import SetMachine

GIB = 1 << 30
MIB = 1 << 20
TOTAL_BYTES = 16 * GIB
OTHERS_BYTES = 2 * GIB

MEMORY_WORDS = "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 1234"
FRAGMENTED_WORDS = "NvMapMemAllocInternalTagged: 1075072515 error 12"


@dataclass(slots=True)
class Chances:
    """How likely what is to go wrong. `none` is a quiet world."""

    load_fails: float = 0.0
    load_hangs: float = 0.0
    leaks: float = 0.0
    never_ends: float = 0.0
    dies: float = 0.0
    step_fails: float = 0.0


@dataclass(slots=True)
class World:
    """The machine as its scripted workers leave it. `hog_bytes` is what the rest takes more."""

    chance: random.Random
    chances: Chances = field(default_factory=Chances)
    machine: "WorldMachine" = field(init=False)
    hog_bytes: int = 0
    leaked_bytes: int = 0
    hosts: list["ScriptedHost"] = field(default_factory=list)
    pids: "itertools.count[int]" = field(default_factory=lambda: itertools.count(100))

    def __post_init__(self) -> None:
        self.machine = WorldMachine(self)

    @property
    def available_bytes(self) -> int:
        """What /proc/meminfo would say now."""
        held = sum(host.memory_bytes for host in self.hosts)
        return max(0, TOTAL_BYTES - OTHERS_BYTES - self.hog_bytes - self.leaked_bytes - held)

    def new_host(self, manifest: Manifest, settings: WorkerSettings) -> "ScriptedHost":
        """What the scheduler makes its hosts with."""
        host = ScriptedHost(self, manifest, settings)
        self.hosts.append(host)
        return host

    def alive(self, name: str) -> "ScriptedHost | None":
        """The process of this engine that takes steps."""
        for host in self.hosts:
            if host.manifest.name == name and host.ready and not host.lost.done():
                return host
        return None

    def moving(self) -> list["ScriptedHost"]:
        """Processes on their way in or out."""
        return [host for host in self.hosts if host.process_alive and not host.settled]


class WorldMachine(SetMachine):
    """Tells of processes as well, when it is to."""

    def __init__(self, world: World) -> None:
        super().__init__(TOTAL_BYTES, TOTAL_BYTES - OTHERS_BYTES)
        self.tells_of_processes = False
        self._world = world

    def process_bytes(self, pid: int) -> ProcessBytes | None:
        """What the kernel says of a process; nothing of one that has ended."""
        for host in self._world.hosts if self.tells_of_processes else ():
            if host.pid == pid and host.process_alive:
                return ProcessBytes(host.memory_bytes + MIB, host.memory_bytes)
        return None


class ScriptedHost:
    """One worker's process, as the world has it."""

    def __init__(self, world: World, manifest: Manifest, settings: WorkerSettings) -> None:
        self.manifest = manifest
        self.slots = 0
        self.context_tokens = manifest.context_tokens
        self.load_s: float | None = None
        self.backend_version = "scripted"
        self.lost: asyncio.Future[WorkerError] = asyncio.get_running_loop().create_future()
        self.output: deque[str] = deque(maxlen=50)
        self.pid = 0
        self.own_exit_code: int | None = None
        self.memory_bytes = 0
        self.process_alive = False
        self.ready = False
        self.leaving = False
        self.caches_dropped = 0
        self.told: dict[int, int] = {}
        self._settings = settings
        self._world = world
        self._ids = itertools.count(1)
        self._gone = asyncio.Event()
        self._writers: dict[int, asyncio.Task[None]] = {}
        self._sequences: dict[int, Sequence] = {}
        self._loading: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._killed = False

    @property
    def settled(self) -> bool:
        """Neither on its way in nor out."""
        return self.ready and not self.leaving

    @property
    def open_sequences(self) -> set[int]:
        """Steps in the worker."""
        return set(self._sequences)

    @property
    def active(self) -> int:
        """How many they are."""
        return len(self._sequences)

    # --- loading ---

    async def start(self, _directory: Path, options: Options, on_progress: OnProgress) -> None:
        """Take memory step by step; end well, badly, or never."""
        world, chance = self._world, self._world.chance
        moving = [host.manifest.name for host in world.moving() if not host.leaving]
        assert not moving, f"{self.manifest.name} is loaded while {moving} move"
        self.pid, self.process_alive = next(world.pids), True
        self.context_tokens = options.context_tokens
        seconds, fate = chance.uniform(0.2, 4.0), self._fate()
        loading = asyncio.ensure_future(self._load(seconds, fate, on_progress))
        try:
            await asyncio.wait({loading, self._loading}, return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                raise LoadFailed(f"the worker of {self.manifest.name} ended while loading")
            loading.result()
        finally:
            loading.cancel()
        self.slots, self.load_s, self.ready = options.slots, seconds, True
        if chance.random() < world.chances.dies:
            asyncio.get_running_loop().call_later(chance.uniform(0.0, 8.0), self.die)

    def _fate(self) -> str:
        chance, chances = self._world.chance, self._world.chances
        if chance.random() < chances.load_hangs:
            return "hangs"
        if chance.random() < chances.load_fails:
            return chance.choice(["memory", "fragmented", "killed", "other", "strange"])
        return "well"

    async def _load(self, seconds: float, fate: str, on_progress: OnProgress) -> None:
        memory = self.manifest.memory
        fails_at = self._world.chance.randrange(10)
        for tenth in range(10):
            await asyncio.sleep(seconds / 10)
            wanted = memory.load_peak_bytes * (tenth + 1) // 10
            if wanted - self.memory_bytes > self._world.available_bytes:
                fate, fails_at = "memory", tenth
            if fate not in ("well", "hangs") and tenth == fails_at:
                self._fail(fate)
            self.memory_bytes = wanted
            on_progress((tenth + 1) / 10)
        if fate == "hangs":
            await asyncio.Event().wait()
        self.memory_bytes = memory.steady_bytes

    def _fail(self, fate: str) -> None:
        if fate == "strange":
            raise OSError(24, "Too many open files")
        words = {"memory": MEMORY_WORDS, "fragmented": FRAGMENTED_WORDS}.get(fate, "no such model")
        self.output.append(words)
        if fate == "killed":
            self.own_exit_code = -9
        self._end(self._world.chance.random() < self._world.chances.leaks)
        raise LoadFailed(f"the worker of {self.manifest.name} ended while loading")

    # --- steps ---

    def decide(self, request: StepRequest, on_text: OnText) -> Sequence:
        """Begin to write."""
        if self.lost.done():
            raise self.lost.result()
        sequence = Sequence(next(self._ids), on_text)
        assert len(self._sequences) < self.slots, "a place is given out twice"
        self._sequences[sequence.id] = sequence
        self._writers[sequence.id] = asyncio.ensure_future(self._write(sequence, request))
        return sequence

    async def _write(self, sequence: Sequence, request: StepRequest) -> None:
        chance = self._world.chance
        await asyncio.sleep(chance.uniform(0.0, 0.5))
        words = answer(self.manifest.name, request, chance)
        before = len(request.resume_text.split())
        pace_s = chance.uniform(0.01, 0.2)
        for word in words[before:]:
            await asyncio.sleep(pace_s)
            sequence.on_text(word, 1)
        ended = self._let_go(sequence)
        if ended is None:
            return
        if chance.random() < self._world.chances.step_fails:
            ended.set_exception(StepFailed(RunError("OUTPUT_TRUNCATED", "cut")))
            return
        usage = Usage(10, 4, len(words) - before, decode_s=pace_s * len(words), ttft_ms=20.0)
        ended.set_result(StepResult("".join(words), (), FinishReason.STOP, usage))

    def _let_go(self, sequence: Sequence) -> "asyncio.Future[StepResult] | None":
        self._writers.pop(sequence.id, None)
        found = self._sequences.pop(sequence.id, None)
        return None if found is None or found.ended.done() else found.ended

    def cancel(self, sequence: Sequence) -> None:
        """The worker lets go a little later, and may have finished until then."""
        sequence.on_text = lambda _text, _tokens: None
        if sequence.id not in self._sequences:
            return

        def let_go() -> None:
            writer = self._writers.get(sequence.id)
            ended = self._let_go(sequence)
            if writer is not None:
                writer.cancel()
            if ended is not None:
                ended.set_exception(StepFailed(RunError("CANCELLED", "the step was cancelled")))

        delay_s = self._world.chance.choice([0.0, 0.05, 0.3])
        asyncio.get_running_loop().call_later(delay_s, let_go)

    def drop_cache(self) -> None:
        """Give back what is said to be a cache."""
        assert self.settled
        self.caches_dropped += 1
        self.memory_bytes -= self.manifest.memory.cache_bytes

    # --- its end ---

    async def stop(self, timeout_s: float) -> None:
        """End the process; a moment later its memory is back, or it is still there."""
        self.leaving = True
        self._lose(WorkerError("the engine was unloaded", reason="ENGINE_UNLOADED"))
        chance = self._world.chance
        if self.process_alive:
            if chance.random() < self._world.chances.never_ends:
                await asyncio.sleep(timeout_s)
                asyncio.get_running_loop().call_later(30.0, self._end, False)
                raise WorkerError("it is still there", reason="UNLOAD_UNPROVEN")
            await asyncio.sleep(chance.choice([0.0, 0.05, 0.5]))
            self._end(chance.random() < self._world.chances.leaks)

    def kill(self) -> None:
        """SIGKILL; its socket hangs up a moment later."""
        if self.process_alive:
            self._killed = True
            asyncio.get_running_loop().call_later(0.02, self.die)

    def die(self) -> None:
        """The process ends by itself."""
        if not self.process_alive:
            return
        self._end(leaks=False)
        self._lose(WorkerError(f"the worker of {self.manifest.name} ended"))

    def _end(self, leaks: bool) -> None:  # noqa: FBT001 - also as a callback's argument
        if self.process_alive and leaks:
            self._world.leaked_bytes += self.memory_bytes
        self.process_alive, self.memory_bytes = False, 0

    def _lose(self, error: WorkerError) -> None:
        if self.lost.done():
            return
        self.lost.set_result(error)
        if not self._loading.done():
            self._loading.set_result(None)
        writers, self._writers = self._writers, {}
        for writer in writers.values():
            writer.cancel()
        sequences, self._sequences = self._sequences, {}
        for sequence in sequences.values():
            if not sequence.ended.done():
                sequence.ended.set_exception(error)


def answer(engine: str, request: StepRequest, chance: random.Random) -> list[str]:
    """The words that the engine says to this: always the same at temperature 0."""
    asked = request.messages[0].text
    repeats = request.sampling.temperature == 0.0
    own = random.Random(f"{engine} {asked}")  # noqa: S311 - reproducible, no secret
    source = own if repeats else chance
    count = 1 + source.randrange(30)
    words = [f"{source.randrange(1000)} " for _ in range(count)]
    resumed = [f"{word} " for word in request.resume_text.split()]
    words = resumed + words[len(resumed) :]
    wanted = request.max_output_tokens
    return words if wanted is None else words[: len(resumed) + wanted]


def quiet(world: World) -> None:
    """Nothing goes wrong from now on, and what was taken comes back."""
    world.chances = Chances()
    world.hog_bytes = world.leaked_bytes = 0


def rough(chance: random.Random) -> Chances:
    """A world in which something goes wrong now and then."""
    often = [0.0, 0.0, 0.1, 0.4]
    drawn = {name: chance.choice(often) for name in ("load_fails", "dies", "step_fails")}
    rare = {name: chance.choice([0.0, 0.0, 0.1]) for name in ("load_hangs", "leaks", "never_ends")}
    return dataclasses.replace(Chances(), **drawn, **rare)
