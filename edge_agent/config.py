"""The configuration: one YAML file, checked as a whole, into frozen values.

Every error is reported at once, with key path, line, value and limit; an unknown key names the
nearest known one. Reads the file and nothing else: whether a path exists or an engine is installed
shows later. `config_sections` holds the keys.
"""

import copy
import difflib
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationError

from edge_agent.config_sections import (
    NAMED_SECTIONS,
    AbsolutePath,
    AllowedTool,
    EngineName,
    EngineOverride,
    Ledger,
    Log,
    Runs,
    Scheduling,
    Section,
    Sessions,
    Shutdown,
    Telemetry,
    Tools,
    ToolServer,
    Worker,
    empty_list,
    empty_mapping,
    nearest,
)
from edge_agent.core import ANSWER, SideEffect
from edge_agent.errors import ConfigError, FieldViolation
from edge_agent.paths import engines_dir
from edge_agent.strict_yaml import (
    MAX_BYTES,
    Document,
    KeyPath,
    YamlSyntaxError,
    format_path,
    read_yaml,
)
from edge_agent.tools.settings import BUILTINS
from edge_agent.units import format_duration, format_size

RESTART_KEYS: Final = (
    "engines_dir",
    "preload",
    "log.format",
    "telemetry.sysroot",
    "telemetry.interval",
    "ledger.max_size",
    "ledger.retention",
    "ledger.ballast",
    "sessions.retention",
    "tools.servers",
    "tools.allow",
)
"""Keys that only take effect at the next start; a reload changes all others.

What is below `worker` and `engines` holds for engines that are loaded from then on.
"""

_SHOWN_CHARACTERS: Final = 60
_SHORT: Final = reprlib.Repr()  # looks at a few items only, so that no YAML bomb goes off
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _SHOWN_CHARACTERS + 1


class Config(Section):
    """Everything that can be configured. `engines_dir` None: below the state directory."""

    engines_dir: AbsolutePath | None = None
    preload: Annotated[tuple[EngineName, ...], BeforeValidator(empty_list)] = ()
    engines: Annotated[Mapping[EngineName, EngineOverride], BeforeValidator(empty_mapping)] = Field(
        default_factory=dict
    )
    log: Log = Field(default_factory=Log)
    runs: Runs = Field(default_factory=Runs)
    scheduling: Scheduling = Field(default_factory=Scheduling)
    worker: Worker = Field(default_factory=Worker)
    telemetry: Telemetry = Field(default_factory=Telemetry)
    tools: Tools = Field(default_factory=Tools)
    ledger: Ledger = Field(default_factory=Ledger)
    sessions: Sessions = Field(default_factory=Sessions)
    shutdown: Shutdown = Field(default_factory=Shutdown)


def load_config(path: Path | None, environ: Mapping[str, str]) -> Config:
    """The configuration in `path` (None: the defaults), with `engines_dir` filled in.

    Raises:
        ConfigError: the file can't be read, or `violations` holds all that is wrong in it.
    """
    config = Config() if path is None else parse_config(_read(path), str(path))
    store = engines_dir(config.engines_dir, environ)
    return config.model_copy(update={"engines_dir": store})


def parse_config(text: str, source: str) -> Config:
    """The configuration in `text`; `source` names it in errors.

    Raises:
        ConfigError: `violations` holds every error; the message is a report, one line for each.
    """
    try:
        document = read_yaml(text)
    except YamlSyntaxError as error:
        raise _report(source, [FieldViolation(error.place, error.problem)], {}) from error
    found = [FieldViolation(format_path(p.path), p.description) for p in document.problems]
    config, wrong = _validate(document)
    found += wrong
    found += _across(config, {violation.field for violation in found})
    if found:
        lines = {format_path(key): line for key, line in document.lines.items()}
        raise _report(source, found, lines)
    return config


