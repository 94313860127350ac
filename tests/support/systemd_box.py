"""The machine's own systemd, booted in namespaces that vanish with it. Needs root."""

import contextlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import edge_agent
from tests.support.notify import NotifySocket
from tests.support.processes import children, wait_gone

SYSTEMD = Path("/lib/systemd/systemd")
PYTHON = Path("/usr/bin/python3")
"""Readable by every user, unlike one below a home directory."""
INSTALLED = Path("opt/edge-agent")
BOOT_TIMEOUT_S = 20.0

_SCRIPT = Path(__file__).with_name("systemd_box.sh")
_UNIT = Path(__file__).resolve().parents[2] / "systemd" / "edge-agent.service"
_TARGET = "[Unit]\nRequires=sysinit.target\nAfter=sysinit.target\nAllowIsolate=yes\n"
_MASKED = (
    "systemd-binfmt.service",
    "systemd-modules-load.service",
    "systemd-remount-fs.service",
    "systemd-sysctl.service",
    "systemd-timesyncd.service",
    "systemd-udev-trigger.service",
    "systemd-udevd.service",
)
_ENTRY = """#!/opt/edge-agent/bin/python
import sys
from edge_agent.cli.main import main
sys.exit(main())
"""


class Box:
    """A booted systemd."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command inside, as root; returns what it prints."""
        enter = ("nsenter", f"--target={self.pid}", "--pid", "--mount", "--net", "--ipc", "--uts")
        done = subprocess.run(
            [*enter, "--cgroup", "--root", "--wd", "--", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{command}: rc {done.returncode}\n{done.stdout}")
        return done.stdout

    def logged(self, unit: str, pattern: str) -> int:
        """How many lines of a unit's journal match."""
        lines = self.run("journalctl", f"--unit={unit}", "--output=cat", "--no-pager")
        return sum(re.search(pattern, line) is not None for line in lines.splitlines())

    def wait_logged(self, unit: str, pattern: str, count: int = 1, timeout_s: int = 20) -> str:
        """The `count`-th line of a unit's journal that matches, waiting for it."""
        follow = f"journalctl --unit={unit} --output=cat --lines=all --follow 2>/dev/null"
        search = f"grep --max-count={count} --extended-regexp '{pattern}' < <({follow})"
        found = self.run("timeout", str(timeout_s), "bash", "-c", search)
        return found.splitlines()[-1]

    def show(self, unit: str, name: str) -> str:
        """A unit's property."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def write(self, path: str, text: str) -> None:
        """Write a file inside."""
        target = Path(f"/proc/{self.pid}/root") / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def why_not() -> str:
    """Why there can be no box on this machine, as far as that can be told beforehand; or empty."""
    if os.geteuid() != 0:
        return "needs root"
    for tool in ("unshare", "nsenter", "findmnt", "systemctl"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    for program in (SYSTEMD, PYTHON):
        if not program.exists():
            return f"needs {program}"
    ours = sysconfig.get_python_version()
    theirs = subprocess.run(
        [PYTHON, "-c", "import sysconfig; print(sysconfig.get_python_version())"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    if theirs != ours:
        return f"needs Python {ours} at {PYTHON}, a place that every user can read; found {theirs}"
    return ""


@contextlib.contextmanager
def booted() -> Iterator[Box]:
    """A box with edge-agent and its unit installed, booted, nothing started.

    Raises:
        BoxUnavailableError: this machine's kernel refuses what a box is made of.
    """
    with tempfile.TemporaryDirectory(prefix="edge-agent-box-") as name:
        directory = Path(name)
        _make_content(directory / "content")
        packages = sysconfig.get_path("purelib")
        source = os.fspath(Path(edge_agent.__file__).parent)
        command = [
            os.fspath(_SCRIPT), name,
            packages, f"/{INSTALLED}/packages",
            source, f"/{INSTALLED}/source/edge_agent",
        ]  # fmt: skip
        log = directory / "log"
        with (
            NotifySocket(directory / "notify") as notify,
            log.open("wb") as output,
            subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL
            ) as box,
        ):
            try:
                ready = notify.next("READY", BOOT_TIMEOUT_S)
                if ready is None:
                    raise BoxUnavailableError(log.read_text(errors="replace")[-2000:])
                (pid,) = children(box.pid)
                yield Box(pid)
            finally:
                inside = children(box.pid)
                box.kill()  # takes PID 1 of the box along, and that takes everything else
                assert all(wait_gone(pid) for pid in inside)
                _remove_cgroup(directory.name)


class BoxUnavailableError(Exception):
    """The box did not boot."""


def _make_content(content: Path) -> None:
    """What is laid over the machine's root."""
    units = content / "etc/systemd/system"
    units.mkdir(parents=True)
    for masked in _MASKED:
        (units / masked).symlink_to("/dev/null")
    (units / "box.target").write_text(_TARGET)
    (units / "default.target").symlink_to("box.target")
    shutil.copyfile(_UNIT, units / _UNIT.name)
    (content / "etc/fstab").write_text("")
    (content / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    for parent in ("packages", "source/edge_agent"):
        (content / INSTALLED / parent).mkdir(parents=True)
    subprocess.run(
        [PYTHON, "-m", "venv", "--without-pip", content / INSTALLED], check=True, timeout=60
    )
    (site,) = (content / INSTALLED).glob("lib/python*/site-packages")
    (site / "edge-agent.pth").write_text(f"/{INSTALLED}/packages\n/{INSTALLED}/source\n")
    entry = content / INSTALLED / "bin/edge-agent"
    entry.write_text(_ENTRY)
    entry.chmod(0o755)


def _remove_cgroup(name: str) -> None:
    for top in Path("/sys/fs/cgroup").glob(f"**/{name}"):
        below = [path for path in top.rglob("*") if path.is_dir()]
        for cgroup in [*reversed(below), top]:
            with contextlib.suppress(OSError):
                cgroup.rmdir()
