"""The wheel works where there is no checkout: built here, installed alone, used from elsewhere.

All of it offline. The clean environment sees the locked packages through a .pth file. Python reads
no .pth files in a directory that one adds, so the editable install beside them stays out of sight.
"""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(180)]


@dataclass(frozen=True)
class CleanEnvironment:
    """A virtual environment with the wheel in it, and a place to work that is not the checkout."""

    path: Path
    workdir: Path

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        return subprocess.run(
            [str(self.path / "bin" / program), *arguments],
            cwd=self.workdir,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def python(self, code: str) -> str:
        """What the code prints, run with -I -W error."""
        done = self.run("python", "-I", "-W", "error", "-c", code)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    _succeed([sys.executable, *command])
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> CleanEnvironment:
    path = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(path, symlinks=True)
    python = path / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    _succeed([*pip, "install", "--no-index", "--no-deps", "--quiet", str(wheel)])
    (site,) = path.glob("lib/python*/site-packages")
    (site / "locked.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return CleanEnvironment(path, tmp_path_factory.mktemp("elsewhere"))


def _succeed(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata_of(wheel: Path) -> Message:
    (name,) = (name for name in names_in(wheel) if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(name).decode())


def test_one_wheel_serves_every_machine(wheel: Path):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_holds_messages_stubs_and_types_of_every_proto(wheel: Path):
    protos = sorted((ROOT / "proto/edge_agent/v1").glob("*.proto"))
    assert protos
    expected = {
        f"edge_agent/v1/{proto.stem}_pb2{suffix}"
        for proto in protos
        for suffix in (".py", ".pyi", "_grpc.py", "_grpc.pyi")
    }
    assert expected | {"edge_agent/v1/__init__.py"} <= names_in(wheel)


def test_holds_every_recipe_and_the_example_configuration(wheel: Path):
    recipes = {f"edge_agent/recipes/{path.name}" for path in (ROOT / "engines").glob("*.yaml")}
    assert recipes
    assert recipes | {"edge_agent/config.example.yaml"} <= names_in(wheel)


def test_holds_nothing_but_the_package(wheel: Path):
    names = names_in(wheel)
    assert {name.split("/")[0] for name in names} == {
        "edge_agent",
        f"edge_agent-{metadata_of(wheel)['Version']}.dist-info",
    }
    assert not [name for name in names if "__pycache__" in name or "/." in name]


def test_metadata_names_the_licence_and_no_address_of_a_dependency(wheel: Path):
    metadata = metadata_of(wheel)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    requires = metadata.get_all("Requires-Dist", [])
    assert any(line.startswith("grpcio") for line in requires)
    assert [line for line in requires if "@" in line or "://" in line] == []


def test_imports_come_from_the_wheel_and_not_from_the_checkout(clean: CleanEnvironment):
    code = "import edge_agent, edge_agent.v1 as v1; print(edge_agent.__file__, v1.__file__)"
    for file in clean.python(code).split():
        assert Path(file).is_relative_to(clean.path)


def test_every_generated_module_imports_with_the_locked_packages(clean: CleanEnvironment):
    code = (
        "import importlib, pkgutil, edge_agent.v1 as v1\n"
        "names = [module.name for module in pkgutil.iter_modules(v1.__path__)]\n"
        "for name in names: importlib.import_module(f'edge_agent.v1.{name}')\n"
        "print(len(names))"
    )
    assert int(clean.python(code)) > 0


def test_the_command_explains_itself(clean: CleanEnvironment):
    done = clean.run("edge-agent", "--help")
    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout
