"""The rules about who may import what, and how long a file may grow, read from the source alone.

Imports point one way (core <- pure <- owners <- api <- daemon), each heavy library has one home,
and what the daemon imports at its start is a declared dependency and no HTTP client. `v1` is
generated: it is checked only as something that others import.
"""

import ast
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "edge_agent"
MODULE_LINES = 600
FUNCTION_LINES = 60


class Layer(IntEnum):
    """A module imports its own layer and those before it."""

    CORE = 0
    PURE = 1
    OWNER = 2
    API = 3
    DAEMON = 4
    COMMAND = 5


# The longest matching prefix decides. A module that no line covers is an error: a new package says
# where it stands.
LAYERS = {
    "": Layer.CORE,  # edge_agent itself: the version
    "core": Layer.CORE,
    "events": Layer.CORE,
    "errors": Layer.CORE,
    "records": Layer.CORE,
    "status": Layer.CORE,
    "v1": Layer.CORE,
    "child_process": Layer.PURE,
    "config": Layer.PURE,
    "config_sections": Layer.PURE,
    "durable": Layer.PURE,
    "epoch": Layer.PURE,
    "frames": Layer.PURE,
    "heartbeat": Layer.PURE,
    "memory_lock": Layer.PURE,
    "notify": Layer.PURE,
    "paths": Layer.PURE,
    "strict_yaml": Layer.PURE,
    "units": Layer.PURE,
    "wakeup": Layer.PURE,
    "decoding": Layer.PURE,
    "engines.manifest": Layer.PURE,
    "engines.protocol": Layer.PURE,
    "ledger.rows": Layer.PURE,
    "ledger.schema": Layer.PURE,
    "ledger.settings": Layer.PURE,
    "measuring.chart": Layer.PURE,
    "measuring.prompts": Layer.PURE,
    "measuring.results": Layer.PURE,
    "measuring.statistics": Layer.PURE,
    "measuring.table": Layer.PURE,
    "scheduling.making_room": Layer.PURE,
    "scheduling.state": Layer.PURE,
    "scheduling.refusals": Layer.PURE,
    "scheduling.explain": Layer.PURE,
    "scheduling.reserve": Layer.PURE,
    "scheduling.failures": Layer.PURE,
    "scheduling.footprint": Layer.PURE,
    "scheduling.planner": Layer.PURE,
    "scheduling.eviction": Layer.PURE,
    "scheduling.residents": Layer.PURE,
    "scheduling.pace": Layer.PURE,
    "scheduling.pressure": Layer.PURE,
    "scheduling.backoff": Layer.PURE,
    "scheduling.budget": Layer.PURE,
    "scheduling.queue": Layer.PURE,
    "scheduling.values": Layer.PURE,
    "backends.base": Layer.PURE,
    "telemetry.energy": Layer.PURE,
    "telemetry.reading": Layer.PURE,
    "telemetry.snapshot": Layer.PURE,
    "telemetry.thermal": Layer.PURE,
    "tools.bucket": Layer.PURE,
    "tools.pause": Layer.PURE,
    "tools.protocol": Layer.PURE,
    "tools.results": Layer.PURE,
    "tools.settings": Layer.PURE,
    "backends": Layer.OWNER,
    "engines": Layer.OWNER,
    "ledger": Layer.OWNER,
    "observability": Layer.OWNER,
    "runs": Layer.OWNER,
    "runs.holds": Layer.PURE,
    "runs.turns": Layer.PURE,
    "runs.verification": Layer.PURE,
    "scheduling": Layer.OWNER,
    "telemetry": Layer.OWNER,
    "tools": Layer.OWNER,
    "api": Layer.API,
    "client": Layer.API,
    "daemon": Layer.DAEMON,
    "doctor": Layer.DAEMON,
    "settings": Layer.DAEMON,
    "measuring": Layer.DAEMON,
    "cli": Layer.COMMAND,
    "__main__": Layer.COMMAND,
}

# Modules that decide, with time and chance handed to them: they read no clock and do no I/O.
DECIDING = (
    "runs.holds",
    "runs.turns",
    "runs.verification",
    "heartbeat",
    "ledger.rows",
    "ledger.schema",
    "measuring.chart",
    "measuring.prompts",
    "measuring.results",
    "measuring.statistics",
    "measuring.table",
    "scheduling.making_room",
    "scheduling.state",
    "scheduling.refusals",
    "scheduling.explain",
    "scheduling.reserve",
    "scheduling.failures",
    "scheduling.footprint",
    "scheduling.planner",
    "scheduling.eviction",
    "scheduling.residents",
    "scheduling.pace",
    "scheduling.pressure",
    "scheduling.backoff",
    "scheduling.budget",
    "scheduling.queue",
    "scheduling.values",
    "telemetry.energy",
    "telemetry.snapshot",
    "telemetry.thermal",
    "tools.bucket",
    "tools.pause",
    "tools.results",
)
EFFECTS = frozenset({"asyncio", "random", "socket", "sqlite3", "subprocess", "threading", "time"})

