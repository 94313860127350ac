"""The small bugs that a module could have: one changed operator, constant or condition each.

A mutant is called by what it changes, so that its name stays when other lines do not.
"""

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType

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
    """One changed node: its line, what it is called in `equivalent.txt`, and the whole module."""

    line: int
    name: str
    code: CodeType


@dataclass(frozen=True, slots=True)
class _Spot:
    """A changed node, and its place: `within` are the nodes around it up to its statement."""

    function: str
    node: ast.AST
    change: ast.AST
    within: tuple[ast.AST, ...]
    parent: ast.AST
    field: str
    at: int | None

    def put(self, node: ast.AST) -> None:
        if self.at is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.at] = node


def mutants(source: str, module: str, filename: str) -> list[Mutant]:
    """Every single change; annotations, decorators and texts stay as they are.

    A change is called by what it changes: `0 -> 1`; where its function has several of these, by
    as much of its statement as tells it from them: `missing > 0 -> missing > 1`.
    """
    tree = ast.parse(source)
    found = []
    for spot in list(_spots(tree, (), ())):
        before = [_parts(node) for node in (spot.node, *spot.within)]
        ast.fix_missing_locations(ast.copy_location(spot.change, spot.node))
        spot.put(spot.change)
        after = [_parts(node) for node in (spot.change, *spot.within)]
        code = compile(tree, filename, "exec", dont_inherit=True)
        spot.put(spot.node)
        texts = list(dict.fromkeys(map(_difference, before, after)))
        if isinstance(spot.node, ast.Constant):
            del texts[0]  # a number alone tells nothing
        line = getattr(spot.node, "lineno", 0)
        found.append((line, f"{module}.{spot.function}", texts, code))
    times = Counter((function, text) for _, function, texts, _ in found for text in texts)
    again: Counter[str] = Counter()
    named = []
    for line, function, texts, code in found:
        text = next((text for text in texts if times[function, text] == 1), texts[-1])
        name = f"{function}: {text}"
        again[name] += 1
        number = f" ({again[name]})" if times[function, text] > 1 else ""
        named.append(Mutant(line, name + number, code))
    return named


def _spots(node: ast.AST, names: tuple[str, ...], around: tuple[ast.AST, ...]) -> Iterator[_Spot]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        names = (*names, node.name)
    within = (node,) if isinstance(node, ast.stmt | ast.Module) else (node, *around)
    for field, value in ast.iter_fields(node):
        if field in {"annotation", "returns", "decorator_list"}:
            continue
        for at, part in enumerate(value) if isinstance(value, list) else ((None, value),):
            if not isinstance(part, ast.AST):
                continue
            wider = () if isinstance(part, ast.stmt) else within
            for change in _changes(part):
                function = ".".join(names) or "<module>"
                yield _Spot(function, part, change, wider, node, field, at)
            yield from _spots(part, names, within)


def _parts(node: ast.AST) -> list[str]:
    """Its words on one line: of a mapping by its items, of a statement with a body its head."""
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        texts = [f"{ast.unparse(key) if key else '**'}: {ast.unparse(of)}" for key, of in pairs]
    else:
        texts = [ast.unparse(node).strip()]
        if isinstance(getattr(node, "body", None), list):
            texts = [next(line for line in texts[0].splitlines() if not line.startswith("@"))]
    return [" ".join(text.split()) for text in texts]


def _difference(before: list[str], after: list[str]) -> str:
    one, other = next(pair for pair in zip(before, after, strict=False) if pair[0] != pair[1])
    return f"{one} -> {other}"


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
