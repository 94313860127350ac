"""The lock and the page about dependencies say the same as pyproject.toml."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()
DIRECT = [
    *PROJECT["project"]["dependencies"],
    *PROJECT["project"]["optional-dependencies"]["embedded"],
    *PROJECT["dependency-groups"]["dev"],
]
NAMES = {re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower() for requirement in DIRECT}


def locked() -> dict[str, tuple[str, str]]:
    """Version and the rest of the entry (marker and hashes) by package name."""
    entries = re.findall(r"^([\w.-]+)==(\S+)(.*?)(?=^[\w.-]+==|\Z)", LOCK, re.MULTILINE | re.DOTALL)
    return {name: (version, rest) for name, version, rest in entries}


def test_the_lock_pins_every_direct_dependency_and_every_build_requirement():
    build = {re.split(r"[^\w.-]", line)[0] for line in PROJECT["build-system"]["requires"]}
    assert NAMES | build <= set(locked())


def test_every_locked_package_has_hashes():
    assert [name for name, (_, rest) in locked().items() if "--hash=sha256:" not in rest] == []


def test_the_lock_names_no_place():
    wrong = [line for line in LOCK.splitlines() if re.search(r"://|^-|^\s*-[^-]|^[./]|\s@\s", line)]
    assert wrong == []


def test_the_extras_of_worker_environments_stay_outside_the_lock():
    assert {"tensorrt-llm", "tensorrt-edgellm", "pycuda"} & set(locked()) == set()


def test_the_page_about_dependencies_lists_them_all_with_the_locked_versions():
    page = (ROOT / "docs/dependencies.md").read_text()
    rows = re.findall(r"^\| ([\w.-]+) \| (\d\S*) \|", page, re.MULTILINE)
    expected = {name: locked()[name][0] for name in NAMES}
    assert {name.lower(): version for name, version in rows} == expected
