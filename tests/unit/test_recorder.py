"""What a run's time took of the machine: snapshots of a sampler whose clock is driven by hand."""

import asyncio
import gc
import weakref
from pathlib import Path

import pytest

from edge_agent.core import RunError, RunState, RunTelemetry
from edge_agent.events import Event, RunFinished, Snapshot
from edge_agent.runs.halts import HaltLatch
from edge_agent.runs.runs import Runs
from edge_agent.telemetry.recorder import Recorder
from edge_agent.telemetry.sampler import Sampler
from tests.support import sysroots
from tests.support.scripted_engine import SETTINGS, ScriptedEngines, spec

TICK_S = 0.25
RAIL = "sys/class/hwmon/hwmon1"
ZONE = "sys/class/thermal/thermal_zone0/temp"


class Machine:
    """A sampler whose snapshots go to a recorder."""

    def __init__(self, root: Path) -> None:
        self.root, self.now_s = root, 1000.0
        self.sampler = Sampler(root, clock=lambda: self.now_s)
        self.recorder = Recorder(lambda: self.sampler.latest)
        self.sampler.sample(self.now_s)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            self.now_s += TICK_S
            self.recorder.observe(self.sampler.sample(self.now_s))

    def put(self, files: dict[str, str]) -> None:
        sysroots.put(self.root, files)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """An Orin Nano that takes 5 W."""
    sysroots.orin_nano(tmp_path)
    sysroots.put(tmp_path, {f"{RAIL}/in1_input": "5000\n", f"{RAIL}/curr1_input": "1000\n"})
    return Machine(tmp_path)


def test_the_energy_is_the_total_rails_between_begin_and_end(machine: Machine):
    machine.run(3)
    recording = machine.recorder.begin()
    machine.run(10.5)
    assert recording.end().energy_mj == pytest.approx(52_500)


def test_two_recordings_share_nothing(machine: Machine):
    first = machine.recorder.begin()
    machine.run(4)
    second = machine.recorder.begin()
    machine.run(2)
    assert first.end().energy_mj == pytest.approx(30_000)
    machine.run(2)
    assert second.end().energy_mj == pytest.approx(20_000)


def test_a_run_between_two_samples_has_its_share(machine: Machine):
    recording = machine.recorder.begin()
    machine.now_s += 0.1
    assert recording.end().energy_mj == pytest.approx(500)


def test_the_least_memory_and_the_highest_temperature_are_those_in_between(machine: Machine):
    recording = machine.recorder.begin()
    machine.run(1)
    machine.put({"proc/meminfo": sysroots.meminfo(7_789_568, 1_000), ZONE: "93000\n"})
    machine.run(1)
    machine.put({"proc/meminfo": sysroots.meminfo(7_789_568, 5_000), ZONE: "48000\n"})
    machine.run(1)
    found = recording.end()
    assert (found.min_available_bytes, found.max_temperature_milli_c) == (1_000 * 1024, 93_000)


def test_what_was_before_and_comes_after_does_not_count(machine: Machine):
    machine.put({"proc/meminfo": sysroots.meminfo(7_789_568, 1_000), ZONE: "93000\n"})
    machine.run(1)
    machine.put({"proc/meminfo": sysroots.meminfo(7_789_568, 5_000), ZONE: "48000\n"})
    machine.run(1)
    recording = machine.recorder.begin()
    found = recording.end()
    machine.put({"proc/meminfo": sysroots.meminfo(7_789_568, 2_000)})
    machine.run(1)
    assert (found.min_available_bytes, found.max_temperature_milli_c) == (5_000 * 1024, 49_593)


def test_the_end_counts_what_was_sampled_and_not_handed_over_yet(machine: Machine):
    recording = machine.recorder.begin()
    machine.put({"proc/meminfo": sysroots.meminfo(7_789_568, 1_000)})
    machine.now_s += TICK_S
    machine.sampler.sample(machine.now_s)
    assert recording.end().min_available_bytes == 1_000 * 1024


def test_nothing_is_kept_of_a_recording_that_has_ended(machine: Machine):
    recording = machine.recorder.begin()
    gone = weakref.ref(recording)
    recording.end()
    del recording
    gc.collect()
    assert gone() is None


def test_a_rail_that_fails_for_long_makes_the_energy_unknown(machine: Machine):
    recording = machine.recorder.begin()
    machine.put({f"{RAIL}/curr1_input": "nonsense"})
    machine.run(6)
    machine.put({f"{RAIL}/curr1_input": "1000\n"})
    machine.run(6)
    assert recording.end().energy_mj is None


def test_a_sampler_that_hangs_makes_it_unknown(machine: Machine):
    recording = machine.recorder.begin()
    machine.now_s += 60
    assert recording.end().energy_mj is None
    assert machine.recorder.begin().end() == RunTelemetry()


def test_a_machine_without_a_rail_has_no_energy(tmp_path: Path):
    sysroots.plain_pc(tmp_path)
    machine = Machine(tmp_path)
    recording = machine.recorder.begin()
    machine.run(4)
    found = recording.end()
    assert (found.energy_mj, found.max_temperature_milli_c) == (None, None)
    assert found.min_available_bytes == 8_000_000 * 1024


@pytest.mark.parametrize("state", [RunState.SUCCEEDED, RunState.CANCELLED])
def test_the_last_event_of_a_run_tells_it_however_the_run_ended(machine: Machine, state: RunState):
    async def scenario() -> list[Event]:
        engines = ScriptedEngines()
        latch = HaltLatch(machine.root / "halts.json")
        runs = Runs(engines, latch, SETTINGS, recorder=machine.recorder)
        run = runs.create(spec(), client="test", request_id="")
        step = await engines.next()
        machine.run(4)
        if state is RunState.SUCCEEDED:
            step.answer("Done")
        else:
            runs.cancel(run.id, RunError("CANCELLED_BY_CALLER", "by a test"))
        async with asyncio.timeout(20):
            return [event async for event in runs.watch(run.id, 0)]

    first, *_, last = (event.body for event in asyncio.run(scenario()))
    assert isinstance(first, Snapshot)
    assert first.run.telemetry is None
    assert isinstance(last, RunFinished)
    assert last.run.state is state
    found = last.run.telemetry
    assert found
    assert found.energy_mj == pytest.approx(20_000)
    assert (found.min_available_bytes, found.max_temperature_milli_c) == (5_242_880 * 1024, 49_593)
