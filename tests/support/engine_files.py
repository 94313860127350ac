"""Small made engines: a recipe of kind `path` with its files, written into a directory.

And a real one under more than one name.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

NAME = "tiny"
FILES = {"model.bin": b"weights " * 40_000, "extra/vocabulary.txt": b"one\ntwo\n"}


def recipe_data(files: dict[str, bytes], name: str = NAME) -> dict[str, Any]:
    """The recipe's content, right in every field."""
    turn = {"open": "<|im_start|>user\n", "close": "<|im_end|>\n"}
    return {
        "name": name,
        "description": "a made engine",
        "backend": {"name": "llama_cpp", "min_version": "2026.10"},
        "files": [
            {"path": path, "sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
            for path, data in files.items()
        ],
        "model": next(iter(files)),
        "context_tokens": 2048,
        "max_output_tokens": 1024,
        "slots": 2,
        "layers": [{"kind": "full", "layers": 2, "bytes_per_token": 64}],
        "memory": {"load_peak_bytes": 2_000_000, "steady_bytes": 1_000_000},
        "prompt": {
            "system": turn,
            "user": turn,
            "assistant": turn,
            "tool": turn,
            "default_system": "You are a test.",
        },
        "tools": {"strategy": "schema", "instructions": "Tools:"},
        "stop": ["<|im_end|>"],
        "capabilities": ["text"],
        "licence": "Apache-2.0",
        "obtain": {"kind": "path", "directory": "files"},
    }


def write_engine(directory: Path, files: dict[str, bytes] | None = None, **changes: Any) -> Path:
    """Write the files and the recipe with `changes` to its fields; returns the recipe's path."""
    files = FILES if files is None else files
    for path, data in files.items():
        target = directory / "files" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    recipe = directory / f"{changes.get('name', NAME)}.yaml"
    recipe.write_text(yaml.safe_dump(recipe_data(files) | changes))
    return recipe


def copy_engine(installed: Path, store: Path, name: str) -> None:
    """Install an installed engine, a directory of a store, once more under another name."""
    target = store / name
    target.mkdir(parents=True)
    manifest = json.loads((installed / "manifest.json").read_bytes())
    for spec in manifest["files"]:
        file = target / spec["path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(installed / spec["path"], file)
        except OSError:  # another file system
            shutil.copyfile(installed / spec["path"], file)
    (target / "manifest.json").write_text(json.dumps(manifest | {"name": name}))
