"""`edge-agent doctor` as a person, a script and a service manager call it."""

import json
import os
import pty
import re
import socket
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edge_agent.cli.main import main
from edge_agent.doctor import children, gpu
from edge_agent.doctor.children import NoAnswer
from edge_agent.doctor.finding import FindingStatus
from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.install import find_recipe, install
from tests.support import sysroots
from tests.support.engine_files import write_engine
from tests.support.fake_nvml.library import DISCRETE, GB10, ORIN, THOR, FakeNvml

REPOSITORY = Path(__file__).resolve().parents[2]
NVML = {"orin_nano": ORIN, "agx_orin": ORIN, "old_orin": ORIN, "thor": THOR, "gb10": GB10}
NAMES = [
    "jetson", "module", "l4t", "power_mode", "gpu_clock", "temperature", "power_rails", "memory",
    "swap", "memory_pressure", "nvml", "cuda", "groups", "device_nodes", "python", "clock",
    "disk/state", "disk/engines", "sockets", "config", "backend/llama_cpp", "engines",
]  # fmt: skip


class Doctor:
    """Doctor on one machine, with a home and a GPU of its own."""

    def __init__(
        self,
        tmp_path: Path,
        runtime_dir: Path,
        library: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.root = tmp_path / "machine"
        self.store = tmp_path / "store"
        self.config = tmp_path / "config.yaml"
        self.nvml = FakeNvml(tmp_path, library)
        self._runtime_dir = runtime_dir
        self._recipes = tmp_path / "recipes"
        self.config.write_text("")
        self._capsys, self._monkeypatch = capsys, monkeypatch

    @property
    def environ(self) -> dict[str, str]:
        home = str(self.root.parent / "home")
        runtime = {"XDG_RUNTIME_DIR": str(self._runtime_dir)}
        return {**os.environ, "HOME": home, **runtime, **self.nvml.environ}

    def machine(self, profile: str) -> None:
        sysroots.PROFILES[profile](self.root)
        self.nvml.set(
            NVML.get(profile, {}) or (DISCRETE if profile == "discrete" else {"init": "!9"})
        )

    def install(self, name: str, **changes: Any) -> None:
        recipe = find_recipe(str(write_engine(self._recipes, name=name, **changes)), self._recipes)
        install(recipe, Catalogue(self.store), lambda *_: None)

    @property
    def command(self) -> list[str]:
        options = ["--sysroot", self.root, "--config", self.config, "--engines-dir", self.store]
        return [sys.executable, "-m", "edge_agent", "doctor", *map(str, options)]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *arguments],
            env=self.environ,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )

    def ask(self, **variables: str) -> tuple[int, dict[str, dict[str, str]]]:
        """The exit code and the findings by name; in this process, which is quicker."""
        for name, value in {**self.environ, **variables}.items():
            self._monkeypatch.setenv(name, value)
        code = main([*self.command[3:], "--json"])
        output = self._capsys.readouterr()
        assert output.err == ""
        found = {finding["name"]: finding for finding in json.loads(output.out)["findings"]}
        return code, found


