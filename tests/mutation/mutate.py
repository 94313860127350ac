"""Mutation testing of the scheduler's pure modules: small bugs are put in, the tests must notice.

    python tests/mutation/mutate.py [--limit-s 900] [module ...]

Each mutant is one changed operator, constant, condition or returned value. It lives in memory only:
a forked child imports the module from the changed source and runs that module's tests until one
fails. Prints each survivor with its line; exits with 1 when one survives that is not listed in
`equivalent.txt` (`module: mutated line  # why nothing can notice`).

Coverage says that a line ran, this says that somebody looked at what it did.
"""

import argparse
import ast
import contextlib
import copy
import importlib.abc
import importlib.util
import io
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import hypothesis
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
PACKAGE = "edge_agent.scheduling"
TESTS = ROOT / "tests" / "unit" / "scheduling"
WHOLE = ("test_preemption.py", "test_worst_cases.py", "test_planner_model.py::TestPlanner")
MODULES = {
    "queue": ("test_queue.py",),
    "budget": ("test_budget.py",),
    "pressure": ("test_pressure.py",),
    "pace": ("test_pace.py",),
    "refusals": ("test_refusals.py",),
    "residents": ("test_residents.py", *WHOLE),
    "eviction": ("test_eviction.py", *WHOLE),
    "state": WHOLE,
    "making_room": WHOLE,
    "planner": WHOLE,
}
_QUIET = ("-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::pytest.PytestWarning")
"""What the parent has imported already can't be rewritten, and need not be."""
MUTANT_S = 40.0
"""A mutant that goes round in circles counts as noticed."""

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}
_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One changed node: where, and how the line reads now."""

    line: int
    text: str
    code: CodeType


def _changes(node: ast.AST) -> Iterator[ast.AST]:  # noqa: C901 - one case for each kind
    """What this node could be by mistake."""
    match node:
        case ast.Compare(ops=[op, *_]) if type(op) in _COMPARISONS:
            changed = copy.deepcopy(node)
            changed.ops[0] = _COMPARISONS[type(op)]()
            yield changed
        case ast.BinOp(op=op) if type(op) in _ARITHMETIC:
            yield ast.BinOp(node.left, _ARITHMETIC[type(op)](), node.right)
        case ast.AugAssign(op=op) if type(op) in _ARITHMETIC:
            yield ast.AugAssign(node.target, _ARITHMETIC[type(op)](), node.value)
        case ast.BoolOp(op=op, values=values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in _CALLS:
            yield ast.Call(ast.Name(_CALLS[name], ast.Load()), args, keywords)
        case ast.Return(value=value) if value is not None and not _is_none(value):
            yield ast.Return(ast.Constant(None))
        case ast.Continue():
            yield ast.Break()
        case ast.Expr(value=ast.Call() | ast.YieldFrom()) | ast.AugAssign():
            yield ast.Pass()


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def mutants(source: str, filename: str) -> Iterator[Mutant]:
    """Every single change; annotations, decorators and texts stay as they are."""
    tree = ast.parse(source)
    quiet = {id(part) for node in ast.walk(tree) for part in _declared(node)}
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            nodes = value if isinstance(value, list) else [value]
            for at, node in enumerate(nodes):
                if not isinstance(node, ast.AST) or id(node) in quiet:
                    continue
                for change in _changes(node):
                    ast.copy_location(change, node)
                    _put(parent, name, at, change)
                    ast.fix_missing_locations(tree)
                    code = compile(tree, filename, "exec", dont_inherit=True)
                    text = f"{ast.unparse(node)}  ->  {ast.unparse(change)}"
                    yield Mutant(getattr(node, "lineno", 0), " ".join(text.split()), code)
                    _put(parent, name, at, node)


def _put(parent: ast.AST, name: str, at: int, node: ast.AST) -> None:
    value = getattr(parent, name)
    if isinstance(value, list):
        value[at] = node
    else:
        setattr(parent, name, node)


def _declared(node: ast.AST) -> Iterator[ast.AST]:
    for name in ("annotation", "returns"):
        part = getattr(node, name, None)
        if isinstance(part, ast.AST):
            yield from ast.walk(part)
    for decorator in getattr(node, "decorator_list", ()):
        yield from ast.walk(decorator)


class _Planted(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module its changed code."""

    def __init__(self, name: str, code: CodeType) -> None:
        self.name, self.code = name, code

    def find_spec(self, name, path, target=None):  # noqa: ARG002
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def exec_module(self, module):
        exec(self.code, module.__dict__)  # noqa: S102 - that is what is tried here


def survives(module: str, mutant: Mutant | None, tests: Sequence[str]) -> bool:
    """Run a module's tests in a child of its own; None: without any change."""
    child = os.fork()
    if child == 0:
        signal.alarm(int(MUTANT_S))
        if mutant is not None:
            sys.meta_path.insert(0, _Planted(f"{PACKAGE}.{module}", mutant.code))
        random.seed(0)
        hypothesis.settings.register_profile(
            "mutation",
            database=None,
            derandomize=True,
            phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        )
        hypothesis.settings.load_profile("mutation")
        code: object = 1
        with contextlib.suppress(BaseException), contextlib.redirect_stdout(io.StringIO()):
            code = pytest.main(
                ["-x", "-q", "--tb=no", *_QUIET] + [str(TESTS / test) for test in tests]
            )
        os._exit(0 if code == 0 else 1)
    _, status = os.waitpid(child, 0)
    return status == 0


def _known() -> set[str]:
    lines = (Path(__file__).with_name("equivalent.txt")).read_text().splitlines()
    return {line.split("  #")[0].strip() for line in lines if line.strip()}


def main() -> int:
    """Try each mutant of the named modules, or of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=list(MODULES))
    parser.add_argument("--limit-s", type=float, default=3600.0, help="stop after so long")
    arguments = parser.parse_args()
    os.environ["EDGE_AGENT_CHAOS"] = "1"
    known, unknown, end_s = _known(), 0, time.monotonic() + arguments.limit_s
    for module in arguments.modules:
        path = ROOT / "edge_agent" / "scheduling" / f"{module}.py"
        tests = MODULES[module]
        if not survives(module, None, tests):
            print(f"{module}: the tests fail without a mutant")  # noqa: T201
            return 1
        killed = equivalent = 0
        for mutant in mutants(path.read_text(), str(path)):
            if time.monotonic() > end_s:
                print(f"{module}: out of time")  # noqa: T201
                return 1
            if not survives(module, mutant, tests):
                killed += 1
            elif f"{module}: {mutant.text}" in known:
                equivalent += 1
            else:
                unknown += 1
                print(f"{module}:{mutant.line}: {mutant.text}", flush=True)  # noqa: T201
        print(f"{module}: {killed} killed, {equivalent} equivalent", flush=True)  # noqa: T201
    return 1 if unknown else 0


if __name__ == "__main__":
    raise SystemExit(main())