GRPC_HOMES = ("api", "client")
HOMES = {
    "apsw": ("ledger",),
    "grpc": GRPC_HOMES,
    "grpc_health": GRPC_HOMES,
    "grpc_reflection": GRPC_HOMES,
    "google": GRPC_HOMES,
    "edge_agent.v1": GRPC_HOMES,
    "pydantic": ("config", "config_sections"),
    "pynvml": ("telemetry.nvml",),
    "pycuda": ("backends.tensorrt_llm", "doctor"),
    "tensorrt_edgellm": ("backends.tensorrt_edgellm",),
    "tensorrt_llm": ("backends.tensorrt_llm",),
    "xllamacpp": ("backends.llama_cpp",),
    # What speaks to MCP servers, in a process of its own.
    "anyio": ("tools.mcp_host",),
    "httpx2": ("tools.mcp_host",),
    "jsonschema": ("tools.mcp_host",),
    "mcp": ("tools.mcp_host",),
    "mcp_types": ("tools.mcp_host",),
}

# Only a worker, and doctor, load the code of a backend.
CONCRETE_BACKENDS = ("backends.llama_cpp", "backends.tensorrt_edgellm", "backends.tensorrt_llm")
BACKEND_USERS = ("backends", "engines.worker", "doctor")

# Loaded in every daemon, client and command before anything is asked of them.
STARTS = ("daemon", "cli.main", "client")
ON_FIRST_USE = frozenset({"http.client", "httpx", "httpx2", "urllib.request"})
IMPORT_NAMES = {
    "googleapis-common-protos": "google",
    "grpcio": "grpc",
    "grpcio-health-checking": "grpc_health",
    "grpcio-reflection": "grpc_reflection",
    "nvidia-ml-py": "pynvml",
    "protobuf": "google",
    "pyyaml": "yaml",
}


@dataclass(frozen=True)
class Import:
    """One imported module; `names` are what `from` takes from it, which may be modules too."""

    target: str
    names: tuple[str, ...]
    line: int
    at_start: (
        bool  # runs when the module is imported: not in a function, not for type checkers only
    )


@dataclass(frozen=True)
class Module:
    """One source file. `name` is the dotted name below edge_agent, "" for edge_agent itself."""

    name: str
    path: Path
    tree: ast.Module
    lines: int
    is_package: bool

    @property
    def full_name(self) -> str:
        return f"{PACKAGE}.{self.name}" if self.name else PACKAGE


def read_modules(root: Path) -> dict[str, Module]:
    """Every module below root/edge_agent, the generated ones apart, by its name."""
    modules = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        if parts[0] == "v1":
            continue
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        text = path.read_text()
        tree = ast.parse(text, str(path))
        modules[name] = Module(name, path, tree, text.count("\n"), is_package)
    return modules


def imports_of(module: Module) -> Iterator[Import]:
    """Every import statement, relative ones made absolute."""
    yield from _imports(module, module.tree.body, at_start=True)


def _imports(module: Module, body: list[ast.stmt], *, at_start: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, (), node.lineno, at_start)
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            yield Import(_absolute(module, node), names, node.lineno, at_start)
        else:
            later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for field in ("body", "handlers", "orelse", "finalbody", "cases"):
                inner = [
                    statement
                    for child in getattr(node, field, [])
                    for statement in (child.body if not isinstance(child, ast.stmt) else [child])
                ]
                starts = at_start and not later and not (typing_only and field == "body")
                yield from _imports(module, inner, at_start=starts)


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module.full_name.split(".")
    up = node.level - 1 if module.is_package else node.level
    return ".".join([*package[: len(package) - up], *([node.module] if node.module else [])])


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether the module is one of these or below one of them."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def layer_of(name: str) -> Layer | None:
    """The layer of a module named below edge_agent."""
    while name and name not in LAYERS:
        name = name.rpartition(".")[0]
        if not name:
            return None
    return LAYERS[name]


