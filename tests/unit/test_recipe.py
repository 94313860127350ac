"""Recipes: strict, and every error names the file and the field."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from edge_agent import paths
from edge_agent.engines.install import find_recipe
from edge_agent.engines.recipe import PathObtain, PypiObtain, decode_recipe
from edge_agent.errors import ManifestError, NotFound
from tests.support.engine_files import FILES, recipe_data

PYPI = {
    "kind": "pypi",
    "package": "made-up",
    "version": "1.0",
    "wheel_sha256": "a" * 64,
    "size_bytes": 1000,
    "members": {"made_up/model.bin": "model.bin", "made_up/v.txt": "extra/vocabulary.txt"},
}
WHERE = Path("/recipes/tiny.yaml")


def text_of(**changes: Any) -> str:
    return yaml.safe_dump(recipe_data(FILES) | changes)


def error_of(text: str) -> str:
    with pytest.raises(ManifestError) as caught:
        decode_recipe(text, WHERE)
    assert caught.value.message.startswith("/recipes/tiny.yaml: ")
    assert caught.value.metadata["path"] == "/recipes/tiny.yaml"
    return caught.value.message.removeprefix("/recipes/tiny.yaml: ")


class TestDecoding:
    def test_a_path_recipe(self):
        recipe = decode_recipe(text_of(), WHERE)
        assert recipe.obtain == PathObtain(directory="files")
        assert recipe.directory == Path("/recipes")
        assert recipe.manifest.source.kind == "path"
        assert recipe.manifest.source.location == "files"
        assert recipe.download_bytes == 0
        assert recipe.engine_bytes == sum(map(len, FILES.values()))

    def test_a_pypi_recipe_says_where_its_files_come_from(self):
        recipe = decode_recipe(text_of(obtain=PYPI), WHERE)
        assert isinstance(recipe.obtain, PypiObtain)
        assert recipe.download_bytes == 1000
        source = recipe.manifest.source
        assert (source.kind, source.location, source.version) == ("pypi", "made-up", "1.0")
        assert source.sha256 == "a" * 64

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"slots": "two"}, "Expected `int`, got `str` - at `slots`"),
            ({"memory": {"steady_bytes": 1}}, "missing required field `load_peak_bytes` - at `mem"),
            ({"surprise": 1}, "unknown field `surprise`"),
            ({"source": {"kind": "path", "location": "x"}}, "source: follows from obtain"),
            ({"model": "x"}, "model: 'x' is not among files"),
            ({"name": "../x"}, "name: '../x', must match"),
            ({"obtain": None}, "Expected `object`, got `null` - at `obtain`"),
            ({"obtain": {"kind": "ftp"}}, "Invalid value 'ftp' - at `obtain.kind`"),
            ({"obtain": {"kind": "path"}}, "missing required field `directory` - at `obtain`"),
            ({"obtain": PYPI | {"extra": 1}}, "unknown field `extra` - at `obtain`"),
            ({"obtain": PYPI | {"size_bytes": 0}}, "at `obtain.size_bytes`"),
            ({"obtain": PYPI | {"members": {}}}, "obtain.members: give [], but files are ["),
            (
                {"obtain": PYPI | {"members": {"../x": "model.bin", "y": "extra/vocabulary.txt"}}},
                "files: path '../x', must be relative",
            ),
        ],
    )
    def test_names_the_field(self, changes: dict[str, Any], message: str):
        assert message in error_of(text_of(**changes))

    @pytest.mark.parametrize("field", ["package", "version"])
    @pytest.mark.parametrize(
        "value", ["", "x y", "1\n--index-url=http://evil", "-r", "1 --pre", "1\n", "a;b", "$(id)"]
    )
    def test_nothing_can_become_an_option_of_pip(self, field: str, value: str):
        assert f"at `obtain.{field}`" in error_of(text_of(obtain=PYPI | {field: value}))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "must be a mapping"),
            ("[]", "must be a mapping"),
            ("name: a\nname: b\n", "name: written twice (lines 1 and 2)"),
            ("name: [", "line 2, column 1: "),
        ],
    )
    def test_a_text_that_is_no_recipe(self, text: str, message: str):
        assert message in error_of(text)


class TestFinding:
    def test_by_name_and_by_path(self, tmp_path: Path):
        (tmp_path / "tiny.yaml").write_text(text_of())
        by_name = find_recipe("tiny", tmp_path)
        by_path = find_recipe(str(tmp_path / "tiny.yaml"), Path("/nowhere"))
        assert by_name == by_path

    def test_an_unknown_name_names_the_known_ones(self, tmp_path: Path):
        (tmp_path / "tiny.yaml").write_text(text_of())
        with pytest.raises(NotFound, match="no recipe 'tinny'; known: tiny; for a file"):
            find_recipe("tinny", tmp_path)

    def test_a_path_that_is_not_there(self, tmp_path: Path):
        with pytest.raises(ManifestError, match=r"x\.yaml: No such file"):
            find_recipe(f"{tmp_path}/x.yaml", tmp_path)

    def test_a_file_that_is_no_text(self, tmp_path: Path):
        (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ManifestError, match="not UTF-8"):
            find_recipe(f"{tmp_path}/x.yaml", tmp_path)


class TestOurRecipes:
    @pytest.mark.parametrize(
        "path", sorted(paths.recipes_dir().glob("*.yaml")), ids=lambda p: p.stem
    )
    def test_is_valid_and_named_as_its_file(self, path: Path):
        recipe = decode_recipe(path.read_text(), path)
        assert recipe.manifest.name == path.stem

    def test_the_memory_estimate_covers_weights_and_kv_cache(self):
        manifest = find_recipe("smollm2-135m-instruct", paths.recipes_dir()).manifest
        tokens = manifest.slots * manifest.context_tokens
        kv_bytes = sum(layer.layers * layer.bytes_per_token * tokens for layer in manifest.layers)
        assert kv_bytes == 30 * 768 * tokens
        weights_bytes = sum(spec.size_bytes for spec in manifest.files)
        assert manifest.memory.steady_bytes > weights_bytes + kv_bytes
