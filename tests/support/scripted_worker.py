"""A worker process whose model writes what its user's message says, step by step.

    python -m tests.support.scripted_worker FD PARENT_PID OOM_ADJ

The daemon, the worker protocol, the worker and its decoder are the real ones; only the model below
them is made up. `script` makes such a message, `install` an engine of this kind in a store with the
configuration that has a daemon start it.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from edge_agent.engines import worker
from tests.support.engine_files import FILES, recipe_data
from tests.support.toy_engine import ToyBackend

SCRIPTED = "scripted"
SLOTS = 16
_REPOSITORY = Path(__file__).resolve().parents[2]
_BEGIN, _END = "SCRIPT", "END-OF-SCRIPT"

Calls = Sequence[tuple[str, Mapping[str, object]]]
"""What one step calls: names and arguments."""


def script(*steps: str | Calls) -> str:
    """A user's message: each step is an answer, or calls. After the last one it says `Done.`."""
    return f"{_BEGIN}{json.dumps(steps)}{_END}"


def writes(prompt: str) -> str:
    """What the model writes after this prompt."""
    _before, _, rest = prompt.partition(_BEGIN)
    written, _, since = rest.partition(_END)
    if not written:
        return "Done."
    steps = json.loads(written)
    at = since.count("<|assistant|>") - 1  # the last one is being written
    step = steps[at] if at < len(steps) else "Done."
    if isinstance(step, str):
        return step
    calls = [{"name": name, "arguments": arguments} for name, arguments in step]
    return "".join(f"<call>{json.dumps(call)}</call>" for call in calls)


def install(store: Path, runs: str = "") -> str:
    """Write the engine and its interpreter below `store`; returns the daemon's configuration.

    `runs` is more of its section of that name.
    """
    directory = store / SCRIPTED
    for path, data in FILES.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(data)
    (directory / "manifest.json").write_bytes(msgspec.json.encode(_manifest()))
    python = store.parent / "scripted-python"
    # -I and the bootstrap are of no use here.
    python.write_text(
        f"#!/bin/sh\nshift 2\ncd {_REPOSITORY}\n"
        f'exec {sys.executable} -m tests.support.scripted_worker "$@"\n'
    )
    python.chmod(0o755)
    return (
        f"runs: {{default_engine: {SCRIPTED}, {runs}}}\npreload: [{SCRIPTED}]\n"
        f"worker: {{threads: 1, python: {{llama_cpp: {python}}}}}\n"
    )


def _manifest() -> dict[str, object]:
    data = recipe_data(FILES, SCRIPTED)
    del data["obtain"]
    data["source"] = {"kind": "path", "location": "files"}
    data["prompt"] = {
        role: {"open": f"<|{role}|>", "close": "<|end|>"}
        for role in ("system", "user", "assistant", "tool")
    } | {"prefix": "<|begin|>", "default_system": "You follow a script."}
    native = {
        "instructions": "{tools}",
        "call": {"open": "<call>", "close": "</call>"},
        "result": {"open": "<result>", "close": "</result>"},
    }
    data["tools"] = {"strategy": "native", "instructions": "Tools:", "native": native}
    data["stop"] = ["<|end|>"]
    data["context_tokens"], data["slots"] = 1 << 16, SLOTS
    return data


class ScriptedBackend(ToyBackend):
    """Writes what the script says, in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = lambda prompt: (writes(prompt),)


if __name__ == "__main__":
    vars(worker)["create_backend"] = lambda _name: ScriptedBackend()
    worker.main(*(int(argument) for argument in sys.argv[1:4]))
