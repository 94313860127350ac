"""What doctor says of the configuration, and of the engines and libraries that it needs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edge_agent.doctor import software
from edge_agent.doctor.finding import Finding, FindingStatus, good
from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.install import find_recipe, install
from edge_agent.engines.manifest import BACKENDS
from tests.support.engine_files import write_engine


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with one made engine, `tiny`, which needs 2 MB to load and 1 MB afterwards."""
    root = tmp_path / "store"
    install_engine(root, tmp_path / "recipe")
    return root


def install_engine(root: Path, recipe_dir: Path, **changes: Any) -> None:
    recipe = find_recipe(str(write_engine(recipe_dir, **changes)), recipe_dir)
    install(recipe, Catalogue(root), lambda *_: None)


def engines(
    tmp_path: Path,
    store: Path,
    config: str = "{}",
    room: int | None = 1 << 30,
    *,
    runs: bool = False,
) -> Mapping[str, Finding]:
    """The findings on engines under that configuration."""
    path = tmp_path / "config.yaml"
    path.write_text(config)
    settings = software.read_settings(path, store, {"HOME": str(tmp_path)})
    assert settings.finding.status is FindingStatus.OK, settings.finding
    installed = software.read_store(settings.store)
    found = software.check_engines(settings, installed, room, daemon_runs=runs)
    assert len({finding.name for finding in found}) == len(found)
    return {finding.name: finding for finding in found}


def test_an_installed_engine_that_fits(tmp_path: Path, store: Path):
    found = engines(tmp_path, store, room=2_000_000)
    assert found["engines"] == good("engines", f"1 in {store}")
    assert found["engine/tiny"] == good("engine/tiny", "llama_cpp, needs 2 MiB: fits")


def test_an_engine_that_does_not_fit_fails_only_where_it_is_preloaded(tmp_path: Path, store: Path):
    spare = engines(tmp_path, store, room=1_999_999)["engine/tiny"]
    assert (spare.status, "2 MiB are available" in spare.value) == (FindingStatus.WARN, True)
    preloaded = engines(tmp_path, store, "preload: [tiny]", room=1_999_999)["engine/tiny"]
    assert preloaded.status is FindingStatus.FAIL
    default = engines(tmp_path, store, "runs: {default_engine: tiny}", room=1)["engine/tiny"]
    assert default.status is FindingStatus.WARN


def test_a_running_daemon_may_have_it_in_memory_already(tmp_path: Path, store: Path):
    found = engines(tmp_path, store, "preload: [tiny]", room=1, runs=True)["engine/tiny"]
    assert (found.status, "edge-agent status" in found.hint) == (FindingStatus.UNKNOWN, True)


def test_preloaded_engines_must_fit_beside_each_other(tmp_path: Path, store: Path):
    install_engine(store, tmp_path / "other", name="other")
    config = "preload: [tiny, other]\nscheduling: {max_resident_engines: 2}"
    found = engines(tmp_path, store, config, room=3_000_000)
    assert {found["engine/tiny"].status, found["engine/other"].status} == {FindingStatus.OK}
    found = engines(tmp_path, store, config, room=2_999_999)
    assert found["engine/tiny"].status is FindingStatus.OK
    assert found["engine/other"].status is FindingStatus.FAIL


def test_what_is_not_preloaded_may_take_the_place_of_what_is(tmp_path: Path, store: Path):
    install_engine(store, tmp_path / "other", name="other")
    found = engines(tmp_path, store, "preload: [tiny]", room=2_000_000)
    assert {found["engine/tiny"].status, found["engine/other"].status} == {FindingStatus.OK}


def test_unknown_memory_makes_fitting_unknown(tmp_path: Path, store: Path):
    assert engines(tmp_path, store, room=None)["engine/tiny"].status is FindingStatus.UNKNOWN


@pytest.mark.parametrize("config", ["preload: [absent]", "runs: {default_engine: absent}"])
def test_a_named_engine_that_is_not_installed_fails(tmp_path: Path, store: Path, config: str):
    found = engines(tmp_path, store, config)["engine/absent"]
    assert (found.status, found.hint.split(",")[0]) == (
        FindingStatus.FAIL,
        "`edge-agent engines install PATH` with its recipe",
    )