def needs_restart(old: Config, new: Config) -> tuple[str, ...]:
    """The keys of RESTART_KEYS whose values differ."""
    return tuple(key for key in RESTART_KEYS if _value(old, key) != _value(new, key))


def known_keys() -> tuple[str, ...]:
    """Every key of the file, dotted, in the order of the code; sections are not among them."""
    return tuple(_keys(Config, ""))


def _keys(section: type[Section], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        key = prefix + (field.alias or name)
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from _keys(inner, key + ".")
        else:
            yield key


def _value(config: Config, key: str) -> object:
    value: Any = config.model_dump(by_alias=True)
    for part in key.split("."):
        value = value[part]
    return value


def _read(path: Path) -> str:
    raw = b""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise _report(str(path), [FieldViolation("file", f"larger than {MAX_BYTES} bytes")], {})
        return raw.decode("utf-8")
    except OSError as error:
        violation = FieldViolation("file", error.strerror or str(error))
        raise _report(str(path), [violation], {}) from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise _report(str(path), [FieldViolation(f"line {line}", "not UTF-8")], {}) from error


def _validate(document: Document) -> tuple[Config, list[FieldViolation]]:
    """The configuration without what is wrong in it, and what is wrong."""
    found: list[FieldViolation] = []
    data: Any = None
    try:
        data = copy.deepcopy(document.data)
        return Config.model_validate(data), found
    except RecursionError:
        return Config(), [FieldViolation("document", "nested too deeply")]
    except ValidationError as error:
        for entry in error.errors(include_url=False):
            path: KeyPath = tuple(key for key in entry["loc"] if key != "[key]")
            found.append(FieldViolation(format_path(path), _describe(path, entry)))
            data = _without(data, path)
    try:
        return Config.model_validate(data), found
    except ValidationError:
        return Config(), found


def _without(data: Any, path: KeyPath) -> Any:
    """`data` with the item at `path` removed; what can't be removed goes with its container."""
    if not path or not isinstance(data, dict):
        return None
    first, *rest = path
    if rest and isinstance(data.get(first), dict):
        data[first] = _without(data[first], tuple(rest))
    else:
        data.pop(first, None)
    return data


def _describe(path: KeyPath, entry: Any) -> str:
    """Value and rule of one pydantic error, in our words."""
    kind: str = entry["type"]
    if kind == "extra_forbidden":
        return "unknown key" + _nearest_key(path)
    limits: dict[str, Any] = entry.get("ctx", {})
    rule = {
        "bool_type": "must be true or false",
        "dict_type": "must be a mapping of keys to values",
        "greater_than_equal": f"must be at least {_limit(path, limits.get('ge'))}",
        "int_type": "must be a whole number",
        "invalid_key": "must be text: put the key in quotes",
        "less_than_equal": f"must be at most {_limit(path, limits.get('le'))}",
        "literal_error": f"must be one of {limits.get('expected')}",
        "mapping_type": "must be a mapping of keys to values",
        "model_type": "must be a mapping of keys to values",
        "string_pattern_mismatch": f"must match {str(limits.get('pattern')).strip('^$')}",
        "string_type": "must be text: put it in quotes",
        "tuple_type": "must be a list",
        "value_error": str(limits.get("error")),
    }.get(kind, entry["msg"])
    is_range = kind in {"greater_than_equal", "less_than_equal"}
    shown = _limit(path, entry["input"]) if is_range else _show(entry["input"])
    return f"{shown}, {rule}"


def _limit(path: KeyPath, number: Any) -> str:
    """A number of a range as the file writes it: what has a unit was read before the check."""
    if isinstance(number, float):  # nothing but durations
        return format_duration(number)
    is_size = str(path[-1] if path else "").endswith("_size")
    return format_size(number) if is_size and isinstance(number, int) else str(number)


def _show(value: object) -> str:
    """The value as in the file, cut where it is long."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = _SHORT.repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _nearest_key(path: KeyPath) -> str:
    """A hint after an unknown key: the nearest one beside it, else the nearest anywhere."""
    *above, last = (str(key) for key in path)
    prefix = "".join(f"{key}." for key in above)
    named = NAMED_SECTIONS.get(".".join(above[:-1]))
    if named is not None:
        known_there = tuple(field.alias or name for name, field in named.model_fields.items())
        return nearest(last, known_there) or f", known here: {', '.join(known_there)}"
    known = known_keys()
    beside = {key.removeprefix(prefix).split(".")[0] for key in known if key.startswith(prefix)}
    hint = nearest(last, tuple(beside), prefix)
    if hint:
        return hint
    anywhere = {key.split(".")[-1]: key for key in known}
    close = difflib.get_close_matches(last, anywhere, n=1)
    if close:
        return f", did you mean {anywhere[close[0]]}?"
    return f", known here: {', '.join(sorted(beside))}"


def _across(config: Config, wrong: set[str]) -> Iterator[FieldViolation]:
    """Rules between keys; none for a key that is wrong by itself."""

    def violated(broken: bool, key: str, other: str) -> bool:  # noqa: FBT001 - reads as a sentence
        return broken and key not in wrong and other not in wrong

    runs, worker = config.runs, config.worker
    if violated(runs.max_timeout_s < runs.timeout_s, "runs.max_timeout", "runs.timeout"):
        said = f"{format_duration(runs.max_timeout_s)}, must be at least runs.timeout"
        limit = format_duration(runs.timeout_s)
        yield FieldViolation("runs.max_timeout", f"{said} ({limit})")
    if violated(
        runs.max_tool_result_bytes > runs.max_request_bytes,
        "runs.max_tool_result_size",
        "runs.max_request_size",
    ):
        said = f"{format_size(runs.max_tool_result_bytes)}, must be at most runs.max_request_size"
        limit = format_size(runs.max_request_bytes)
        yield FieldViolation("runs.max_tool_result_size", f"{said} ({limit})")
    interval, timeout = "worker.heartbeat_interval", "worker.heartbeat_timeout"
    if violated(worker.heartbeat_timeout_s <= worker.heartbeat_interval_s, timeout, interval):
        said = f"{format_duration(worker.heartbeat_timeout_s)}, must be above {interval}"
        limit = format_duration(worker.heartbeat_interval_s)
        yield FieldViolation(timeout, f"{said} ({limit})")
    yield from _floors(config.scheduling, violated)
    yield from _tools(config.tools, wrong)
    room = config.scheduling.max_resident_engines
    limit_key = "scheduling.max_resident_engines"
    if violated(len(config.preload) > room, "preload", limit_key):
        said = f"{len(config.preload)} engines, must be at most {limit_key} ({room})"
        yield FieldViolation("preload", said)
    for name in dict.fromkeys(config.preload):
        if config.preload.count(name) > 1:
            yield FieldViolation("preload", f"{name!r} is named more than once")


def _floors(
    scheduling: Scheduling, violated: Callable[[bool, str, str], bool]
) -> Iterator[FieldViolation]:
    """The hard floor lies below the soft one, where both are given."""
    soft, hard = scheduling.soft_floor_bytes, scheduling.hard_floor_bytes
    soft_key, hard_key = "scheduling.soft_floor", "scheduling.hard_floor"
    if soft is not None and hard is not None and violated(hard >= soft, hard_key, soft_key):
        said = f"{format_size(hard)}, must be below {soft_key} ({format_size(soft)})"
        yield FieldViolation(hard_key, said)


def _tools(tools: Tools, wrong: set[str]) -> Iterator[FieldViolation]:
    """Rules within an entry; none for one that has something wrong in it by itself."""

    def is_right(key: str) -> bool:
        return not any(each == key or each.startswith((f"{key}.", f"{key}[")) for each in wrong)

    for name, server in tools.servers.items():
        key = format_path(("tools", "servers", name))
        yield from _server(key, server) if is_right(key) else ()
    for name, allowed in tools.allow.items():
        key = format_path(("tools", "allow", name))
        yield from _allowed(key, allowed, tools.servers) if is_right(key) else ()
        yield from _verified(key, allowed.verify, tools.allow) if is_right(key) else ()
        if name == ANSWER:
            yield FieldViolation(key, f'"{ANSWER}" is taken by the branch that answers in words')


def _verified(
    key: str, verify: str | None, allow: Mapping[str, AllowedTool]
) -> Iterator[FieldViolation]:
    """Who tells whether a call acted is there, and only looks."""
    if verify is None:
        return
    verifier = allow.get(verify)
    if verifier is None:
        said = f"{_show(verify)}, must be one of tools.allow: {', '.join(allow)}"
        yield FieldViolation(f"{key}.verify", said)
    elif verifier.side_effect != SideEffect.NONE or verifier.resources or verifier.needs_approval:
        said = f"{_show(verify)} must have side effect NONE, no resources, and need no approval"
        yield FieldViolation(f"{key}.verify", said)


def _server(key: str, server: ToolServer) -> Iterator[FieldViolation]:
    """Exactly one way to reach it, and only what goes with that. What may be a key is not told."""
    if bool(server.command) == (server.url is not None):
        yield FieldViolation(key, "must have exactly one of command and url")
    elif server.url is None:
        if not server.command[0].startswith("/"):
            said = f"{_show(server.command[0])} must be the absolute path of a program"
            yield FieldViolation(f"{key}.command", said)
        if server.headers_file is not None:
            yield FieldViolation(f"{key}.headers_file", "goes with url, not with command")
    else:
        parts = urlsplit(server.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            said = "must be http:// or https:// and a host; keys belong into headers_file"
            yield FieldViolation(f"{key}.url", said)
        for name in ("environment", "directory"):
            if getattr(server, name):
                yield FieldViolation(f"{key}.{name}", "goes with command, not with url")


def _allowed(
    key: str, allowed: AllowedTool, servers: Mapping[str, ToolServer]
) -> Iterator[FieldViolation]:
    """A built-in or a server's tool, and what a call of it leaves behind, which nobody guesses."""
    if allowed.side_effect is None:
        said = f"is missing, must be one of {', '.join(SideEffect)}"
        yield FieldViolation(f"{key}.side_effect", said)
    if len(set(allowed.resources)) < len(allowed.resources):
        yield FieldViolation(f"{key}.resources", "names one twice")
    names_server = allowed.server is not None or allowed.tool is not None
    if (allowed.builtin is not None) == names_server:
        yield FieldViolation(key, "must have either builtin, or server and tool")
    elif allowed.builtin is not None:
        if allowed.builtin not in BUILTINS:
            said = f"{_show(allowed.builtin)}, must be one of {', '.join(BUILTINS)}"
            yield FieldViolation(f"{key}.builtin", said)
    elif allowed.server is None or not allowed.tool:
        yield FieldViolation(key, "must have both server and tool")
    elif allowed.server not in servers:
        known = ", ".join(servers) or "there is none"
        said = f"{_show(allowed.server)}, must be one of tools.servers: {known}"
        yield FieldViolation(f"{key}.server", said)


def _report(source: str, violations: list[FieldViolation], lines: Mapping[str, int]) -> ConfigError:
    """One error for the whole file, ordered as the file is."""
    found = list(dict.fromkeys(violations))
    found.sort(key=lambda violation: lines.get(violation.field, 0))
    count = "1 error" if len(found) == 1 else f"{len(found)} errors"
    report = [f"{source}: {count} in the configuration"]
    for violation in found:
        line = lines.get(violation.field)
        place = violation.field if line is None else f"{violation.field} (line {line})"
        report.append(f"  {place}: {violation.description}")
    metadata = {"source": source, "errors": len(found)}
    return ConfigError("\n".join(report), metadata=metadata, violations=found)
