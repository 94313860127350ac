"""What is wrong on disk: engines, manifests, names, the configuration, a full disk, the sockets.

The daemon names it, what does not depend on it goes on, and nothing is left half done.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.install import find_recipe, install
from edge_agent.engines.manifest import MANIFEST_NAME, SEAL_NAME
from edge_agent.errors import InstallError
from edge_agent.v1 import engine_service_pb2 as engine_pb
from edge_agent.v1 import run_service_pb2 as run_pb
from edge_agent.v1 import system_service_pb2 as system_pb
from tests.support.connection import Connection, Problem, goal
from tests.support.daemon import BASE_CONFIG, ENGINE, DaemonProcess, running_daemon
from tests.support.engine_files import FILES, NAME, copy_engine, write_engine

DEADLINE_S = 2.0
TIMEOUT_S = 50.0


def run_cli(*arguments: str | bytes, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_agent", *arguments],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=TIMEOUT_S,
        check=False,
        **more,
    )


def add_engine(directory: Path, store: Path, name: str = NAME) -> Path:
    """Install a made engine, whose model no library can load; returns its directory."""
    recipe = find_recipe(str(write_engine(directory, name=name)), directory)
    install(recipe, Catalogue(store), lambda _fraction, _note: None)
    return store / name


def status(client: Connection) -> system_pb.GetStatusResponse:
    return client.system.GetStatus(system_pb.GetStatusRequest(), timeout=DEADLINE_S)


def engine_of(client: Connection, name: str) -> engine_pb.Engine:
    asked = engine_pb.GetEngineRequest(name=name)
    return client.engines.GetEngine(asked, timeout=DEADLINE_S).engine


@pytest.fixture(params=["api", "admin"])
def connect(request) -> Callable[[DaemonProcess], Connection]:
    """To one of a daemon's sockets."""
    return lambda daemon: Connection(getattr(daemon, f"{request.param}_socket"))


# --- model files ---


def truncate(model: Path) -> None:
    data = model.read_bytes()[:-1]
    model.unlink()
    model.write_bytes(data)


def swap(model: Path) -> None:
    """Of the same size and age, and no other file system object than before."""
    before = model.stat()
    data = bytes(reversed(model.read_bytes()))
    model.unlink()
    model.write_bytes(data)
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))


def link(model: Path) -> None:
    model.rename(model.with_name("elsewhere"))
    model.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (truncate, "model.bin: expected 320000 bytes, found 319999"),
        (Path.unlink, "model.bin: expected 320000 bytes, found: No such file or directory"),
        (link, "model.bin: expected 320000 bytes, found a symbolic link"),
        (swap, "model.bin: expected SHA-256"),
    ],
)
def test_a_damaged_model_file_fails_its_runs_by_name(tmp_path, connect, damage, told):
    directory = add_engine(tmp_path, tmp_path / "store")
    damage(directory / "model.bin")
    with running_daemon(tmp_path / "store", "") as daemon, connect(daemon) as client:
        run = client.end_of(client.create(goal("Hi")).id)
        assert (run.state, run.error.reason) == (run_pb.RUN_STATE_FAILED, "ENGINE_FILES_WRONG")
        assert told in run.error.message
        assert "install it again" in run.error.message
        assert run.error.metadata["engine"] == NAME
        engine = engine_of(client, NAME)
        assert (engine.state, engine.error) == (engine_pb.ENGINE_STATE_FAILED, run.error)
        assert status(client).state == system_pb.DAEMON_STATE_READY
        with Connection(daemon.admin_socket) as admin:
            with pytest.raises(grpc.RpcError) as refused:
                admin.engines.LoadEngine(engine_pb.LoadEngineRequest(name=NAME), timeout=TIMEOUT_S)
            problem = Problem(refused.value)
            assert problem.code is grpc.StatusCode.FAILED_PRECONDITION
            assert problem.reason == "ENGINE_FILES_WRONG"


def test_a_model_that_is_none_fails_in_the_librarys_words(tmp_path, connect):
    add_engine(tmp_path, tmp_path / "store")
    with running_daemon(tmp_path / "store", "") as daemon, connect(daemon) as client:
        run = client.end_of(client.create(goal("Hi")).id)
        assert (run.state, run.error.reason) == (run_pb.RUN_STATE_FAILED, "ENGINE_LOAD_FAILED")
        assert "model.bin" in run.error.message
        assert status(client).state == system_pb.DAEMON_STATE_READY


# --- manifests and names ---


