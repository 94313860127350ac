"""The README's commands do what it says, run as a reader would."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.daemon import BASE_CONFIG, running_daemon

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text()
ROBOTS = (REPOSITORY / "docs" / "robots.md").read_text()
DEMO_TIMEOUT_S = 180  # what the README's reader is promised
CALL_TIMEOUT_S = 60


def blocks(language: str, document: str = README) -> list[str]:
    """A document's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The README's shell commands, continued lines joined."""
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def session(engine_store: Path) -> Iterator[Mapping[str, str]]:
    """The environment of a reader in whose session a daemon runs."""
    with running_daemon(engine_store, BASE_CONFIG + "".join(blocks("yaml"))) as daemon:
        runtime = daemon.directory
        (runtime / "edge-agent").symlink_to(runtime / "run")
        (runtime / "state-home").mkdir()
        (runtime / "state-home" / "edge-agent").symlink_to(engine_store.parent)
        yield {
            **os.environ,
            "XDG_RUNTIME_DIR": str(runtime),
            "XDG_STATE_HOME": str(runtime / "state-home"),
        }


def run(command: str, environ: Mapping[str, str], timeout_s: float) -> str:
    """What a command prints; fails with all of it unless the command succeeds."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=REPOSITORY,
        env=environ,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readme_starts_with_two_commands() -> None:
    assert commands()[:2] == ["make demo", "make test"]


@pytest.mark.timeout(DEMO_TIMEOUT_S + 30)
def test_make_demo_ends_by_itself_and_most_goals_reach_the_right_tool(
    session: Mapping[str, str],
) -> None:
    output = run("make demo", session, DEMO_TIMEOUT_S)
    score = re.search(r"^(\d+) of (\d+) goals reached the right tool", output, re.MULTILINE)
    assert score is not None
    assert int(score[1]) * 2 > int(score[2])
    assert "far too weak to drive a robot" in output


@pytest.mark.timeout(CALL_TIMEOUT_S + 30)
@pytest.mark.parametrize(
    "command", [c for c in commands() if not c.startswith("make ") and " serve" not in c]
)
def test_the_readmes_commands_succeed(command: str, session: Mapping[str, str]) -> None:
    assert run(command, session, CALL_TIMEOUT_S)


@pytest.mark.timeout(CALL_TIMEOUT_S + 30)
@pytest.mark.parametrize("program", [*blocks("python"), *blocks("python", ROBOTS)])
def test_the_readmes_python_runs(program: str, session: Mapping[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=session,
        capture_output=True,
        text=True,
        timeout=CALL_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "SUCCEEDED" in done.stdout


def test_the_readmes_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert targets
    assert [target for target in targets if not (REPOSITORY / target).exists()] == []
