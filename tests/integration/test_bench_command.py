"""`edge-agent bench` against a real daemon with the real engine."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.cli.main import main
from edge_agent.client import Client
from edge_agent.core import EngineState
from edge_agent.engines.manifest import MANIFEST_NAME
from tests.conftest import ENGINE
from tests.support.daemon import BASE_CONFIG, DaemonProcess, running_daemon
from tests.support.engine_files import copy_engine

SMALL = "small"
BROKEN = "broken"
CONTEXT_TOKENS = 512
CONFIG = (
    BASE_CONFIG
    + f"engines: {{{SMALL}: {{context_tokens: {CONTEXT_TOKENS}, slots: 1}}}}\n"
    + "scheduling: {max_resident_engines: 1, min_residency: 100ms}\n"
)
QUICK = ("--rounds", "1", "--max-output-tokens", "8")
WAIT_S = 30.0


@pytest.fixture(scope="module")
def store(engine_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine under three names; one of them can't be loaded."""
    store = tmp_path_factory.mktemp("store")
    for name in (ENGINE, SMALL, BROKEN):
        copy_engine(engine_store / ENGINE, store, name)
    for spec in json.loads((store / BROKEN / MANIFEST_NAME).read_text())["files"]:
        model = store / BROKEN / spec["path"]
        model.unlink()  # the other names' stay
        model.touch()
        os.truncate(model, spec["size_bytes"])
    return store


@pytest.fixture(scope="module")
def daemon(store: Path) -> Iterator[DaemonProcess]:
    with running_daemon(store, CONFIG) as daemon:
        yield daemon


@pytest.fixture
def bench(daemon: DaemonProcess, capfd):
    """The command, in this process: exit code, stdout and stderr."""

    def run(*arguments: str, socket: Path = daemon.api_socket) -> tuple[int, str, str]:
        code = main(["bench", "--socket", str(socket), *arguments])
        return code, *capfd.readouterr()

    yield run
    with Client(str(daemon.admin_socket)) as client:
        for name in loaded(daemon):
            client.unload(name)


def loaded(daemon: DaemonProcess) -> list[str]:
    with Client(str(daemon.api_socket)) as client:
        return [engine.name for engine in client.engines() if engine.worker is not None]


def active_runs(daemon: DaemonProcess) -> int:
    with Client(str(daemon.api_socket)) as client:
        return sum(count for state, count in client.status().runs.items() if not state.ended)


def test_two_engines_side_by_side(bench, daemon, tmp_path):
    file, picture = tmp_path / "bench.json", tmp_path / "bench.svg"
    code, out, err = bench(
        "--engine", ENGINE, "--engine", SMALL, "--json", "--streams", "2", *QUICK,
        "--append", str(file), "--svg", str(picture),
    )  # fmt: skip
    assert code == 0
    document: dict[str, Any] = json.loads(out)
    assert document == json.loads(file.read_text())
    assert [result["engine"] for result in document["results"]] == [ENGINE, SMALL]
    for result in document["results"]:
        assert result["load_s"] > 0
        assert result["settings"] == {"rounds": 1, "streams": 2, "max_output_tokens": 8}
        short = result["short_prompt"]
        assert 0 < short["cached_tokens"] < short["prompt_tokens"]
        assert short["ttft_cold_ms"] > 0
        assert short["tokens_per_second"] > 0
        assert result["streams_tokens_per_second"] > 0
        assert result["memory"]["rss_bytes"] >= result["memory"]["pss_bytes"] > 100 << 20
        assert result["memory"]["mem_available_fall_bytes"] is not None
        assert result["machine"]["cores"] > 0
    first, second = document["results"]
    assert (first["worker_slots"], second["worker_slots"]) == (4, 1)
    long = first["long_prompt"]
    assert 550 < long["prompt_tokens"] < 650
    assert long["prompt_tokens"] * 0.9 < long["cached_tokens"] < long["prompt_tokens"]
    assert long["ttft_cold_ms"] > long["ttft_cached_ms"]
    assert second["long_prompt"] is None  # does not fit
    assert "small decides 1 at once: of 2 streams the others wait" in err
    assert picture.read_text().startswith("<svg")
    assert loaded(daemon) == []


def test_results_are_added_and_shown_together(bench, tmp_path):
    file = tmp_path / "bench.json"
    once = ("--engine", SMALL, "--streams", "1", *QUICK, "--append", str(file))
    assert bench(*once)[0] == 0
    code, out, _ = bench(*once)
    assert code == 0
    assert len(json.loads(file.read_text())["results"]) == 2
    assert ["engine", SMALL, SMALL] in [line.split() for line in out.splitlines()]
    assert "short prompt, beginning cached" in out
    assert "together" not in out