def become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def test_broken_manifests_are_named_and_other_engines_work(tmp_path, engine_store, connect):
    store = tmp_path / "store"
    copy_engine(engine_store / ENGINE, store, ENGINE)
    broken: dict[str, Callable[[Path], object]] = {
        "half": lambda path: path.write_bytes(path.read_bytes()[:100]),
        "latin": lambda path: path.write_bytes(b'{"name":"\xe9"}'),
        "other": lambda path: path.write_bytes(path.read_bytes().replace(b"other", b"../up")),
        "outside": lambda path: path.write_bytes(
            path.read_bytes().replace(b'"model.bin"', b'"../../etc/passwd"')
        ),
        "pipe": become_a_pipe,
        "linked": become_a_link,
        "none": Path.unlink,
    }
    for name, break_it in broken.items():
        break_it(add_engine(tmp_path, store, name) / MANIFEST_NAME)
    os.mkdir(os.fsencode(store) + b"/caf\xe9")  # noqa: PTH102 - no text
    with running_daemon(store, BASE_CONFIG) as daemon, connect(daemon) as client:
        told = status(client)
        assert told.state == system_pb.DAEMON_STATE_DEGRADED
        named = {reason.split(":")[0].removeprefix("engine ") for reason in told.degraded_reasons}
        assert named == {*broken, "caf?"}
        assert told.engines_installed == 1
        for name in broken:
            for call in (
                lambda name=name: engine_of(client, name),
                lambda name=name: client.create(goal("Hi", engine=name)),
            ):
                with pytest.raises(grpc.RpcError) as refused:
                    call()
                problem = Problem(refused.value)
                assert problem.code is grpc.StatusCode.FAILED_PRECONDITION
                assert problem.reason == "MANIFEST_INVALID"
                assert f"/{name}" in problem.message
        run = client.end_of(client.create(goal("Hi", max_output_tokens=1)).id)
        assert run.state == run_pb.RUN_STATE_SUCCEEDED
        assert daemon.lines("rpc_crashed") == []


@pytest.mark.parametrize(
    "name", ["../../etc", "..", ".lock", "/etc", "", "UP", "a" * 5000, "a\nb", b"caf\xe9"]
)
@pytest.mark.parametrize("command", ["show", "verify", "remove", "install"])
def test_a_name_on_the_command_line_is_no_path(tmp_path, name, command):
    add_engine(tmp_path, tmp_path / "store")
    done = run_cli("engines", command, "--store", str(tmp_path / "store"), "--", name)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert (tmp_path / "store" / NAME / MANIFEST_NAME).exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": "../up"}, "name: '../up', must match"),
        ({"name": ".hidden"}, "name: '.hidden', must match"),
        ({"name": "a" * 65}, "must match"),
        ({"model": "../../etc/passwd"}, "'../../etc/passwd' is not among files"),
        ({"files": {"../up": b"x"}}, "path '../up', must be relative and plain"),
        ({"files": {"/etc/passwd": b"x"}}, "path '/etc/passwd', must be relative"),
        ({"files": {"a/../b": b"x"}}, "must be relative"),
        ({"files": {MANIFEST_NAME: b"x"}}, "is taken"),
        ({"files": {SEAL_NAME: b"x"}}, "is taken"),
    ],
)  # fmt: skip
def test_a_recipe_never_leads_out_of_the_store(tmp_path, changes, told):
    files = changes.pop("files", FILES)
    recipe = write_engine(tmp_path / "deep/er", FILES)
    data = yaml.safe_load(recipe.read_text()) | changes
    if files is not FILES:
        data["files"] = [
            {"path": path, "sha256": "0" * 64, "size_bytes": len(content)}
            for path, content in files.items()
        ]
        data["model"] = next(iter(files))
    recipe.write_text(yaml.safe_dump(data))
    done = run_cli("engines", "install", str(recipe), "--store", str(tmp_path / "store"), "--json")
    assert done.returncode == 1
    error = json.loads(done.stderr)["error"]
    assert error["reason"] == "MANIFEST_INVALID"
    assert told in error["message"]
    assert not list((tmp_path / "store").glob("*"))


# --- the configuration ---

FIVE = """\
runs: {max_stepz: 3, timeout: soon, max_tools: 0}
worker: {threads: many}
log: {level: loud}
"""
WRONG = {"runs.max_stepz", "runs.timeout", "runs.max_tools", "worker.threads", "log.level"}


