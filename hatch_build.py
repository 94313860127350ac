"""Generates `edge_agent/v1` from the protos and puts the recipes into the wheel.

Used in two ways: hatchling calls `CustomBuildHook` for a wheel and for an editable install, and
`python hatch_build.py` does the generation alone (`make proto`). It generates only when a proto, a
generator's version or this file has changed, and replaces file by file, so that a daemon or a
test that is importing `edge_agent.v1` meanwhile never finds it half empty.
"""

import fcntl
import hashlib
import shutil
import sysconfig
import tempfile
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent
PROTO_DIR = Path("proto")
PACKAGE_DIR = Path("edge_agent/v1")
STAMP = ".stamp"
INIT = '"""Messages and services of the API, generated from proto/edge_agent/v1; never edited."""\n'
MYPY_PLUGINS = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]  # generic over hatchling's own config
    """Completes what hatchling packs: generated code, recipes and the example configuration."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate the code; a real wheel also gets the data files of the repository.

        An editable install gets none: there the package finds them in the checkout.
        """
        root = Path(self.root)
        generate(root)
        if version == "editable":
            return
        recipes = sorted((root / "engines").glob("*.yaml"))
        if not recipes:
            msg = f"no recipes in {root / 'engines'}"
            raise FileNotFoundError(msg)
        include = build_data["force_include"]
        for recipe in recipes:
            include[str(recipe)] = f"edge_agent/recipes/{recipe.name}"
        include[str(root / "config.example.yaml")] = "edge_agent/config.example.yaml"


def generate(root: Path) -> bool:
    """Bring `edge_agent/v1` below `root` up to date; returns whether anything had to be generated.

    Raises:
        FileNotFoundError: there are no protos.
        RuntimeError: protoc refused them; its messages are on stderr.
    """
    protos = sorted((root / PROTO_DIR).glob("edge_agent/v1/*.proto"))
    if not protos:
        msg = f"no protos in {root / PROTO_DIR / 'edge_agent/v1'}"
        raise FileNotFoundError(msg)
    target = root / PACKAGE_DIR
    target.mkdir(parents=True, exist_ok=True)
    with (target / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = _fingerprint(protos)
        stamp = target / STAMP
        if stamp.is_file() and stamp.read_text() == wanted:
            return False
        with tempfile.TemporaryDirectory(dir=target, prefix=".new-") as scratch:
            _protoc(root / PROTO_DIR, protos, Path(scratch))
            made = Path(scratch) / PACKAGE_DIR
            (made / "__init__.py").write_text(INIT)
            stamp.unlink(missing_ok=True)  # a crash from here on means: generate again
            names = {path.replace(target / path.name).name for path in sorted(made.iterdir())}
        for path in target.glob("*.py*"):
            if path.name not in names:
                path.unlink()  # its proto is gone
        stamp.write_text(wanted)
    return True


def _fingerprint(protos: list[Path]) -> str:
    """Name, content and generators of everything that the output depends on."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for proto in protos:
        digest.update(f"{proto.name}\0".encode())
        digest.update(proto.read_bytes())
    plugins = metadata.version("mypy-protobuf") if _mypy_plugins() else "none"
    tools = metadata.version("grpcio-tools")
    return f"grpcio-tools {tools}\nmypy-protobuf {plugins}\n{digest.hexdigest()}\n"


def _mypy_plugins() -> dict[str, str]:
    """Where mypy-protobuf's protoc plugins are (beside this Python or on PATH), if anywhere."""
    scripts = sysconfig.get_path("scripts")
    found = {name: shutil.which(name, path=scripts) or shutil.which(name) for name in MYPY_PLUGINS}
    return {name: path for name, path in found.items() if path} if all(found.values()) else {}


def _protoc(proto_dir: Path, protos: list[Path], out: Path) -> None:
    """Run protoc: messages, gRPC stubs, and types for both (without the plugins for messages)."""
    from grpc_tools import protoc

    well_known = resources.files("grpc_tools") / "_proto"
    arguments = [f"-I{proto_dir}", f"-I{well_known}"]
    arguments += [f"--python_out={out}", f"--grpc_python_out={out}"]
    plugins = _mypy_plugins()
    arguments += [f"--plugin={name}={path}" for name, path in plugins.items()]
    if plugins:
        arguments += [f"--mypy_out=quiet:{out}", f"--mypy_grpc_out=quiet:{out}"]
    else:
        arguments += [f"--pyi_out={out}"]
    if protoc.main(["protoc", *arguments, *map(str, protos)]) != 0:
        msg = f"protoc failed for {', '.join(proto.name for proto in protos)}"
        raise RuntimeError(msg)


if __name__ == "__main__":
    changed = generate(ROOT)
    print(f"{PACKAGE_DIR}: {'generated' if changed else 'up to date'}")
