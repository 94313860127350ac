"""Small files that are whole whatever happens: a process killed in the middle, a full disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent import durable

OLD, NEW = b"old " * 5000, b"new content " * 5000

KILLED = """
import os, signal, sys
from pathlib import Path
from edge_agent import durable

path, left = Path(sys.argv[1]), int(sys.argv[2])

def effect(name):
    real = getattr(os, name)
    def counted(*args, **kwargs):
        step()
        result = real(*args, **kwargs)
        step()
        return result
    setattr(os, name, counted)

def step():
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1

def audit(event, args):
    if event in ("open", "os.rename", "os.remove") and str(args[0]).startswith(str(path.parent)):
        step()

content = sys.stdin.buffer.read()
effect("fsync")
sys.addaudithook(audit)
if sys.argv[3] == "replace":
    durable.replace(path, content)
else:
    durable.remove(path)
"""


def killed(path: Path, after: int, what: str) -> bool:
    """Do it in a process that kills itself after so many effects; False when it was done before."""
    command = [sys.executable, "-c", KILLED, str(path), str(after), what]
    environ = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(command, input=NEW, env=environ, check=False).returncode != 0


def test_a_kill_at_any_moment_leaves_the_old_content_or_the_new(tmp_path: Path):
    path, seen, after = tmp_path / "file", [], 0
    path.write_bytes(OLD)
    while killed(path, after, "replace"):
        seen.append(path.read_bytes())
        path.write_bytes(OLD)
        after += 1
    assert path.read_bytes() == NEW
    assert set(seen) == {OLD, NEW}, "killed both before and after the change"
    assert seen == sorted(seen, key=lambda content: content == NEW)
    durable.replace(path, OLD)  # what a kill has left is in nobody's way
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_kill_while_removing_leaves_the_file_or_nothing(tmp_path: Path):
    path, after = tmp_path / "file", 0
    path.write_bytes(OLD)
    while killed(path, after, "remove"):
        assert not path.exists() or path.read_bytes() == OLD
        path.write_bytes(OLD)
        after += 1
    assert after > 0
    assert not path.exists()


def test_removing_what_is_not_there_is_no_error(tmp_path: Path):
    durable.remove(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_it_is_on_disk_before_it_takes_the_place_of_the_old_and_the_change_is_too(
    tmp_path: Path, monkeypatch
):
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(number: int) -> None:
        calls.append(str(Path(f"/proc/self/fd/{number}").readlink()))
        fsync(number)

    def replaced(self: Path, target: Path) -> Path:
        calls.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    durable.replace(tmp_path / "file", NEW)
    assert calls == [str(tmp_path / "file.partial"), "rename", str(tmp_path)]


def test_a_full_disk_leaves_the_old_content(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    (tmp_path / "file.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="space"):
        durable.replace(path, NEW)
    assert path.read_bytes() == OLD


def test_what_is_set_aside_is_whole_and_out_of_the_way(tmp_path: Path):
    path = tmp_path / "file.json"
    path.write_bytes(OLD)
    durable.set_aside(path)
    assert not path.exists()
    assert (tmp_path / "file.json.unreadable").read_bytes() == OLD