def targets_of(modules: dict[str, Module], found: Import) -> list[str]:
    """The modules of ours that one import names, below edge_agent.

    `from a import b` names a.b where that is a module, and a for everything else that it takes.
    """
    if found.target.partition(".")[0] != PACKAGE:
        return []
    base = found.target.removeprefix(PACKAGE).removeprefix(".")
    below = [f"{base}.{name}".removeprefix(".") for name in found.names]
    named = [name for name in below if name in modules or within(name, ("v1",))]
    return [base, *named] if len(named) < len(below) or not below else named


def broken_rules(root: Path) -> list[str]:
    """Every violation below root, one line each, with file and line."""
    modules = read_modules(root)
    found = []
    for module in modules.values():
        if layer_of(module.name) is None:
            found.append(f"{module.path}: {module.full_name} has no layer in LAYERS")
            continue
        for item in imports_of(module):
            where = f"{module.path}:{item.line}"
            found += [f"{where}: {problem}" for problem in _problems(modules, module, item)]
    found += _start_problems(root, modules)
    found += _protocol_problems(modules)
    for module in modules.values():
        found += _length_problems(module)
    return found


def _problems(modules: dict[str, Module], module: Module, item: Import) -> Iterator[str]:
    own = layer_of(module.name)
    for target in targets_of(modules, item):
        other = layer_of(target)
        if own is not None and other is not None and other > own:
            yield f"{module.name} ({own.name}) imports {target} ({other.name})"
        if within(target, ("v1",)) and not within(module.name, HOMES["edge_agent.v1"]):
            yield f"{module.name} imports {target}, at home in {', '.join(GRPC_HOMES)}"
        if within(target, CONCRETE_BACKENDS) and not within(module.name, BACKEND_USERS):
            yield f"{module.name} imports {target}, which only a worker loads"
    library = item.target.partition(".")[0]
    if library in HOMES and not within(module.name, HOMES[library]):
        yield f"{module.name} imports {library}, at home in {', '.join(HOMES[library])}"
    if library in EFFECTS and within(module.name, DECIDING):
        yield f"{module.name} decides and imports {library}"


def start_closure(modules: dict[str, Module], start: str) -> dict[str, Module]:
    """What Python loads of ours when it imports `start`: packages on the way included."""
    seen: dict[str, Module] = {}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in modules:
            continue
        seen[name] = modules[name]
        parts = name.split(".")
        waiting += [".".join(parts[:depth]) for depth in range(len(parts))]
        for item in imports_of(modules[name]):
            if item.at_start:
                waiting += targets_of(modules, item)
    return seen


def _third_party(module: Module) -> Iterator[tuple[str, int]]:
    for item in imports_of(module):
        library = item.target.partition(".")[0]
        if item.at_start and library != PACKAGE and library not in sys.stdlib_module_names:
            yield library, item.line


def _start_problems(root: Path, modules: dict[str, Module]) -> Iterator[str]:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in project["dependencies"]]
    declared = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}
    for start in STARTS:
        for module in start_closure(modules, start).values():
            for library, line in _third_party(module):
                if library not in declared:
                    yield f"{module.path}:{line}: {start} loads {library}, no runtime dependency"
            for item in imports_of(module):
                candidates = {item.target, *(f"{item.target}.{name}" for name in item.names)}
                for early in sorted(candidates & ON_FIRST_USE) if item.at_start else []:
                    yield f"{module.path}:{item.line}: {start} loads {early} before its first use"


def _protocol_problems(modules: dict[str, Module]) -> Iterator[str]:
    """A worker in another environment imports the protocol with msgspec alone."""
    for module in start_closure(modules, "engines.protocol").values():
        for library, line in _third_party(module):
            if library != "msgspec":
                yield f"{module.path}:{line}: engines.protocol loads {library}"


def _length_problems(module: Module) -> Iterator[str]:
    if module.lines > MODULE_LINES:
        yield f"{module.path}: {module.lines} lines, at most {MODULE_LINES}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                where = f"{module.path}:{node.lineno}"
                yield f"{where}: {node.name} has {lines} lines, at most {FUNCTION_LINES}"


def test_the_package_keeps_the_rules():
    assert read_modules(ROOT), "no modules found: this test would pass on nothing"
    assert broken_rules(ROOT) == []