def test_an_unknown_engine_is_named_before_anything_is_measured(bench, daemon):
    code, out, err = bench("--engine", SMALL, "--engine", "no-such-engine", *QUICK)
    assert (code, out) == (1, "")
    assert "no engine 'no-such-engine' is installed" in err
    assert "hint: `edge-agent engines list`" in err
    assert loaded(daemon) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 7, "results": []}'])
def test_a_file_of_something_else_is_left_as_it_is(bench, daemon, tmp_path, content):
    file = tmp_path / "mine.json"
    file.write_text(content)
    code, out, err = bench("--engine", SMALL, *QUICK, "--append", str(file))
    assert (code, out) == (1, "")
    assert "holds no results" in err
    assert file.read_text() == content


@pytest.mark.parametrize("option", ["--append", "--svg"])
def test_a_directory_that_is_not_there_is_named_before_anything_is_measured(bench, option):
    code, out, err = bench("--engine", SMALL, *QUICK, option, "/no/such/directory/file")
    assert (code, out) == (1, "")
    assert f"{option}: /no/such/directory is no directory" in err


def test_an_engine_that_can_not_be_loaded_does_not_end_the_others(bench):
    code, out, err = bench("--engine", BROKEN, "--engine", SMALL, "--streams", "1", *QUICK)
    assert code == 1
    assert ["engine", SMALL] in [line.split() for line in out.splitlines()]
    assert "note: broken could not be measured" in err
    assert "error: " in err


def test_an_engine_that_had_to_leave_is_loaded_again(bench, daemon):
    with Client(str(daemon.admin_socket)) as client:
        client.load(ENGINE)
    code, out, _ = bench("--engine", SMALL, "--streams", "1", *QUICK, "--json")
    (result,) = json.loads(out)["results"]
    assert code == 0
    assert result["memory"]["mem_available_fall_bytes"] is None  # two engines changed it
    assert loaded(daemon) == [ENGINE]


def test_an_engine_in_memory_stays_there_with_the_load_time_that_it_had(bench, daemon):
    with Client(str(daemon.admin_socket)) as client:
        worker = client.load(SMALL).worker
        assert worker is not None
    code, out, _ = bench("--engine", SMALL, "--streams", "1", *QUICK, "--json")
    (result,) = json.loads(out)["results"]
    assert code == 0
    assert result["load_s"] == pytest.approx(worker.load_s)
    assert result["memory"]["mem_available_fall_bytes"] is None
    assert loaded(daemon) == [SMALL]


def test_without_the_admin_socket_the_first_run_loads(bench, daemon, runtime_dir):
    socket = runtime_dir / "api.sock"
    socket.symlink_to(daemon.api_socket)
    code, out, err = bench("--engine", SMALL, "--streams", "1", *QUICK, "--json", socket=socket)
    (result,) = json.loads(out)["results"]
    assert code == 0
    assert result["load_s"] > 0
    assert "what was loaded stays in memory" in err
    assert loaded(daemon) == [SMALL]


def start_long(daemon: DaemonProcess) -> "subprocess.Popen[bytes]":
    """The command in a process of its own, in the midst of its runs."""
    command = [
        sys.executable, "-m", "edge_agent", "bench", "--socket", str(daemon.api_socket),
        "--engine", SMALL, "--rounds", "100", "--max-output-tokens", "64",
    ]  # fmt: skip
    # Unbuffered, so that all but the line that is read here is left to `communicate`.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    assert process.stderr is not None
    assert process.stderr.readline().startswith(b"bench: 0 %")  # it has begun, and run nothing
    daemon.wait_for("step_finished", count=len(daemon.lines("step_finished")) + 1)
    return process


def test_ctrl_c_leaves_no_run_and_no_engine_behind(daemon):
    with start_long(daemon) as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err
    assert active_runs(daemon) == 0
    with Client(str(daemon.api_socket)) as client:
        states = {engine.name: engine.state for engine in client.engines()}
    assert states[SMALL] is EngineState.INSTALLED


def test_a_daemon_that_goes_away_is_named(store):
    with running_daemon(store, CONFIG) as daemon, start_long(daemon) as process:
        daemon.stop(signal.SIGKILL)
        out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out) == (1, b"")
    assert f"error: no daemon answers at {daemon.api_socket}\n" in err.decode()
