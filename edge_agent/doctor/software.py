"""Checks of what the configuration needs: itself, engines, the libraries of their backends."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_agent import paths
from edge_agent.config import Config, load_config
from edge_agent.config_sections import EngineOverride
from edge_agent.doctor.children import NoAnswer, ask_libraries
from edge_agent.doctor.finding import Finding, fail, good, unknown, warn
from edge_agent.engines.catalogue import BrokenEngine, Catalogue
from edge_agent.engines.manifest import BACKENDS, Manifest
from edge_agent.errors import ConfigError, EdgeAgentError
from edge_agent.scheduling.footprint import estimate
from edge_agent.scheduling.values import Footprint
from edge_agent.units import size_text

LIBRARIES: Final = {"llama_cpp": ("xllamacpp", "llguidance", "jsonschema_rs", "msgspec")}
"""What a worker imports, by backend; the first is the engine's own library."""
EXTRAS: Final = {"llama_cpp": "embedded"}
"""The extra of our package that brings them."""

_DIGITS: Final = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class Settings:
    """The configuration that the daemon would run with, and the findings on it."""

    config: Config
    store: Path | None
    finding: Finding

    @property
    def needed(self) -> dict[str, str]:
        """The engines that it names, with the key that does."""
        default = self.config.runs.default_engine
        named = {default: "runs.default_engine"} if default else {}
        return named | dict.fromkeys(self.config.preload, "preload")


@dataclass(frozen=True, slots=True)
class Store:
    """What is installed; `problem` says why nothing can be told."""

    engines: tuple[Manifest, ...] = ()
    broken: tuple[BrokenEngine, ...] = ()
    problem: str = ""


def read_settings(
    config_path: Path | None, engines_dir: Path | None, environ: Mapping[str, str]
) -> Settings:
    """As the daemon would; what is wrong is a finding, and the defaults stand in."""
    path = config_path
    try:
        path = config_path or paths.default_config_path(environ)
        config = load_config(path, environ)
    except ConfigError as error:
        lines = [f"{each.field}: {each.description}" for each in error.violations]
        value = "; ".join([str(path or "defaults"), *lines])
        hint = f"correct it; `edge-agent check-config {path or ''}`".rstrip("` ") + "` shows lines"
        return Settings(
            Config(), engines_dir or _default_store(environ), fail("config", value, hint)
        )
    finding = good("config", str(path) if path else "none: built-in defaults")
    return Settings(config, engines_dir or config.engines_dir, finding)


def read_store(directory: Path | None) -> Store:
    """The engines in the store, which need not exist yet."""
    if directory is None:
        return Store(problem="no directory for them")
    catalogue = Catalogue(directory)
    try:
        return Store(*catalogue.contents())
    except EdgeAgentError as error:
        return Store(problem=error.message)
    except OSError as error:
        return Store(problem=f"{directory}: {error.strerror}")


def check_backends(settings: Settings, store: Store, deadline_s: float) -> list[Finding]:
    """Whether each backend's libraries can be imported where its workers would run."""
    return [_check_backend(name, settings, store, deadline_s) for name in BACKENDS]


def check_engines(
    settings: Settings, store: Store, available_bytes: int | None, *, daemon_runs: bool
) -> list[Finding]:
    """The store, then every engine in it or named by the configuration."""
    directory = settings.store
    if store.problem:
        hint = "set HOME, XDG_STATE_HOME or engines_dir"
        if directory is not None:
            hint = f"`ls -ld {directory}` shows whose it is; the daemon must be able to read it"
        return [fail("engines", store.problem, hint)]
    installed = {manifest.name: manifest for manifest in store.engines}
    needed = settings.needed
    findings = [_summary(directory, store)]
    findings += [_not_installed(n, k) for n, k in needed.items() if n not in _all_names(store)]
    findings += [_broken(each, needed) for each in store.broken]
    before = 0
    preloaded = [name for name in settings.config.preload if name in installed]
    for name in dict.fromkeys([*preloaded, *installed]):
        manifest = installed[name]
        room = available_bytes
        if name in preloaded:  # one after the other, and they stay; any other may take their place
            room = None if available_bytes is None else available_bytes - before
            before += _footprint(manifest, settings).steady_bytes
        findings.append(
            _check_engine(
                manifest,
                directory,
                _footprint(manifest, settings).load_peak_bytes,
                room,
                needed.get(name),
                daemon_runs=daemon_runs,
            )
        )
    findings += [
        warn(f"engine/{name}", "not installed; named by engines", "remove it from engines")
        for name in settings.config.engines
        if name not in _all_names(store) and name not in needed
    ]
    return findings