LONG_FUNCTION = "def long():\n" + "    pass\n" * FUNCTION_LINES
PLANTED = {
    "core imports an owner": ("core.py", "import edge_agent.runs\n", "core (CORE) imports runs"),
    "relative": (
        "scheduling/budget.py",
        "from ..runs import loop\n",
        "scheduling.budget (PURE) imports",
    ),
    "from the package": ("core.py", "from edge_agent import daemon\n", "imports daemon (DAEMON)"),
    "for types only": (
        "errors.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from edge_agent.api import x\n",
        "errors (CORE) imports api (API)",
    ),
    "owner imports the daemon": ("runs/x.py", "from edge_agent import daemon\n", "imports daemon"),
    "no layer": ("surprise.py", "", "edge_agent.surprise has no layer"),
    "grpc in an owner": ("runs/x.py", "def f():\n    import grpc.aio\n", "runs.x imports grpc,"),
    "v1 in an owner": (
        "runs/x.py",
        "from edge_agent.v1 import types_pb2\n",
        "imports v1.types_pb2",
    ),
    "pydantic": ("runs/x.py", "import pydantic\n", "runs.x imports pydantic, at home in config"),
    "mcp in the daemon": (
        "daemon.py",
        "def f():\n    import mcp\n",
        "daemon imports mcp, at home in tools.mcp_host",
    ),
    "pynvml": ("doctor.py", "import pynvml\n", "doctor imports pynvml, at home in telemetry.nvml"),
    "xllamacpp": ("engines/x.py", "import xllamacpp\n", "engines.x imports xllamacpp"),
    "a backend outside a worker": (
        "runs/x.py",
        "def f():\n    from edge_agent.backends import llama_cpp\n",
        "runs.x imports backends.llama_cpp, which only a worker loads",
    ),
    "a clock in a decision": (
        "scheduling/budget.py",
        "from time import monotonic\n",
        "decides and imports",
    ),
    "a worker library at the start": (
        "daemon.py",
        "from edge_agent.backends import llama_cpp\n",
        "daemon loads xllamacpp, no runtime dependency",
    ),
    "through a package": (
        "backends/__init__.py",
        "try:\n    from . import llama_cpp\nexcept ImportError:\n    pass\n",
        "client loads xllamacpp",
    ),
    "an HTTP client at the start": (
        "daemon.py",
        "import urllib.request\n",
        "daemon loads urllib.request before its first use",
    ),
    "a heavy protocol": ("engines/protocol.py", "import yaml\n", "engines.protocol loads yaml"),
    "a long module": ("runs/x.py", "\n" * (MODULE_LINES + 1), "601 lines, at most 600"),
    "a long function": ("runs/x.py", LONG_FUNCTION, "long has 61 lines, at most 60"),
}


@pytest.fixture
def small_package(tmp_path: Path) -> Path:
    """A package that keeps the rules, with everything in it that a planted line leans on."""
    sources = {
        "__init__.py": "",
        "core.py": "",
        "errors.py": "from edge_agent import core\n",
        "config.py": "import pydantic\nfrom edge_agent.core import x\n",
        "scheduling/__init__.py": "",
        "runs/__init__.py": "",
        "runs/loop.py": "import asyncio\nfrom edge_agent.backends import base\n",
        "engines/__init__.py": "",
        "engines/protocol.py": "import msgspec\n",
        "backends/__init__.py": "",
        "backends/base.py": "",
        "backends/llama_cpp.py": "import xllamacpp\n",
        "api/__init__.py": "import grpc\nfrom edge_agent.v1 import types_pb2\n",
        "client.py": "import grpc\nfrom edge_agent.backends import base\n",
        "daemon.py": (
            "from edge_agent import api, config\nfrom edge_agent.runs import loop\n"
            "def f():\n    import urllib.request\n"
        ),
    }
    for name, text in sources.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_a_package_within_the_rules_passes(small_package: Path):
    assert broken_rules(small_package) == []


@pytest.mark.parametrize(("file", "text", "expected"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_violation_is_found(small_package: Path, file: str, text: str, expected: str):
    path = small_package / PACKAGE / file
    path.write_text((path.read_text() if path.exists() else "") + text)
    problems = broken_rules(small_package)
    assert any(expected in problem for problem in problems), problems


def test_a_violation_planted_in_a_copy_of_the_package_is_found(tmp_path: Path):
    ignored = shutil.ignore_patterns("__pycache__", "v1")
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    core = tmp_path / PACKAGE / "core.py"
    core.write_text(core.read_text() + "\n\ndef late() -> None:\n    from edge_agent import api\n")
    planted = set(broken_rules(tmp_path)) - set(broken_rules(ROOT))
    assert any("core (CORE) imports api (API)" in problem for problem in planted)