@pytest.fixture
def doctor(
    tmp_path: Path,
    runtime_dir: Path,
    fake_nvml_library: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Doctor:
    return Doctor(tmp_path, runtime_dir, fake_nvml_library, capsys, monkeypatch)


EXPECTED: Mapping[str, tuple[int, dict[str, str]]] = {
    "orin_nano": (
        0,
        {
            "module": r"ok Orin Nano 8GB \(developer kit\)",
            "l4t": r"ok R39\.2\.0, JetPack 7\.2",
            "power_mode": r"ok MAXN_SUPER",
            "nvml": r"ok driver 540\.5\.0, CUDA 13\.2; Orin \(nvgpu\), integrated",
            "device_nodes": r"ok /dev/nvmap",
        },
    ),
    "agx_orin": (
        0,
        {
            "module": r"ok AGX Orin 64GB",
            "l4t": r"ok R39\.2\.1, JetPack 7\.2\.1",
            "power_mode": r"ok 25W \(1\)",
            "temperature": r"warn cpu-thermal 91\.0 °C",
            "swap": r"ok 16\.0 GiB on disk",
        },
    ),
    "thor": (
        0,
        {
            "module": r"ok Thor T5000",
            "l4t": r"ok R39\.2\.0",
            "gpu_clock": r"ok 1575 MHz of 1575 MHz$",
            "nvml": r"ok driver 595\.78, .*NVIDIA Thor, integrated",
        },
    ),
    "old_orin": (1, {"l4t": r"fail R36\.5\.0, JetPack 6\.2\.2: older than R39"}),
    "gb10": (
        0,
        {
            "jetson": r"ok not a Jetson: NVIDIA DGX Spark",
            "nvml": r"ok .*NVIDIA GB10, integrated",
            "memory": r"ok 60\.8 GiB of 121\.7 GiB",
        },
    ),
    "discrete": (
        0,
        {"l4t": r"ok not a Jetson", "nvml": r"ok .*RTX 4090, 24\.0 GiB, compute capability 8\.9"},
    ),
    "plain_pc": (
        0,
        {"jetson": r"ok not a Jetson: Dell", "nvml": r"warn nvmlInit: the driver is not loaded"},
    ),
}


@pytest.mark.parametrize("profile", EXPECTED)
def test_each_machine_is_described_and_gated(doctor: Doctor, profile: str):
    doctor.machine(profile)
    doctor.install("tiny")
    code, found = doctor.ask()
    expected_code, lines = EXPECTED[profile]
    for name, pattern in lines.items():
        assert re.match(pattern, f"{found[name]['status']} {found[name]['value']}"), found[name]
    assert code == expected_code
    assert list(found) == [*NAMES, "engine/tiny"]


@pytest.mark.parametrize("profile", ["thor", "old_orin", "plain_pc"])
def test_the_schema_of_json_is_stable(doctor: Doctor, profile: str):
    doctor.machine(profile)
    done = doctor.run("--json")
    document = json.loads(done.stdout)
    assert list(document) == ["version", "sysroot", "status", "findings"]
    assert document["sysroot"] == str(doctor.root)
    assert document["status"] in {"ok", "warn", "fail"}
    assert (document["status"] == "fail") == (done.returncode == 1)
    for finding in document["findings"]:
        assert list(finding) == ["name", "status", "value", "hint"]
        assert all(isinstance(value, str) for value in finding.values())
        assert finding["status"] in {"ok", "warn", "fail", "unknown"}
        assert bool(finding["hint"]) == (finding["status"] != "ok"), finding
        assert finding["value"]


def test_text_has_one_line_for_each_finding_and_no_colours(doctor: Doctor):
    doctor.machine("old_orin")
    done = doctor.run()
    assert done.returncode == 1
    assert "\x1b" not in done.stdout
    *lines, summary = done.stdout.splitlines()
    shown = [line[6:].split()[0] for line in lines if not line.startswith("      ")]
    assert shown == NAMES
    gate = next(index for index, line in enumerate(lines) if line.startswith("FAIL  l4t "))
    assert lines[gate + 1].strip().startswith("-> install JetPack 7.2")
    assert summary.startswith("1 failure, ")


def test_a_terminal_gets_colours(doctor: Doctor):
    doctor.machine("old_orin")
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        doctor.command, env=doctor.environ, cwd=REPOSITORY, stdout=theirs
    ) as child:
        os.close(theirs)
        shown = b""
        while True:
            try:
                more = os.read(ours, 65536)
            except OSError:  # EIO: the other side is closed
                break
            if not more:
                break
            shown += more
        child.wait(timeout=30)
    os.close(ours)
    assert b"\x1b[31;1mFAIL\x1b[0m  l4t" in shown


# --- what the configuration needs


def test_a_preloaded_engine_that_is_not_installed(doctor: Doctor):
    doctor.machine("thor")
    doctor.config.write_text("preload: [absent]\n")
    code, found = doctor.ask()
    assert (code, found["engine/absent"]["status"]) == (1, "fail")


def test_a_preloaded_engine_that_does_not_fit_in_that_machines_memory(doctor: Doctor):
    doctor.machine("orin_nano")
    peak = 5_242_880 * 1024
    doctor.config.write_text("preload: [big]\n")
    doctor.install("big", memory={"load_peak_bytes": peak, "steady_bytes": peak})
    assert doctor.ask()[0] == 0
    sysroots.put(doctor.root, {"proc/meminfo": sysroots.meminfo(7_789_568, 5_242_879)})
    code, found = doctor.ask()
    assert (code, found["engine/big"]["status"]) == (1, "fail")


