"""docs/architecture.md follows the code by names: each of them is there."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "architecture.md").read_text()
OPTIONS = yaml.safe_load((REPOSITORY / "config.example.yaml").read_text())
_NAME = re.compile(r"`([A-Za-z_]+(?:\.[A-Za-z_]+)+)`")
_FILES = ("md", "yaml", "py", "sock", "json")


def members(node: ast.Module | ast.ClassDef) -> dict[str, ast.stmt]:
    """What a module or class defines, by name."""
    found: dict[str, ast.stmt] = {}
    for statement in node.body:
        match statement:
            case (
                ast.ClassDef(name=name)
                | ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
            ):
                found[name] = statement
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                found[name] = statement
            case _:
                pass
    return found


MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts): members(
        ast.parse(path.read_text())
    )
    for root in ("edge_agent", "examples")
    for path in (REPOSITORY / root).rglob("*.py")
    if "v1" not in path.parts
}
CLASSES: dict[str, list[ast.ClassDef]] = defaultdict(list)
for _module in MODULES.values():
    for _statement in _module.values():
        if isinstance(_statement, ast.ClassDef):
            CLASSES[_statement.name].append(_statement)


def is_in_code(name: str) -> bool:
    """Whether there is such a module, class, function or member; the front of a path may lack."""
    parts = name.split(".")
    if any(
        parts[0] == each and parts[1] in members(kind) for each in CLASSES for kind in CLASSES[each]
    ):
        return len(parts) == 2
    for cut in range(1, len(parts) + 1):
        front, rest = ".".join(parts[:cut]), parts[cut:]
        for module, defined in MODULES.items():
            if f".{module}".removesuffix(".__init__").endswith(f".{front}") and leads(
                defined, rest
            ):
                return True
    return False


def leads(defined: dict[str, ast.stmt], rest: list[str]) -> bool:
    """Whether what is left of a name is defined here."""
    if not rest:
        return True
    found = defined.get(rest[0])
    if isinstance(found, ast.ClassDef):
        return leads(members(found), rest[1:])
    return found is not None and len(rest) == 1


def is_option(name: str) -> bool:
    """Whether the configuration has it; `engines` has engines' names below it."""
    section, _, key = name.partition(".")
    return section == "engines" or key in (OPTIONS.get(section) or {})


NAMES = sorted({name for name in _NAME.findall(PAGE) if not name.endswith(_FILES)})


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_the_page_is_in_the_code(name: str) -> None:
    assert is_in_code(name) or is_option(name)


def test_a_name_that_is_gone_is_noticed() -> None:
    assert is_in_code("scheduling.planner.Planner.submit")
    assert is_in_code("Planner.submit")
    for gone in ("scheduling.loaded.LoadedEngine", "Scheduler._acquire", "planner.Planner.gone_by"):
        assert not is_in_code(gone)