def test_a_named_engine_with_a_recipe_of_ours_is_installed_by_its_name(tmp_path: Path, store: Path):
    name = "smollm2-135m-instruct"
    found = engines(tmp_path, store, f"preload: [{name}]")[f"engine/{name}"]
    assert found.hint == f"`edge-agent engines install {name}`, or take it out of preload"


def test_an_override_of_no_engine_is_a_warning(tmp_path: Path, store: Path):
    found = engines(tmp_path, store, "engines: {absent: {slots: 1}, tiny: {slots: 1}}")
    assert found["engine/absent"].status is FindingStatus.WARN
    assert found["engine/tiny"].status is FindingStatus.OK


@pytest.mark.parametrize(("config", "status"), [("{}", "warn"), ("preload: [tiny]", "fail")])
@pytest.mark.parametrize("damage", ["manifest.json", "model.bin"])
def test_a_broken_engine_fails_only_where_it_is_needed(
    tmp_path: Path, store: Path, damage: str, config: str, status: str
):
    (store / "tiny" / damage).write_bytes(b"x")
    found = engines(tmp_path, store, config)["engine/tiny"]
    assert found.status == status
    assert found.hint.startswith("`edge-agent engines remove tiny`")


def test_an_empty_store_names_a_recipe_to_install(tmp_path: Path):
    found = engines(tmp_path, tmp_path / "none")
    assert set(found) == {"engines"}
    assert found["engines"].status is FindingStatus.WARN
    assert "engines install smollm2-135m-instruct --store" in found["engines"].hint


def test_a_store_that_can_not_be_read_fails(tmp_path: Path):
    (tmp_path / "store").write_text("a file")
    found = engines(tmp_path, tmp_path / "store")
    assert {name: finding.status for name, finding in found.items()} == {"engines": "fail"}


def test_without_a_directory_for_engines_the_variables_are_named():
    settings = software.read_settings(None, None, {"HOME": "relative"})
    assert (settings.finding.status, settings.store) == (FindingStatus.FAIL, None)
    store = software.read_store(settings.store)
    (found,) = software.check_engines(settings, store, None, daemon_runs=False)
    assert (found.status, found.hint) == ("fail", "set HOME, XDG_STATE_HOME or engines_dir")


def test_a_wrong_configuration_fails_with_all_that_is_wrong(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("preloat: []\nruns: {max_steps: 0}\n")
    settings = software.read_settings(path, None, {"HOME": str(tmp_path)})
    assert settings.finding.status is FindingStatus.FAIL
    assert str(path) in settings.finding.value
    assert "preloat: unknown key" in settings.finding.value
    assert "runs.max_steps" in settings.finding.value
    assert settings.finding.hint == f"correct it; `edge-agent check-config {path}` shows lines"
    assert settings.store == tmp_path / ".local/state/edge-agent/engines"


def test_a_configuration_that_is_not_there_fails_and_none_is_fine(tmp_path: Path):
    environ = {"HOME": str(tmp_path)}
    missing = software.read_settings(tmp_path / "no.yaml", None, environ).finding
    assert (missing.status, "No such file" in missing.value) == (FindingStatus.FAIL, True)
    assert software.read_settings(None, None, environ).finding.status is FindingStatus.OK


def test_every_backend_has_its_libraries_and_its_extra():
    assert set(software.LIBRARIES) == set(software.EXTRAS) == set(BACKENDS)


@pytest.mark.parametrize(
    ("version", "minimum", "expected"),
    [
        ("2026.10.11549", "2026.10", True),
        ("2026.10", "2026.10", True),
        ("2026.10", "2026.10.0", True),
        ("2026.10", "2026.10.1", False),
        ("2026.9.99", "2026.10", False),
        ("0.11.0", "0.9", True),
        ("None", "1", False),
    ],
)
def test_versions_are_compared_number_by_number(version: str, minimum: str, *, expected: bool):
    assert software.version_at_least(version, minimum) is expected