def test_with_a_daemon_running_memory_that_is_taken_may_be_its(doctor: Doctor, runtime_dir: Path):
    doctor.machine("orin_nano")
    doctor.config.write_text("preload: [big]\n")
    doctor.install("big", memory={"load_peak_bytes": 6 << 30, "steady_bytes": 6 << 30})
    (runtime_dir / "edge-agent").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(runtime_dir / "edge-agent" / "api.sock"))
        server.listen(4)
        code, found = doctor.ask()
    assert (code, found["engine/big"]["status"]) == (0, "unknown")
    assert found["sockets"]["value"].endswith("a daemon listens")


def test_a_broken_configuration(doctor: Doctor):
    doctor.machine("thor")
    doctor.config.write_text("runs: {max_steps: 0}\npreloat: []\n")
    code, found = doctor.ask()
    assert (code, found["config"]["status"]) == (1, "fail")
    assert "preloat" in found["config"]["value"]
    assert list(found) == NAMES


def test_an_engine_store_that_can_not_be_read(doctor: Doctor):
    doctor.machine("thor")
    doctor.store.write_text("a file")
    code, found = doctor.ask()
    assert (code, found["engines"]["status"]) == (1, "fail")


def test_a_worker_python_that_is_not_there(doctor: Doctor):
    doctor.machine("thor")
    doctor.config.write_text("worker: {python: {llama_cpp: /no/such/python}}\n")
    code, found = doctor.ask()
    assert (code, found["backend/llama_cpp"]["status"]) == (1, "fail")
    assert "worker.python.llama_cpp" in found["backend/llama_cpp"]["hint"]


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """The Python of an environment of its own, with nothing in it."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    return tmp_path / "venv" / "bin" / "python"


def add_library(python: Path, name: str, text: str, version: str | None = None) -> None:
    """A module, and what pip would have left of it."""
    (packages,) = (python.parents[1] / "lib").glob("python*/site-packages")
    sysroots.put(packages, {f"{name}.py" if "/" not in name else name: text})
    if version is not None:
        record = {"METADATA": f"Name: {name}\nVersion: {version}\n", "top_level.txt": name}
        sysroots.put(packages, {f"{name}-{version}.dist-info/{k}": v for k, v in record.items()})


def test_the_libraries_of_an_environment_of_its_own(doctor: Doctor, environment: Path):
    doctor.machine("thor")
    doctor.config.write_text(f"worker: {{python: {{llama_cpp: {environment}}}}}\n")
    code, found = doctor.ask()
    backend = found["backend/llama_cpp"]
    assert (code, backend["status"]) == (1, "fail")
    assert "xllamacpp: not installed; llguidance: not installed" in backend["value"]
    assert backend["hint"] == f"`{environment} -m pip install 'edge-agent[embedded]'`"
    add_library(environment, "xllamacpp", "print('{\"noise\": 1}')", "2026.10.1")
    for name in ("llguidance", "jsonschema_rs", "msgspec"):
        add_library(environment, name, "", "1.0")
    code, found = doctor.ask()
    assert (code, found["backend/llama_cpp"]["status"]) == (0, "ok")
    assert "xllamacpp 2026.10.1, llguidance 1.0" in found["backend/llama_cpp"]["value"]
    doctor.install("tiny", backend={"name": "llama_cpp", "min_version": "2026.11"})
    code, found = doctor.ask()
    assert (code, found["backend/llama_cpp"]["status"]) == (1, "fail")
    assert "tiny needs 2026.11" in found["backend/llama_cpp"]["value"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise OSError('libcudart.so.13: cannot open')", "OSError: libcudart.so.13"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "killed by signal 4"),
        ("import os; os._exit(3)", "exit code 3"),
    ],
)
def test_a_library_that_can_not_be_imported(
    doctor: Doctor, environment: Path, text: str, said: str
):
    doctor.machine("thor")
    doctor.config.write_text(f"worker: {{python: {{llama_cpp: {environment}}}}}\n")
    add_library(environment, "xllamacpp", text, "1.0")
    code, found = doctor.ask()
    assert (code, found["backend/llama_cpp"]["status"]) == (1, "fail")
    assert said in found["backend/llama_cpp"]["value"]


def test_this_environments_libraries_are_there(doctor: Doctor):
    doctor.machine("plain_pc")
    doctor.install("tiny")
    doctor.config.write_text("preload: [tiny]\n")
    code, found = doctor.ask()
    assert (code, found["backend/llama_cpp"]["status"]) == (0, "ok")
    assert re.match(r"xllamacpp 2026\.", found["backend/llama_cpp"]["value"])


# --- drivers

PYCUDA = """
class device_attribute:
    INTEGRATED = 18
