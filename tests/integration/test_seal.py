"""What notices that an engine's files are no longer the installed ones, and what it costs."""

import os
import shutil
from pathlib import Path

import pytest

from edge_agent.engines import seal, store
from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.install import find_recipe, install
from edge_agent.engines.manifest import SEAL_NAME, Manifest
from edge_agent.errors import LoadFailed, ManifestError
from tests.support.engine_files import FILES, NAME, write_engine


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    """A store with one engine, `tiny`."""
    recipe = find_recipe(str(write_engine(tmp_path)), tmp_path)
    catalogue = Catalogue(tmp_path / "store")
    install(recipe, catalogue, lambda _fraction, _note: None)
    return catalogue


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The files that were read whole since."""
    seen: list[str] = []
    real = store.hash_file

    def watched(path, advance):
        seen.append(path.name)
        return real(path, advance)

    monkeypatch.setattr(store, "hash_file", watched)
    return seen


@pytest.fixture
def manifest(catalogue: Catalogue) -> Manifest:
    return catalogue.get(NAME)


def swap(path: Path) -> None:
    """Another file of the same size, as old as the one before."""
    before = path.stat()
    data = bytes(reversed(path.read_bytes()))
    path.unlink()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_what_was_just_installed_is_not_read_again(catalogue, manifest, read):
    for _ in range(2):
        seal.require_unchanged(catalogue.root / NAME, manifest)
    assert read == []


def test_another_file_of_the_same_size_and_age_is_noticed(catalogue, manifest, read):
    swap(catalogue.root / NAME / "model.bin")
    assert catalogue.quick_check(NAME) == ()
    for _ in range(2):  # it stays wrong
        with pytest.raises(LoadFailed) as caught:
            seal.require_unchanged(catalogue.root / NAME, manifest)
        error = caught.value
        assert error.reason == "ENGINE_FILES_WRONG"
        assert error.metadata["engine"] == NAME
        assert error.metadata["files"].startswith("model.bin: expected SHA-256 ")
        for told in ("install it again", "its size or times", f"engines verify {NAME}"):
            assert told in error.message
    assert read == ["model.bin"] * 2


def test_a_store_that_was_copied_is_read_once(catalogue, manifest, tmp_path, read):
    copy = tmp_path / "copy"
    shutil.copytree(catalogue.root / NAME, copy)
    for _ in range(2):
        seal.require_unchanged(copy, manifest)
    assert sorted(read) == sorted(Path(path).name for path in FILES)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"model.bin":[1]}'])
def test_a_broken_seal_costs_a_reading(catalogue, manifest, read, content):
    (catalogue.root / NAME / SEAL_NAME).write_bytes(content)
    seal.require_unchanged(catalogue.root / NAME, manifest)
    assert len(read) == len(FILES)


def test_a_store_that_can_not_be_written_is_read_each_time(catalogue, manifest, read, monkeypatch):
    def full(_directory, _manifest):
        raise OSError(28, "No space left on device")

    (catalogue.root / NAME / SEAL_NAME).unlink()
    monkeypatch.setattr(seal, "write", full)
    for _ in range(2):
        seal.require_unchanged(catalogue.root / NAME, manifest)
    assert len(read) == 2 * len(FILES)


def test_a_file_that_is_gone_is_named(catalogue, manifest):
    (catalogue.root / NAME / "model.bin").unlink()
    with pytest.raises(LoadFailed, match=r"model\.bin: .*No such file"):
        seal.require_unchanged(catalogue.root / NAME, manifest)


def test_verifying_decides_whether_the_next_load_reads(catalogue, manifest, read):
    path = catalogue.root / NAME / "model.bin"
    with path.open("r+b") as file:
        file.write(b"X")
    seal.write(catalogue.root / NAME, manifest)  # as if a disk had lost them, without a write
    seal.require_unchanged(catalogue.root / NAME, manifest)
    assert read == []
    assert [wrong.field for wrong in catalogue.verify(NAME, lambda _: None)] == ["model.bin"]
    with pytest.raises(LoadFailed):
        seal.require_unchanged(catalogue.root / NAME, manifest)
    with path.open("r+b") as file:
        file.write(FILES["model.bin"][:1])
    assert catalogue.verify(NAME, lambda _: None) == ()
    read.clear()
    seal.require_unchanged(catalogue.root / NAME, manifest)
    assert read == []


def test_no_file_of_an_engine_lies_where_the_seal_goes(tmp_path):
    recipe = write_engine(tmp_path, {**FILES, SEAL_NAME: b"x"})
    with pytest.raises(ManifestError, match="is taken by another file or the manifest"):
        find_recipe(str(recipe), tmp_path)
