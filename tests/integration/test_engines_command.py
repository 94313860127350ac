"""`edge-agent engines` as a person or a script calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.engine_files import NAME, write_engine

REPOSITORY = Path(__file__).resolve().parents[2]


def engines(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_agent", "engines", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_engine(tmp_path / "recipe")


def test_from_installing_to_removing(tmp_path: Path, recipe: Path):
    store = ["--store", tmp_path / "store"]
    installed = engines("install", recipe, *store)
    assert installed.returncode == 0
    assert installed.stdout == f"{NAME}: in {tmp_path}/store/{NAME}\n"
    assert installed.stderr.endswith(f"{NAME}: 100 %, checking extra/vocabulary.txt\n")
    assert engines("list", *store).stdout.splitlines()[1].split()[:2] == [NAME, "llama_cpp"]
    assert 'licence: "Apache-2.0"' in engines("show", NAME, *store).stdout.splitlines()
    verified = engines("verify", NAME, *store)
    assert (verified.returncode, verified.stdout) == (0, f"{NAME}: every file is as installed\n")
    assert engines("remove", NAME, *store).returncode == 0
    assert engines("list", *store).stdout.startswith(f"no engines in {tmp_path}/store; install one")


def test_json_is_one_document_on_stdout(tmp_path: Path, recipe: Path):
    store = ["--store", tmp_path / "store", "--json"]
    installed = json.loads(engines("install", recipe, *store).stdout)
    assert installed["directory"] == f"{tmp_path}/store/{NAME}"
    (listed,) = json.loads(engines("list", *store).stdout)["engines"]
    shown = json.loads(engines("show", NAME, *store).stdout)
    assert shown["digest"] == listed["digest"] == installed["digest"]
    assert shown["context_tokens"] == listed["context_tokens"] == 2048
    assert json.loads(engines("verify", NAME, *store).stdout)["valid"] is True
    assert json.loads(engines("remove", NAME, *store).stdout) == {"removed": NAME}


def test_a_damaged_engine_fails_verifying(tmp_path: Path, recipe: Path):
    store = ["--store", tmp_path / "store"]
    engines("install", recipe, *store)
    (tmp_path / "store" / NAME / "model.bin").write_bytes(b"X")
    text = engines("verify", NAME, *store)
    assert text.returncode == 1
    assert "model.bin: expected 320000 bytes, found 1" in text.stdout
    machine = engines("verify", NAME, *store, "--json")
    assert machine.returncode == 1
    assert json.loads(machine.stdout)["violations"][0]["file"] == "model.bin"


def test_what_is_broken_is_named_on_stderr(tmp_path: Path, recipe: Path):
    store = ["--store", tmp_path / "store"]
    engines("install", recipe, *store)
    (tmp_path / "store" / NAME / "manifest.json").unlink()
    listed = engines("list", *store)
    assert listed.returncode == 0
    assert f"broken: {NAME}: " in listed.stderr
    (problem,) = json.loads(engines("list", *store, "--json").stdout)["problems"]
    assert problem["name"] == NAME


def test_an_unknown_recipe_or_engine_is_an_error(tmp_path: Path):
    for arguments in (("install", "tinny"), ("show", "tinny"), ("remove", "tinny")):
        failed = engines(*arguments, "--store", tmp_path)
        assert failed.returncode == 1
        assert "'tinny'" in failed.stderr
        assert "Traceback" not in failed.stderr


def test_the_store_is_the_configured_one_else_below_the_state_directory(
    tmp_path: Path, recipe: Path
):
    environ = {"XDG_CONFIG_HOME": f"{tmp_path}/config", "XDG_STATE_HOME": f"{tmp_path}/state"}
    assert engines("install", recipe, **environ).returncode == 0
    assert (tmp_path / "state/edge-agent/engines" / NAME / "manifest.json").exists()
    config = tmp_path / "config/edge-agent/config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(f"engines_dir: {tmp_path}/elsewhere\n")
    assert f"no engines in {tmp_path}/elsewhere" in engines("list", **environ).stdout
    named = tmp_path / "named.yaml"
    named.write_text(f"engines_dir: {tmp_path}/named\n")
    assert f"no engines in {tmp_path}/named" in engines("list", "--config", named, **environ).stdout
    config.write_text("engine_dir: /x\n")
    broken = engines("list", **environ)
    assert broken.returncode == 1
    assert "engine_dir (line 1): unknown key, did you mean engines_dir?" in broken.stderr
