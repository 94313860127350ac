"""What counts as an installed engine, and what verifying finds."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.engines import store
from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.install import find_recipe, install
from edge_agent.engines.manifest import MANIFEST_NAME
from edge_agent.errors import ManifestError, NotFound
from tests.support.engine_files import FILES, NAME, write_engine


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    """A store with one engine, `tiny`."""
    recipe = find_recipe(str(write_engine(tmp_path)), tmp_path)
    catalogue = Catalogue(tmp_path / "store")
    install(recipe, catalogue, lambda _fraction, _note: None)
    return catalogue


def verify(catalogue: Catalogue) -> dict[str, str]:
    return {item.field: item.description for item in catalogue.verify(NAME, lambda _: None)}


class TestListing:
    def test_a_store_that_is_not_there_is_empty(self, tmp_path: Path):
        assert Catalogue(tmp_path / "none").list() == ()
        assert Catalogue(tmp_path / "none").problems() == ()

    @pytest.mark.parametrize(
        ("break_it", "problem"),
        [
            ("rm manifest.json", "No such file"),
            ("rm manifest.json && mkdir manifest.json", "Is a directory"),
            ("echo '{' > manifest.json", "manifest.json: Input data was truncated"),
            ("sed -i s/tiny/other/ manifest.json", "name 'other', must be the directory's name"),
            ("head -c 2000000 /dev/zero > manifest.json", "larger than 1048576 bytes"),
            ("head -c 500000 /dev/zero | tr '\\0' '[' > manifest.json", "Expected `object`"),
            ("printf '\\377' > manifest.json", "manifest.json: "),
            ("rm manifest.json && mkfifo manifest.json", "must be a regular file"),
            (
                "rm manifest.json && ln -s /dev/zero manifest.json",
                "must be a regular file, no link",
            ),
        ],
    )
    def test_a_broken_engine_is_reported_and_not_listed(
        self, catalogue: Catalogue, break_it: str, problem: str
    ):
        subprocess.run(["sh", "-ec", break_it], cwd=catalogue.root / NAME, check=True)
        assert catalogue.list() == ()
        (broken,) = catalogue.problems()
        assert broken.name == NAME
        assert problem in broken.description
        with pytest.raises(ManifestError, match=str(catalogue.root)):
            catalogue.get(NAME)

    def test_hidden_names_are_neither_listed_nor_problems(self, catalogue: Catalogue):
        for kind in (store.INSTALLING, store.REMOVING, store.REPLACED):
            (catalogue.root / NAME).rename(store.hidden(catalogue.root, kind, NAME))
            assert catalogue.list() == ()
            assert catalogue.problems() == ()
            next(catalogue.root.glob(f"{kind}*")).rename(catalogue.root / NAME)

    def test_a_link_or_a_file_is_no_engine(self, catalogue: Catalogue, tmp_path: Path):
        (catalogue.root / NAME).rename(tmp_path / NAME)
        (catalogue.root / NAME).symlink_to(tmp_path / NAME)
        (catalogue.root / "readme").write_text("hello")
        assert catalogue.list() == ()
        assert [problem.name for problem in catalogue.problems()] == ["readme", NAME]
        with pytest.raises(NotFound):
            catalogue.directory(NAME)

    def test_a_name_that_is_no_text_is_told_as_text(self, catalogue: Catalogue):
        os.mkdir(os.fsencode(catalogue.root) + b"/caf\xe9\n")  # noqa: PTH102 - bytes
        (broken,) = catalogue.problems()
        assert broken.name == "caf??"
        assert broken.description.encode()

    def test_an_unknown_name_names_the_installed_ones(self, catalogue: Catalogue):
        for ask in (catalogue.get, catalogue.directory, catalogue.quick_check, catalogue.remove):
            with pytest.raises(NotFound, match=r"no engine 'tinny' in .*; installed: tiny"):
                ask("tinny")

    @pytest.mark.parametrize("name", ["", ".", "..", "../store/tiny", "tiny/", ".lock", "TINY"])
    def test_a_name_never_leads_out_of_the_store(self, catalogue: Catalogue, name: str):
        with pytest.raises(NotFound):
            catalogue.remove(name)
        assert len(catalogue.list()) == 1


class Changing:
    """Manifests of two engines as other processes leave them; no two have the same size."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = json.loads((root / NAME / MANIFEST_NAME).read_text())
        self.count = 0

    def put(self, name: str) -> None:
        """Install or replace."""
        self.count += 1
        data = self.manifest | {"name": name, "description": "x" * self.count}
        directory = self.root / name
        directory.mkdir(exist_ok=True)
        (directory / "new").write_text(json.dumps(data))
        (directory / "new").rename(directory / MANIFEST_NAME)

    def rewrite(self, name: str) -> None:
        """Change it where it is."""
        path = self.root / name / MANIFEST_NAME
        if path.exists():
            self.count += 1
            data = self.manifest | {"name": name, "description": "x" * self.count}
            path.write_text(json.dumps(data))

    def spoil(self, name: str) -> None:
        path = self.root / name / MANIFEST_NAME
        if path.exists():
            self.count += 1
            path.write_text("{" + " " * self.count)

    def forbid(self, name: str) -> None:
        path = self.root / name / MANIFEST_NAME
        if path.exists():
            path.rename(self.root / name / "kept")
            path.symlink_to("kept")

    def exchange(self, _name: str) -> None:
        if all((self.root / name).exists() for name in CHANGING):
            store.exchange(*(self.root / name for name in CHANGING))

    def link(self, name: str) -> None:
        """To the same files: a link is no engine."""
        if (self.root / name).is_dir():
            self.count += 1
            aside = self.root / f".aside-{self.count}"
            (self.root / name).rename(aside)
            (self.root / name).symlink_to(aside)

    def remove(self, name: str) -> None:
        if (self.root / name).is_symlink():
            (self.root / name).unlink()
        else:
            shutil.rmtree(self.root / name, ignore_errors=True)


