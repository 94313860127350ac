"""Clients that nobody here wrote, against a real daemon with the real engine: buf, Node and C++.

Each runs the robot of its folder in `examples/`. What they need and build lies below
`build/foreign-clients`; after the first time nothing is fetched or compiled again.
"""

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from edge_agent.v1.run_service_pb2 import RUN_STATE_SUCCEEDED, ListRunsRequest
from tests.support.connection import Connection
from tests.support.daemon import DaemonProcess, running_daemon

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"
BUILD = REPOSITORY / "build" / "foreign-clients"
RUN_TIMEOUT_S = 60
BUILD_TIMEOUT_S = 400
DEBIAN_PACKAGES = "g++ make pkg-config libgrpc++-dev libprotobuf-dev protobuf-compiler-grpc"


@pytest.fixture(scope="module")
def daemon(engine_store: Path) -> Iterator[DaemonProcess]:
    with running_daemon(engine_store) as running:
        yield running


@pytest.fixture(scope="module")
def buf_curl() -> list[str]:
    return [str(EXAMPLES / "buf-curl" / "robot.sh")]


@pytest.fixture(scope="module")
def node() -> list[str]:
    """The robot in a copy of the example, whose node_modules stay out of the tree."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} on PATH (Debian: apt install nodejs npm)")
    copy = BUILD / "examples" / "node"
    lock = copy / "package-lock.json"
    source = EXAMPLES / "node"
    (BUILD / "examples").mkdir(parents=True, exist_ok=True)
    _link(BUILD / "proto", REPOSITORY / "proto")
    _link(BUILD / "examples" / "protos", EXAMPLES / "protos")
    installed = copy / ".installed"
    wanted = (source / "package-lock.json").read_bytes()
    fresh = installed.exists() and installed.read_bytes() == wanted
    copy.mkdir(exist_ok=True)
    for name in ("package.json", "package-lock.json", ".npmrc", "robot.mjs"):
        shutil.copyfile(source / name, copy / name)
    if not fresh:
        installed.unlink(missing_ok=True)
        command = ["npm", "ci", "--prefer-offline", "--cache", str(BUILD / "npm-cache")]
        patience = ["--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
        said = _run([*command, *patience], BUILD_TIMEOUT_S, copy)
        for ours in ("EINTEGRITY", "EUSAGE"):  # a wrong hash; a lock for another package.json
            assert ours not in said.stderr, said.stderr
        if said.returncode != 0:
            pytest.skip(f"npm ci failed, most likely without a network:\n{said.stderr[-2000:]}")
        installed.write_bytes(lock.read_bytes())
    return ["node", str(copy / "robot.mjs")]


@pytest.fixture(scope="module")
def cpp() -> list[str]:
    for program in ("g++", "make", "pkg-config", "protoc", "grpc_cpp_plugin"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} on PATH (apt install {DEBIAN_PACKAGES})")
    if _run(["pkg-config", "--exists", "grpc++", "protobuf"], RUN_TIMEOUT_S).returncode != 0:
        pytest.skip(f"no C++ gRPC library (apt install {DEBIAN_PACKAGES})")
    out = BUILD / "cpp"
    command = [
        "make",
        "-j2",
        "-C",
        str(EXAMPLES / "cpp"),
        f"OUT={out}",
        "CXXFLAGS=-O0 -Wall -Wextra",
    ]
    built = _run(command, BUILD_TIMEOUT_S)
    assert built.returncode == 0, built.stdout + built.stderr
    return [str(out / "robot")]


@pytest.fixture(params=["buf-curl", "node", "cpp"])
def client_name(request: pytest.FixtureRequest) -> str:
    """As the client calls itself, and as its folder is called."""
    name: str = request.param
    return name


@pytest.fixture
def client(client_name: str, request: pytest.FixtureRequest) -> list[str]:
    command: list[str] = request.getfixturevalue(client_name.replace("-", "_"))
    return command


pytestmark = pytest.mark.timeout(BUILD_TIMEOUT_S + 2 * RUN_TIMEOUT_S)


def test_a_goal_is_reached_through_a_tool_call(
    client: list[str], client_name: str, daemon: DaemonProcess
) -> None:
    done = _run([*client, str(daemon.api_socket)])
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert 'tool call    set_lamp({"on":true})' in lines
    assert "tool result  the lamp is on" in lines
    assert lines[-1].startswith("answer       ")
    assert lines[-1].split()[1:]
    assert done.stderr == ""
    with Connection(daemon.api_socket) as connection:
        latest = connection.runs.ListRuns(ListRunsRequest(page_size=1)).runs[0]
    assert (latest.client, latest.state) == (client_name, RUN_STATE_SUCCEEDED)


def test_a_typed_error_is_printed_with_its_field_violations(
    client: list[str], daemon: DaemonProcess
) -> None:
    done = _run([*client, str(daemon.api_socket), "  "])
    assert done.returncode == 1
    first, *fields = done.stderr.splitlines()
    assert first.startswith("error: INVALID_REQUEST: ")
    assert len(fields) == 1
    assert fields[0].endswith("spec.messages[0].parts: has no text")


def test_a_run_that_fails_is_an_error_with_its_reason(
    client: list[str], daemon: DaemonProcess
) -> None:
    """The run is accepted; that its prompt does not fit the engine is found in its first step."""
    done = _run([*client, str(daemon.api_socket), "lamp " * 5000])
    assert done.returncode == 1
    assert done.stderr.startswith("error: PROMPT_TOO_LONG: ")


def test_the_socket_is_found_where_the_daemon_usually_has_it(
    client: list[str], daemon: DaemonProcess
) -> None:
    link = daemon.directory / "edge-agent"
    if not link.exists():
        link.symlink_to(daemon.api_socket.parent)
    done = _run(client, environ={"XDG_RUNTIME_DIR": str(daemon.directory)})
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_daemon_is_an_error_that_names_the_socket(client: list[str], tmp_path: Path) -> None:
    done = _run([*client, str(tmp_path / "none.sock")])
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "none.sock" in done.stderr


def test_the_node_lock_names_the_public_registry_and_a_hash_for_every_package() -> None:
    lock = json.loads((EXAMPLES / "node" / "package-lock.json").read_text())
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert packages
    for name, entry in packages.items():
        assert entry["resolved"].startswith("https://registry.npmjs.org/"), name
        assert entry["integrity"].startswith("sha512-"), name
    exact = json.loads((EXAMPLES / "node" / "package.json").read_text())["dependencies"]
    assert exact == {name: packages[f"node_modules/{name}"]["version"] for name in exact}


def test_the_shell_client_is_executable() -> None:
    assert (EXAMPLES / "buf-curl" / "robot.sh").stat().st_mode & stat.S_IXUSR


def _link(at: Path, target: Path) -> None:
    at.unlink(missing_ok=True)
    at.symlink_to(target)


def _run(
    command: Sequence[str],
    timeout_s: float = RUN_TIMEOUT_S,
    directory: Path = REPOSITORY,
    environ: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """What became of a command; a hung one is killed with all that it started."""
    with subprocess.Popen(
        command,
        cwd=directory,
        env={**os.environ, **(environ or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except BaseException:
            os.killpg(process.pid, 9)
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
