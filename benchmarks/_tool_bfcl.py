"""Cases of the Berkeley Function Calling Leaderboard (Apache-2.0), judged by its own AST checker.

Data and checker are taken out of the wheel `bfcl-eval`, which is downloaded once into `build/` and
not installed: its dependencies are heavy, and neither data nor checker needs them.
"""

import contextlib
import importlib
import json
import random
import shutil
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks._shared import REPOSITORY
from benchmarks._tool_cases import Case
from edge_agent.core import Message, Role, TextPart, Tool, ToolCall
from edge_agent.engines import wheel
from edge_agent.engines.recipe import PypiObtain
from edge_agent.errors import InstallError

VERSION: Final = "2026.3.23"
CATEGORIES: Final = ("simple_python", "multiple", "live_simple")
_WHEEL: Final = PypiObtain(
    package="bfcl-eval",
    version=VERSION,
    wheel_sha256="3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
    size_bytes=1_925_664,
    members={},
)
_DOWNLOAD_TIMEOUT_S: Final = 120.0
_SEED: Final = 20261125
_TYPES: Final = {"dict": "object", "float": "number", "tuple": "array"}
"""What BFCL calls the types of JSON Schema."""

Checker = Callable[..., Mapping[str, Any]]


def fetch() -> Path | None:
    """Where the wheel's files are; None, after a line that says why, where it can't be had."""
    place = REPOSITORY / "build" / f"bfcl-eval-{VERSION}"
    if place.is_dir():
        return place
    place.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        try:
            path = wheel.download(_WHEEL, Path(scratch), lambda _: None, _DOWNLOAD_TIMEOUT_S)
        except InstallError as error:
            print(f"without BFCL: {error}")
            return None
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(path) as opened:
            opened.extractall(unpacked)
        shutil.move(unpacked, place)
    return place


def cases(place: Path, category: str, count: int | None) -> list[Case]:
    """`count` cases of a category by a fixed seed, all of them for None."""
    questions = _lines(place / "bfcl_eval" / "data" / f"BFCL_v4_{category}.json")
    answers = _lines(place / "bfcl_eval" / "data" / "possible_answer" / f"BFCL_v4_{category}.json")
    truth = {each["id"]: each["ground_truth"] for each in answers}
    if count is not None and count < len(questions):
        questions = random.Random(_SEED).sample(questions, count)  # noqa: S311 - a sample, no secret
    check = _checker(place)
    return [_case(category, each, truth[each["id"]], check) for each in questions]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _case(
    category: str, question: Mapping[str, Any], truth: list[dict[str, Any]], check: Checker
) -> Case:
    functions = question["function"]
    tools = tuple(
        Tool(each["name"], each["description"], json.dumps(_schema(each["parameters"])))
        for each in functions
    )
    messages = tuple(
        Message(Role(each["role"]), (TextPart(each["content"]),))
        for each in question["question"][0]
    )

    def right(call: ToolCall) -> bool:
        written = [{call.name: json.loads(call.arguments_json)}]
        language = importlib.import_module("bfcl_eval.constants.enums").Language.PYTHON
        return bool(check(functions, written, truth, language, category, "model")["valid"])

    return Case(question["id"], messages, tools, next(iter(truth[0])), right)


def _schema(value: Any) -> Any:
    """A schema of BFCL's as JSON Schema, closed, without words that are no keywords of it."""
    if isinstance(value, list):
        return [_schema(each) for each in value]
    if not isinstance(value, dict):
        return value
    schema = {key: each for key, each in value.items() if key not in ("optional", "default")}
    kind = schema.get("type")
    if kind == "any":
        del schema["type"]
    elif isinstance(kind, str):
        schema["type"] = _TYPES.get(kind, kind)
    if isinstance(properties := schema.get("properties"), dict):
        schema["properties"] = {name: _schema(each) for name, each in properties.items()}
        schema["additionalProperties"] = False
    if "items" in schema:
        schema["items"] = _schema(schema["items"])
    return schema


def _checker(place: Path) -> Checker:
    """BFCL's `ast_checker`. The table of models that it imports would bring everything else."""
    table = types.ModuleType("bfcl_eval.constants.model_config")
    model = types.SimpleNamespace(underscore_to_dot=False)
    table.__dict__["MODEL_CONFIG_MAPPING"] = {"model": model}
    with _importable(place):
        sys.modules[table.__name__] = table
        checker: Checker = importlib.import_module(
            "bfcl_eval.eval_checker.ast_eval.ast_checker"
        ).ast_checker
    return checker


@contextlib.contextmanager
def _importable(place: Path) -> Iterator[None]:
    sys.path.insert(0, str(place))
    try:
        yield
    finally:
        sys.path.remove(str(place))