class Device:
    count = staticmethod(lambda: 1)
    def __init__(self, index): pass
    def name(self): return "Orin"
    def get_attribute(self, attribute): return int(attribute == 18)
    def compute_capability(self): return (8, 7)
    def total_memory(self): return 7976517632
def init(): %s
def get_driver_version(): return 13020
"""


def cuda(environment: Path, init: str, deadline_s: float = 20) -> tuple[str, str]:
    """Status and value of the finding when `pycuda.driver.init` does that."""
    add_library(environment, "pycuda/__init__.py", "")
    add_library(environment, "pycuda/driver.py", PYCUDA % init)
    found = gpu.check_cuda(
        [sys.executable, str(environment)], is_jetson=True, deadline_s=deadline_s
    )
    assert found.status is FindingStatus.OK or found.hint
    return str(found.status), found.value


def test_cuda_is_asked_in_the_first_environment_that_has_pycuda(environment: Path):
    assert cuda(environment, "pass") == ("ok", "Orin, integrated, 8.7, 7.4 GiB")


def test_cuda_without_pycuda_is_unknown_on_a_jetson(doctor: Doctor):
    doctor.machine("thor")
    code, found = doctor.ask()
    assert (code, found["cuda"]["status"]) == (0, "unknown")
    assert found["cuda"]["value"] == "pycuda is not installed"


def test_no_pc_is_asked_for_pycuda(doctor: Doctor):
    doctor.machine("plain_pc")
    assert doctor.ask()[1]["cuda"]["status"] == "ok"


def test_cuda_that_fails_crashes_or_hangs_is_a_warning(environment: Path):
    assert cuda(environment, "raise RuntimeError('cuInit failed: 801')") == (
        "warn",
        "RuntimeError: cuInit failed: 801",
    )
    status, value = cuda(environment, "import os; os.abort()")
    assert (status, "killed by signal 6" in value) == ("warn", True)
    status, value = cuda(environment, "import time; time.sleep(600)", deadline_s=1)
    assert (status, "no answer within 1 s" in value) == ("warn", True)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"hang": 1}, "no answer within 1 s"),
        ({"crash": 1}, "killed by signal 11"),
        ({"fail": "!15"}, "the GPU is lost"),
        ({"init": "!9"}, "the driver is not loaded"),
        ({"init": "!18"}, "driver and library are of different versions"),
    ],
)
def test_a_driver_that_fails_crashes_or_hangs_is_a_warning(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, state: Mapping[str, object], said: str
):
    doctor.nvml.set(DISCRETE, state)
    for name, value in doctor.nvml.environ.items():
        monkeypatch.setenv(name, value)
    found = gpu.check_nvml(is_jetson=False, deadline_s=1 if "hang" in state else 20)
    assert found.status is FindingStatus.WARN
    assert said in found.value
    assert found.hint


def test_a_child_that_answers_nonsense_has_not_answered(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho nonsense\n")
    python.chmod(0o755)
    with pytest.raises(NoAnswer, match="nonsense"):
        children.ask_libraries(str(python), ("json",), 20)


def test_no_driver_library_is_fine_on_a_pc_and_not_on_a_jetson(doctor: Doctor, tmp_path: Path):
    empty = {"LD_LIBRARY_PATH": str(tmp_path)}
    doctor.machine("plain_pc")
    assert doctor.ask(**empty)[1]["nvml"]["status"] == "ok"
    doctor.machine("thor")
    assert doctor.ask(**empty)[1]["nvml"]["status"] == "warn"


def test_doctor_runs_on_this_machine_and_changes_nothing(tmp_path: Path, runtime_dir: Path):
    environ = {**os.environ, "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(runtime_dir)}
    done = subprocess.run(
        [sys.executable, "-m", "edge_agent", "doctor"],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == list(runtime_dir.iterdir()) == []
