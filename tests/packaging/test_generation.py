"""`hatch_build.generate` brings edge_agent/v1 up to date, and only then touches it."""

import shutil
from importlib import metadata
from pathlib import Path

import pytest

import hatch_build

PROTO = """\
syntax = "proto3";
package edge_agent.v1;
message Thing { string name = 1; }
service ThingService { rpc GetThing(Thing) returns (Thing); }
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with one proto."""
    write_proto(tmp_path, "thing", PROTO)
    return tmp_path


def write_proto(tree: Path, name: str, text: str) -> None:
    path = tree / "proto/edge_agent/v1" / f"{name}.proto"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def generated(tree: Path) -> dict[str, bytes]:
    """Every generated file and its content."""
    return {path.name: path.read_bytes() for path in (tree / "edge_agent/v1").glob("*.py*")}


def test_makes_messages_stubs_types_and_a_package(tree: Path):
    assert hatch_build.generate(tree)
    assert generated(tree).keys() == {
        "__init__.py",
        "thing_pb2.py",
        "thing_pb2.pyi",
        "thing_pb2_grpc.py",
        "thing_pb2_grpc.pyi",
    }


def test_does_nothing_the_second_time(tree: Path):
    hatch_build.generate(tree)
    before = {path: path.stat().st_mtime_ns for path in (tree / "edge_agent/v1").glob("*.py*")}
    assert not hatch_build.generate(tree)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_generates_again_when_a_proto_changes(tree: Path):
    hatch_build.generate(tree)
    write_proto(tree, "thing", PROTO.replace("string name", "string label"))
    assert hatch_build.generate(tree)
    assert b"label" in generated(tree)["thing_pb2.pyi"]


def test_generates_again_when_the_generator_changes(tree: Path, monkeypatch: pytest.MonkeyPatch):
    hatch_build.generate(tree)
    monkeypatch.setattr(metadata, "version", lambda _name: "999")
    assert hatch_build.generate(tree)


def test_removes_the_code_of_a_proto_that_is_gone(tree: Path):
    write_proto(tree, "other", 'syntax = "proto3";\npackage edge_agent.v1;\nmessage Other {}\n')
    hatch_build.generate(tree)
    assert "other_pb2.py" in generated(tree)
    (tree / "proto/edge_agent/v1/other.proto").unlink()
    assert hatch_build.generate(tree)
    assert not [name for name in generated(tree) if name.startswith("other")]


def test_a_proto_with_an_error_leaves_what_was_there(tree: Path):
    hatch_build.generate(tree)
    before = generated(tree)
    write_proto(tree, "thing", PROTO.replace("string name", "strnig name"))
    with pytest.raises(RuntimeError, match=r"protoc failed for thing\.proto"):
        hatch_build.generate(tree)
    assert generated(tree) == before
    assert not list((tree / "edge_agent/v1").glob(".new-*"))


def test_types_the_messages_without_the_plugins(tree: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda *_args, **_kwargs: None)
    assert hatch_build.generate(tree)
    assert "thing_pb2.pyi" in generated(tree)
    assert "thing_pb2_grpc.pyi" not in generated(tree)


def test_says_where_it_looked_when_there_are_no_protos(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no protos in"):
        hatch_build.generate(tmp_path)
