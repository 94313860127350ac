"""What makes a manifest valid: names and paths that stay below the store, fields that agree."""

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.engines.manifest import (
    MANIFEST_NAME,
    LayerKind,
    Manifest,
    check_name,
    check_path,
    decode_manifest,
    digest,
    encode_manifest,
)
from edge_agent.errors import ManifestError
from tests.support.engine_files import FILES, recipe_data

PATH_TRICKS = st.lists(
    st.sampled_from(["a", "b.bin", "..", ".", "", "/", "\\", "\0", "\n", "C:", "~", "ü", " "])
    | st.text(max_size=3),
    max_size=5,
).map("/".join)


def manifest_data(**changes: Any) -> dict[str, Any]:
    data = recipe_data(FILES)
    del data["obtain"]
    return data | {"source": {"kind": "path", "location": "files"}} | changes


def decode(**changes: Any) -> Manifest:
    return decode_manifest(msgspec.json.encode(manifest_data(**changes)))


class TestNames:
    @pytest.mark.parametrize("name", ["a", "smollm2-135m-instruct", "7b", "a.b_c-d", "x" * 64])
    def test_accepts(self, name: str):
        check_name(name)

    @pytest.mark.parametrize(
        "name", ["", ".", "..", ".lock", "-a", "_a", "A", "a/b", "a b", "a\n", "ä", "x" * 65]
    )
    def test_refuses(self, name: str):
        with pytest.raises(ManifestError, match=r"name: .*must match"):
            check_name(name)

    @given(st.text(max_size=70))
    def test_an_accepted_name_is_one_visible_directory_below_the_store(self, name: str):
        try:
            check_name(name)
        except ManifestError:
            return
        path = Path("/store") / name
        assert path.parent == Path("/store")
        assert path.name == name
        assert not name.startswith(".")


class TestPaths:
    @pytest.mark.parametrize("path", ["a", "a/b/c.bin", "..a", "a..b", ".hidden", "a b", "ü"])
    def test_accepts(self, path: str):
        check_path(path)

    @pytest.mark.parametrize(
        "path",
        [
            *("", ".", "..", "/", "/a", "a/", "a//b", "./a", "a/./b", "a/..", "../a", "a/../b"),
            *("//a", "a\\b", "a\0b", "a\nb", "\x1b[31m", "\ud800", "x" * 201, "ü" * 101),
        ],
    )
    def test_refuses(self, path: str):
        with pytest.raises(ManifestError, match="must be relative and plain"):
            check_path(path)

    @given(PATH_TRICKS)
    def test_an_accepted_path_lies_below_the_engine_under_one_spelling(self, path: str):
        try:
            check_path(path)
        except ManifestError:
            return
        whole = Path("/store/engine") / path
        assert whole.is_relative_to("/store/engine")
        assert whole != Path("/store/engine")
        assert str(whole) == f"/store/engine/{path}"
        assert ".." not in whole.parts
        assert "\0" not in path

    @pytest.mark.parametrize(
        "paths", [["a", "a"], ["a", "a/b"], ["a/b", "a"], ["a", MANIFEST_NAME], ["manifest.json/x"]]
    )
    def test_no_two_files_in_one_place_and_none_where_the_manifest_goes(self, paths: list[str]):
        digest_of_nothing = hashlib.sha256().hexdigest()
        files = [{"path": path, "sha256": digest_of_nothing, "size_bytes": 1} for path in paths]
        with pytest.raises(ManifestError, match="is taken by another file or the manifest"):
            decode(files=files, model=paths[0])


class TestDecoding:
    def test_survives_the_round_trip(self):
        manifest = decode()
        assert decode_manifest(encode_manifest(manifest)) == manifest

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"name": "../x"}, "name: '../x', must match"),
            ({"model": "other.bin"}, "model: 'other.bin' is not among files"),
            ({"max_output_tokens": 2048}, r"max_output_tokens: 2048, must be below .*2048"),
            ({"memory": {"load_peak_bytes": 1, "steady_bytes": 2}}, "memory.load_peak_bytes"),
            ({"tools": {"strategy": "ranked", "instructions": ""}}, "tools.neutral_goals"),
            ({"schema": 2}, "schema"),
            ({"backend": {"name": "made_up", "min_version": "1"}}, r"\$.backend.name"),
            ({"capabilities": ["flying"]}, r"\$.capabilities"),
            ({"slots": 0}, r"\$.slots"),
            ({"slots": "2"}, r"\$.slots"),
            ({"surprise": 1}, "surprise"),
            ({"layers": [{"kind": "full", "layers": 0}]}, r"\$.layers\[0\].layers"),
        ],
    )
    def test_names_the_field(self, changes: dict[str, Any], message: str):
        with pytest.raises(ManifestError, match=message):
            decode(**changes)

    @pytest.mark.parametrize("sha256", ["", "a" * 63, "A" * 64, "a" * 64 + "\n", "g" * 64])
    def test_a_digest_is_64_lower_hexadecimal_digits(self, sha256: str):
        files = [{"path": "model.bin", "sha256": sha256, "size_bytes": 1}]
        with pytest.raises(ManifestError, match=r"\$.files\[0\].sha256"):
            decode(files=files)

    @given(st.binary(max_size=200))
    def test_bytes_that_are_no_manifest_are_a_manifest_error(self, raw: bytes):
        with pytest.raises(ManifestError):
            decode_manifest(raw)


class TestDigest:
    def test_is_the_same_for_the_same_engine_and_differs_with_any_field(self):
        assert digest(decode()) == digest(decode())
        assert digest(decode()) != digest(decode(description="another"))
        assert digest(decode()) != digest(decode(stop=["x"]))


def test_bytes_per_token_is_of_one_layer():
    """The docstring's worked example: 30 full layers, 3 KV heads of 64 values in 16 bits."""
    assert f"= {2 * 3 * 64 * 2} bytes per token and layer" in (LayerKind.__doc__ or "")