CHANGING = ("tiny", "other")
CHANGES = st.sampled_from(
    [
        Changing.put,
        Changing.rewrite,
        Changing.spoil,
        Changing.forbid,
        Changing.exchange,
        Changing.link,
        Changing.remove,
    ]
)


def later_ns() -> int:
    """The clock of a catalogue to which nothing in the store is fresh."""
    return time.time_ns() + 3600 * 10**9


class TestRemembering:
    def test_an_unchanged_store_is_not_read_again(self, catalogue: Catalogue, monkeypatch):
        remembering = Catalogue(catalogue.root, clock_ns=later_ns)
        before = remembering.contents()

        def refuse(*_arguments: object, **_named: object) -> None:
            raise AssertionError("the store was read")

        monkeypatch.setattr("builtins.open", refuse)
        monkeypatch.setattr("os.listdir", refuse)
        assert remembering.contents() == before
        assert remembering.get(NAME) is before[0][0]

    def test_what_may_change_again_in_the_same_tick_is_read_again(self, catalogue: Catalogue):
        written_ns = (catalogue.root / NAME / MANIFEST_NAME).stat().st_ctime_ns
        fresh = Catalogue(catalogue.root, clock_ns=lambda: written_ns)
        assert fresh.get(NAME) is not fresh.get(NAME)

    @given(changes=st.lists(st.tuples(CHANGES, st.sampled_from(CHANGING)), max_size=12))
    def test_it_says_what_a_new_look_at_the_store_says(self, tmp_path_factory, changes):
        root = tmp_path_factory.mktemp("changing") / "store"
        recipe = find_recipe(str(write_engine(root.parent)), root.parent)
        install(recipe, Catalogue(root), lambda _fraction, _note: None)
        changing, remembering = Changing(root), Catalogue(root, clock_ns=later_ns)
        for change, name in changes:
            remembering.contents()
            change(changing, name)
            assert remembering.contents() == Catalogue(root).contents()
            for each in CHANGING:
                assert looked_up(remembering, each) == looked_up(Catalogue(root), each)


def looked_up(catalogue: Catalogue, name: str) -> object:
    try:
        return catalogue.get(name)
    except (NotFound, ManifestError) as error:
        return error.message


class TestVerifying:
    def test_an_engine_as_installed_is_right_and_progress_ends_at_one(self, catalogue: Catalogue):
        seen: list[float] = []
        assert catalogue.verify(NAME, seen.append) == ()
        assert catalogue.quick_check(NAME) == ()
        assert seen == sorted(seen)
        assert seen[-1] == 1.0

    def test_names_each_wrong_file_with_what_was_expected_and_found(self, catalogue: Catalogue):
        directory, size = catalogue.root / NAME, len(FILES["model.bin"])
        with (directory / "model.bin").open("r+b") as file:
            file.write(b"X")
        (directory / "extra/vocabulary.txt").unlink()
        found = verify(catalogue)
        assert set(found) == set(FILES)
        assert found["model.bin"].startswith("expected SHA-256 ")
        assert found["extra/vocabulary.txt"] == "expected 8 bytes, found: No such file or directory"
        quick = {item.field for item in catalogue.quick_check(NAME)}
        assert quick == {"extra/vocabulary.txt"}, "the quick check reads no content"
        os.truncate(directory / "model.bin", size - 1)
        assert verify(catalogue)["model.bin"] == f"expected {size} bytes, found {size - 1}"

    def test_progress_ends_at_one_even_where_files_are_missing(self, catalogue: Catalogue):
        for path in FILES:
            (catalogue.root / NAME / path).unlink()
        seen: list[float] = []
        assert len(catalogue.verify(NAME, seen.append)) == len(FILES)
        assert seen[-1] == 1.0

    @pytest.mark.parametrize("which", ["file", "directory"])
    def test_a_link_is_no_file_of_the_engine(
        self, catalogue: Catalogue, tmp_path: Path, which: str
    ):
        inside = catalogue.root / NAME / ("extra/vocabulary.txt" if which == "file" else "extra")
        inside.rename(tmp_path / "outside")
        inside.symlink_to(tmp_path / "outside")
        assert verify(catalogue) == {
            "extra/vocabulary.txt": "expected 8 bytes, found a symbolic link"
        }

    def test_a_pipe_is_not_opened(self, catalogue: Catalogue):
        path = catalogue.root / NAME / "model.bin"
        path.unlink()
        os.mkfifo(path)
        assert verify(catalogue)["model.bin"].endswith("found no regular file")


class TestRemoving:
    def test_leaves_nothing(self, catalogue: Catalogue):
        catalogue.remove(NAME)
        assert catalogue.list() == ()
        assert {path.name for path in catalogue.root.iterdir()} == {store.LOCK_NAME}

    def test_a_broken_engine_can_be_removed(self, catalogue: Catalogue):
        (catalogue.root / NAME / MANIFEST_NAME).write_text("{")
        catalogue.remove(NAME)
        assert catalogue.problems() == ()