def version_at_least(version: str, minimum: str) -> bool:
    """Numbers compared one by one: 2026.10.2 is at least 2026.10 and 2026.9."""
    have, want = ([int(part) for part in _DIGITS.findall(text)] for text in (version, minimum))
    return have + [0] * (len(want) - len(have)) >= want


def _check_backend(name: str, settings: Settings, store: Store, deadline_s: float) -> Finding:
    configured = settings.config.worker.python.get(name)
    python = str(configured or sys.executable)
    users = [manifest for manifest in store.engines if manifest.backend.name == name]
    needed = bool(configured) or any(manifest.name in settings.needed for manifest in users)
    finding = f"backend/{name}"
    wrong = fail if needed else warn
    try:
        answer = ask_libraries(python, LIBRARIES[name], deadline_s)
    except NoAnswer as error:
        hint = f"`{python} -c 'import {LIBRARIES[name][0]}'` shows what happens"
        if configured:
            hint = f"worker.python.{name} must be a Python with its libraries; {hint}"
        return wrong(finding, f"{python}: {error}", hint)
    problems = [f"{lib}: {each['problem']}" for lib, each in answer.items() if each["problem"]]
    if problems:
        wanted = f"'edge-agent[{EXTRAS[name]}]'"
        hint = f"`{python} -m pip install {wanted}`"
        return wrong(finding, f"{'; '.join(problems)} ({python})", hint)
    versions = [
        f"{library} {each['version'] or '(no version)'}" for library, each in answer.items()
    ]
    value = ", ".join(versions) + (f" ({python})" if configured else "")
    version = str(answer[LIBRARIES[name][0]]["version"])
    asking = [each for each in users if not version_at_least(version, each.backend.min_version)]
    if asking:
        asked = ", ".join(f"{each.name} needs {each.backend.min_version}" for each in asking)
        return wrong(finding, f"{value}; {asked}", "install a newer release of edge-agent")
    return good(finding, value)


def _summary(directory: Path | None, store: Store) -> Finding:
    if store.engines:
        return good("engines", f"{len(store.engines)} in {directory}")
    hint = f"`edge-agent engines install {_recipes()[0]} --store {directory}`"
    return warn("engines", f"none in {directory}", hint)


def _recipes() -> list[str]:
    return sorted(path.stem for path in paths.recipes_dir().glob("*.yaml")) or ["NAME"]


def _not_installed(name: str, key: str) -> Finding:
    known = name in _recipes()
    command = f"`edge-agent engines install {name if known else 'PATH'}`"
    hint = f"{command}{'' if known else ' with its recipe'}, or take it out of {key}"
    return fail(f"engine/{name}", f"not installed; named by {key}", hint)


def _broken(each: BrokenEngine, needed: Mapping[str, str]) -> Finding:
    hint = f"`edge-agent engines remove {each.name}`, then install it again"
    return (fail if each.name in needed else warn)(f"engine/{each.name}", each.description, hint)


def _check_engine(
    manifest: Manifest,
    directory: Path | None,
    peak: int,
    room_bytes: int | None,
    key: str | None,
    *,
    daemon_runs: bool,
) -> Finding:
    name = f"engine/{manifest.name}"
    try:
        wrong = Catalogue(directory or Path()).quick_check(manifest.name)
    except (EdgeAgentError, OSError) as error:
        return (fail if key else warn)(name, str(error), "install it again")
    if wrong:
        value = "; ".join(f"{each.field}: {each.description}" for each in wrong)
        hint = f"`edge-agent engines remove {manifest.name}`, then install it again"
        return (fail if key else warn)(name, value, hint)
    value = f"{manifest.backend.name}, needs {size_text(peak)}"
    if room_bytes is None:
        return unknown(name, f"{value}; the memory is unknown", "see memory")
    if peak <= room_bytes:
        return good(name, f"{value}: fits")
    value += f", {size_text(max(room_bytes, 0))} are available"
    hint = "stop other programs, or choose a smaller engine or fewer slots"
    if daemon_runs:  # which may have this very engine in memory
        return unknown(
            name, value, f"a daemon runs: `edge-agent status` shows what it holds; {hint}"
        )
    if key == "preload":
        return fail(name, f"{value}; named by preload", hint)
    return warn(name, value, hint)


def _footprint(manifest: Manifest, settings: Settings) -> Footprint:
    """What the engine is estimated to take as this machine is configured."""
    wanted = settings.config.engines.get(manifest.name, EngineOverride())
    context_tokens = wanted.context_tokens or manifest.context_tokens
    return estimate(manifest, wanted.slots or manifest.slots, context_tokens)


def _all_names(store: Store) -> set[str]:
    return {m.name for m in store.engines} | {each.name for each in store.broken}


def _default_store(environ: Mapping[str, str]) -> Path | None:
    try:
        return paths.engines_dir(None, environ)
    except ConfigError:
        return None
