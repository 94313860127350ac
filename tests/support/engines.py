"""Hosts, workers and stores with the real engine, small enough for tests."""

import json
import os
from pathlib import Path
from typing import Any

from edge_agent.core import Message, Role, StepRequest, TextPart, Tool
from edge_agent.engines.catalogue import Catalogue
from edge_agent.engines.host import WorkerSettings
from edge_agent.engines.manifest import MANIFEST_NAME
from edge_agent.engines.protocol import Options
from tests.conftest import ENGINE

CONTEXT_TOKENS = 2048
OPTIONS = Options(
    slots=2,
    context_tokens=CONTEXT_TOKENS,
    threads=1,
    prefill_batch_tokens=64,
    backlog_tokens=4096,
    backlog_s=30.0,
)
WORKER = WorkerSettings(
    python=None, heartbeat_interval_s=5.0, heartbeat_timeout_s=60.0, oom_score_adj=500
)
STOP_S = 10.0


def request(text: str = "Hello", **more: Any) -> StepRequest:
    """A step that asks this of the model."""
    return StepRequest((Message(Role.USER, (TextPart(text),)),), **more)


def long_request(text: str = "Count.", **more: Any) -> StepRequest:
    """A step that goes on until something stops it."""
    tool = Tool("count", "Count.", '{"type":"object"}')
    numbers = {"type": "array", "items": {"type": "integer"}, "minItems": 1000}
    return request(
        text, tools=(tool,), answer_only=True, output_schema_json=json.dumps(numbers), **more
    )


def make_store(source: Path, target: Path, *names: str) -> Catalogue:
    """A store with the engine under each of these names; the files are shared."""
    manifest = json.loads((source / ENGINE / MANIFEST_NAME).read_text())
    for name in names:
        directory = target / name
        directory.mkdir(parents=True)
        for spec in manifest["files"]:
            os.link(source / ENGINE / spec["path"], directory / spec["path"])
        (directory / MANIFEST_NAME).write_text(json.dumps(manifest | {"name": name}))
    return Catalogue(target)
