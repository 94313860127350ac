"""Which error reasons the code can give, read from its source.

A reason is a literal in one of the places where the code puts one: a class' `default_reason`, the
argument `reason` of a call (its own name or that of a parameter of a function in the same module),
the first argument of RunError, or a name `reason` that it is assigned to.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from edge_agent import errors
from edge_agent.errors import EdgeAgentError

_REASON = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")


def reasons_in(package: Path) -> Mapping[str, frozenset[str]]:
    """Every reason in the source below `package`, with the gRPC codes that it is seen to end with.

    No code for what is only ever part of a run, or where the class is not in sight.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted(package.rglob("*.py")):
        if "v1" not in path.parts:
            for reason, code in _reasons_of(ast.parse(path.read_text())):
                found[reason].update({code} if code else ())
    return {reason: frozenset(codes) for reason, codes in found.items()}


def _reasons_of(module: ast.Module) -> Iterator[tuple[str, str | None]]:
    takes_reason = dict(_functions_with_a_reason(module))
    for node in ast.walk(module):
        match node:
            case ast.ClassDef(name=name):
                yield from ((reason, _code(name)) for reason in _default_reasons(node))
            case ast.Assign(targets=[ast.Name(id="reason")], value=value):
                yield from ((reason, None) for reason in _literals(value))
            case ast.Call():
                yield from _arguments(node, takes_reason)
            case _:
                pass


def _functions_with_a_reason(
    module: ast.Module,
) -> Iterator[tuple[str, tuple[int, str | None]]]:
    """Name, the position of the parameter `reason`, and the code of the error that it returns."""
    yield "RunError", (0, None)
    for function in ast.walk(module):
        if isinstance(function, ast.FunctionDef):
            for position, argument in enumerate(function.args.args):
                if argument.arg == "reason":
                    yield function.name, (position, _code(_name(function.returns)))


def _arguments(
    call: ast.Call, takes_reason: Mapping[str, tuple[int, str | None]]
) -> Iterator[tuple[str, str | None]]:
    name = _name(call.func)
    for keyword in call.keywords:
        if keyword.arg == "reason":
            yield from ((reason, _code(name)) for reason in _literals(keyword.value))
    position, code = takes_reason.get(name, (len(call.args), None))
    for argument in call.args[position : position + 1]:
        yield from ((reason, code) for reason in _literals(argument))


def _default_reasons(node: ast.ClassDef) -> Iterator[str]:
    for statement in node.body:
        match statement:
            case (
                ast.Assign(targets=[ast.Name(id="default_reason")], value=value)
                | ast.AnnAssign(target=ast.Name(id="default_reason"), value=ast.expr() as value)
            ):
                yield from _literals(value)
            case _:
                pass


def _literals(node: ast.expr) -> Iterator[str]:
    """The reasons that an expression may be."""
    match node:
        case ast.Constant(value=str(text)) if _REASON.fullmatch(text):
            yield text
        case ast.IfExp(body=body, orelse=orelse):
            yield from _literals(body)
            yield from _literals(orelse)
        case ast.BoolOp(values=values):
            for value in values:
                yield from _literals(value)
        case _:
            pass


def _name(node: ast.expr | None) -> str:
    """`X` of X, of X.field and of module.X."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name(id=owner), attr=name):
            return owner if _code(owner) else name
        case _:
            return ""


def _code(name: str) -> str | None:
    """The gRPC code of the error class of that name."""
    kind = getattr(errors, name, None) if name else None
    if isinstance(kind, type) and issubclass(kind, EdgeAgentError):
        return kind.code
    return None