def test_five_errors_in_the_configuration_are_told_at_once(tmp_path, connect):
    with running_daemon(tmp_path, FIVE, ready=False) as daemon:
        assert daemon.process.wait(TIMEOUT_S) == 1
        said = daemon.wait_for_output()
        assert "5 errors in the configuration" in said
        assert all(key in said for key in WRONG)
        assert "did you mean runs.max_steps?" in said
    with running_daemon(tmp_path, "") as daemon, Connection(daemon.admin_socket) as admin:
        daemon.configure(FIVE)
        with pytest.raises(grpc.RpcError) as refused:
            admin.system.ReloadConfig(system_pb.ReloadConfigRequest(), timeout=DEADLINE_S)
        problem = Problem(refused.value)
        assert problem.code is grpc.StatusCode.INVALID_ARGUMENT
        assert problem.reason == "CONFIG_INVALID"
        assert set(problem.fields) == WRONG
        assert problem.metadata["errors"] == "5"
        with connect(daemon) as client:
            told = status(client)
            assert told.state == system_pb.DAEMON_STATE_DEGRADED
            assert "5 errors" in told.degraded_reasons[0]


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """1 MiB and 24 files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = "size=1m,nr_inodes=24,mode=700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small disk here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def names(disk: Path) -> set[str]:
    return {path.name for path in disk.iterdir()} - {".lock"}


def test_an_install_that_does_not_fit_says_so_and_leaves_nothing(tmp_path, small_disk):
    recipe = write_engine(tmp_path, {"model.bin": bytes(1 << 20)})
    done = run_cli("engines", "install", str(recipe), "--store", str(small_disk), "--json")
    assert done.returncode == 1
    error = json.loads(done.stderr.splitlines()[-1])["error"]
    assert error["reason"] == "NO_SPACE"
    assert error["metadata"]["needed_bytes"] == str(2 << 20)
    assert int(error["metadata"]["available_bytes"]) <= 1 << 20
    assert names(small_disk) == set()


@pytest.mark.parametrize("what", ["bytes", "files"])
def test_a_disk_that_fills_during_an_install_leaves_nothing(
    tmp_path, small_disk, monkeypatch, what
):
    monkeypatch.setattr("edge_agent.engines.install.SPACE_MARGIN_BYTES", 0)
    recipe = find_recipe(str(write_engine(tmp_path, {"model.bin": bytes(500_000)})), tmp_path)
    filler = small_disk / "filler"

    def fill(_fraction: float, _note: str) -> None:
        if filler.exists():
            return
        if what == "bytes":
            free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
            filler.write_bytes(bytes(free))
        else:
            filler.mkdir()
            for number in range(os.statvfs(small_disk).f_ffree):
                (filler / str(number)).touch()

    with pytest.raises(InstallError) as caught:
        install(recipe, Catalogue(small_disk), fill)
    assert caught.value.reason == "NO_SPACE"
    assert names(small_disk) == {"filler"}


def test_a_daemon_on_a_full_disk_works(tmp_path, small_disk, connect, monkeypatch):
    """Its engine store is full, so that not even the seal can be renewed."""
    monkeypatch.setattr("edge_agent.engines.install.SPACE_MARGIN_BYTES", 0)
    recipe = write_engine(tmp_path, {"model.bin": bytes(1000)})
    install(find_recipe(str(recipe), tmp_path), Catalogue(small_disk), lambda *_: None)
    directory = small_disk / NAME
    (directory / SEAL_NAME).unlink()
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / ".filler").write_bytes(bytes(free))
    with running_daemon(small_disk, "") as daemon, connect(daemon) as client:
        run = client.end_of(client.create(goal("Hi")).id)
        assert run.error.reason == "ENGINE_LOAD_FAILED"  # it was read, and is no model
        assert status(client).state == system_pb.DAEMON_STATE_READY
    assert not (directory / SEAL_NAME).exists()


# --- the sockets ---


def serve(tmp_path: Path, runtime_dir: Path) -> dict[str, Any]:
    """The error with which a daemon refuses to start."""
    done = run_cli(
        "serve", "--json", "--runtime-dir", str(runtime_dir), "--state-dir", str(tmp_path / "state")
    )
    assert done.returncode == 1
    error: dict[str, Any] = json.loads(done.stderr.splitlines()[-1])["error"]
    return error


def test_a_socket_path_that_is_too_long_is_told_with_both_numbers(tmp_path, runtime_dir):
    error = serve(tmp_path, runtime_dir / ("x" * 100))
    assert error["reason"] == "SOCKET_PATH_TOO_LONG"
    assert error["metadata"]["limit_bytes"] == "107"
    assert int(error["metadata"]["size_bytes"]) > 107
    assert "choose a shorter runtime directory" in error["message"]


@pytest.mark.parametrize("name", ["api.sock", "admin.sock"])
@pytest.mark.parametrize("what", ["file", "directory", "dangling link", "listening socket"])
def test_what_is_in_the_way_of_a_socket_is_named_and_left_alone(tmp_path, runtime_dir, name, what):
    path = runtime_dir / name
    with socket.socket(socket.AF_UNIX) as other:
        if what == "file":
            path.write_text("mine")
        elif what == "directory":
            path.mkdir()
        elif what == "dangling link":
            path.symlink_to("nowhere")
        else:
            other.bind(str(path))
            other.listen()
        before = path.lstat().st_ino
        error = serve(tmp_path, runtime_dir)
        assert error["reason"] == "SOCKET_PATH_TAKEN"
        assert error["metadata"]["path"] == str(path)
        assert path.lstat().st_ino == before


@pytest.mark.parametrize("command", ["status", "run"])
def test_a_client_is_told_what_is_wrong_with_a_sockets_path(runtime_dir, command):
    words = ("hello",) if command == "run" else ()
    for path, reason in (
        (runtime_dir / ("x" * 200), "SOCKET_PATH_TOO_LONG"),
        (runtime_dir / "none.sock", "DAEMON_UNREACHABLE"),
        (runtime_dir, "DAEMON_UNREACHABLE"),
    ):
        done = run_cli(command, "--json", "--socket", str(path), *words)
        assert done.returncode == 1
        error = json.loads(done.stderr.splitlines()[-1])["error"]
        assert error["reason"] == reason
        assert str(path) in error["metadata"].values()
